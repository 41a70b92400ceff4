"""Tables: row names and the printed chance level."""

import numpy as np

from evaluation.metrics import ranked_scores, scored_region
from evaluation.tables import table
from tests.evaluation.conftest import evaluate


def test_chance_is_the_fraction_of_lesions_in_ranked_pixels():
    """Ranked pixels are the brain and any lesion outside it; scored pixels are the brain without its rim."""
    brainmask, truth = np.zeros((2, 1, 32, 32), bool)
    brainmask[:, 4:28, 4:28] = True
    truth[:, 2:14, 6:12] = True  # across the rim to outside the brain
    scores = np.random.default_rng(0).normal(size=truth.shape)
    summary = evaluate(scores, truth, brainmask, n_resamples=10).summary
    run = {"method": "cyclic_unet", "input": "flair", "trained_steps": {"forward": 1, "backward": 1}}
    run |= {"sampling_settings": {"smooth": "none"}, "unsmoothed": None}
    printed = table([{**run, **summary, "baseline_intensity": summary | {"sign": 1}}])

    runs = [
        {**run, **summary, "input": input, "baseline_intensity": summary | {"sign": sign}}
        for input, sign in (("flair", 1), ("t2", 1), ("flair", 1), ("t1", -1))
    ]
    names = [line.split("  ")[0] for line in table(runs).splitlines()[2:-2]]
    of_both_inputs = [f"{kind} ({input})" for input in ("flair", "t2") for kind in ("intensity", "Cyclic UNet")]
    assert names == [*of_both_inputs, "inverted intensity (t1)", "Cyclic UNet (t1)"]

    _, ranked_truth = ranked_scores(scores, truth, brainmask)
    ranked, scored = ranked_truth.mean(), truth[scored_region(brainmask)].mean()
    assert abs(ranked - scored) > 0.01
    assert f"chance-level AUPRC {ranked:.3f} (fraction of lesion pixels)" in printed
