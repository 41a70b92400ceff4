"""Evaluation of arrays in memory, and the error bound of the AUPRC of many pixels."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evaluation.evaluate import Evaluation, ScoredSlices, evaluate_parts


def evaluate(
    scores: ArrayLike,
    truth: ArrayLike,
    brainmask: ArrayLike,
    val: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate slices in memory, one per subject; see `evaluate_parts`.

    Args:
        scores: [N, H, W] float.
        truth, brainmask: [N, H, W] bool.
        val: the same of the validation slices.
        options: keyword arguments of `evaluate_parts`.
    """

    def only_part(scores: ArrayLike, truth: ArrayLike, brainmask: ArrayLike) -> list[ScoredSlices]:
        truth = np.asarray(truth, dtype=bool)
        if truth.ndim != 3 or len(truth) == 0:
            raise ValueError(f"truth must have shape [N, H, W] with at least one slice, got {truth.shape}")
        names = [f"{i}_0" for i in range(len(truth))]
        brainmask = np.asarray(brainmask, dtype=bool)
        return [ScoredSlices(np.asarray(scores), truth, brainmask, names, ~truth.any(axis=(1, 2)))]

    return evaluate_parts(only_part(scores, truth, brainmask), only_part(*val) if val else None, **options)


def auprc_error_bound(n_thresholds: int) -> float:
    """Bound the error of an AUPRC that is evaluated at `n_thresholds` quantiles of the lesion pixels' scores.

    Between two thresholds recall rises by 1/K. The precision there is at most h / (h + f) with the hits h at the lower
    threshold and the false positives f at the upper one. Its distances to the precision at the lower threshold add up
    to at most 1 for rising f, and to Σ 1/4g for rising h; the same holds for distances below it.
    """
    return (1 + (1 + math.log(n_thresholds)) / 4) / n_thresholds
