"""Figures: the plotted data is read back and compared with the input."""

import matplotlib.image
import numpy as np
import pytest

from evaluation.evaluate import ScoredSlices, by_lesion_size
from evaluation.figures import (
    best_median_worst,
    dice_threshold_figure,
    draw_scores,
    histograms_figure,
    precision_recall_figure,
    scan_figure,
    write_figures,
)
from evaluation.metrics import RIM, best_threshold, dice_curve, mask_scores
from tests.evaluation.conftest import evaluate


@pytest.fixture(scope="module")
def maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (7, 24, 24)
    brainmask, truth = np.zeros((2, *shape), bool)
    brainmask[:, 3:21, 3:21] = True
    truth[:, 8:12, 8:14] = True
    grey = {key: rng.normal(size=shape) for key in ("image", "translation", "reconstruction")}
    grey["variance"] = np.zeros(shape)
    scores = (rng.normal(size=shape) + 2 * truth) ** 2
    names = [f"S{i}_80" for i in range(len(truth))]
    return {
        "names": names,
        "healthy": np.zeros(len(truth), bool),
        "scores": scores,
        "truth": truth,
        "brainmask": brainmask,
        **grey,
    }


def labelled(maps: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return maps["scores"], maps["truth"], maps["brainmask"]


def draw(maps: dict, **options) -> dict:
    evaluation = evaluate(*labelled(maps), n_resamples=10, **options)
    summary, per_slice = evaluation.summary, evaluation.per_slice
    metrics = summary | {
        "input": "flair",
        "trans": "t2",
        "score": "errors",
        "by_lesion_size": by_lesion_size(per_slice),
    }
    evaluations = {"method": evaluation, "intensity": evaluation}
    return draw_scores([maps], {"scores": [slices_of(maps)]}, metrics, per_slice, {}, evaluations)


def slices_of(maps: dict) -> ScoredSlices:
    return ScoredSlices(*labelled(maps), maps["names"], maps["healthy"])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 20])
def test_best_median_worst(n):
    dice = np.random.default_rng(n).permutation(n) / n
    groups = best_median_worst(dice)
    shown = dice[list(groups)]
    assert (np.diff(shown) < 0).all()  # best first, no slice twice
    assert shown[0] == dice.max()
    assert shown[-1] == dice.min()
    if n >= 6:
        assert list(groups.values()) == ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
        assert np.median(dice) == pytest.approx(shown[2:4].mean(), abs=1 / n)


def test_undefined_dice_counts_as_worst():
    assert list(best_median_worst(np.array([0.5, np.nan, 0.9, 0.7]))) == [2, 3, 1]


def test_all_figures_are_written_and_readable(maps, tmp_path):
    write_figures(tmp_path / "figures", draw(maps, val=labelled(maps)))
    sizes = {"slices": 6 * 150, "precision_recall": 400, "dice_threshold": 400, "histograms": 400}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(sizes)
    for name, min_height in sizes.items():
        picture = matplotlib.image.imread(tmp_path / "figures" / f"{name}.png")[..., :3]
        height, width, _ = picture.shape
        assert height >= min_height
        assert width >= 700
        assert 0.05 < (picture == 1).all(-1).mean() < 0.98


def test_slices_figure_outlines_truth_and_prediction(maps):
    figure = draw(maps, val=labelled(maps))["slices"]
    rows = np.array(figure.axes[:30]).reshape(6, 5)
    assert [len(ax.collections) for ax in rows[0]] == [0, 0, 0, 0, 2]
    assert {"prediction (validation threshold)", "truth"} == {t.get_text() for t in figure.legends[0].texts}
    assert figure.axes[30].get_ylabel() == "squared cyclic error"  # of the colour bar
    without_val = draw(maps)["slices"]
    assert "prediction (oracle threshold)" in {text.get_text() for text in without_val.legends[0].texts}


def test_precision_recall_legend_gives_the_area_under_the_curve(maps):
    scores, truth, brainmask = labelled(maps)
    noise = evaluate(-scores, truth, brainmask, n_resamples=10)
    figure = precision_recall_figure({"method": evaluate(scores, truth, brainmask, n_resamples=10), "noise": noise})
    (ax,) = figure.axes
    *curves, chance = ax.lines
    for curve in curves:
        recall, precision = curve.get_data()
        area = -np.sum(np.diff(recall) * precision[:-1])
        assert f"AUPRC {area:.3f}" in curve.get_label()
    assert curves[0].get_linestyle() != curves[1].get_linestyle()  # distinguishable without colour
    assert set(chance.get_ydata()) == {truth.sum() / (truth | brainmask).sum()}


def test_oracle_threshold_is_marked_at_the_peak_of_the_dice_curve(maps):
    scores = mask_scores(maps["scores"], maps["brainmask"])
    threshold, dice = best_threshold(scores, maps["truth"])
    thresholds = {"oracle": threshold, "validation": threshold / 2}
    curve = dice_curve(scores, maps["truth"])
    figure = dice_threshold_figure(*curve, thresholds, {"oracle": dice, "validation": None}, "error")
    curve, oracle, validation = figure.axes[0].lines
    x, y = curve.get_data()
    assert len(x) == len(np.unique(scores[np.isfinite(scores)]))
    assert (x[np.argmax(y)], y.max()) == pytest.approx((threshold, dice))
    assert set(oracle.get_xdata()) == {threshold}
    assert set(validation.get_xdata()) == {threshold / 2}
    assert f"Dice {dice:.3f}" in oracle.get_label()


def test_histograms_count_every_scored_pixel(maps):
    scores = mask_scores(maps["scores"], maps["brainmask"])
    figure = histograms_figure([slices_of(maps)], RIM, {"oracle": 1.0}, "error")
    healthy, lesion = (patch.get_xy() for patch in figure.axes[0].patches)
    for outline, pixels in ((healthy, ~maps["truth"]), (lesion, maps["truth"])):
        counts = outline[1:122:2, 1][:60]
        assert counts.sum() == np.count_nonzero(np.isfinite(scores) & pixels)
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # from an empty histogram
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_constant_or_nan_scores_can_be_drawn(maps, value, tmp_path):
    constant = maps | {"scores": np.full_like(maps["scores"], value)}
    write_figures(tmp_path / "figures", draw(constant, val=labelled(constant)))
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_scan_figure_shows_scan_scores_and_marked_regions():
    rng = np.random.default_rng(0)
    images = np.full((2, 20, 24), -3.0)
    images[:, 4:16, 5:21] = rng.normal(size=(2, 12, 16))
    anomaly = np.zeros_like(images)
    anomaly[0, 6:9, 7:12] = rng.uniform(1, 9, (3, 5))
    marked = anomaly >= 4
    labels = ["slice 8", "slice 3"]
    figure = scan_figure(images, anomaly, marked, labels, threshold=4.0, aspect=1.5, title="head.nii", meaning="error")
    *panels, bar = figure.axes
    panels = np.reshape(panels, (3, 2))
    assert [ax.get_title() for ax in panels[0]] == labels
    assert [ax.get_ylabel() for ax in panels[:, 0]] == ["scan", "anomaly score", "marked"]
    crop = (slice(2, 18), slice(3, 23))  # two pixels around the brain
    for i, column in enumerate(panels.T):
        for ax, shown in zip(column, (images, anomaly, images), strict=True):
            picture = ax.images[0].get_array()
            expected = shown[i][crop].T
            if shown is images:
                expected = np.clip((expected + 3) / 8, 0, 1)
            np.testing.assert_allclose(picture, expected)  # anterior up, right on the left
            assert ax.get_aspect() == 1.5
    assert {text.get_text() for text in panels[0, 0].texts} == {"R", "L"}
    outlines = [len(ax.collections) for ax in panels[2]]
    assert outlines == [1, 0]
    assert set(bar.lines[-1].get_ydata()) == {4.0}  # the threshold
    assert bar.get_ylim()[1] >= 4


def test_scan_figure_of_zero_scores_can_be_drawn(tmp_path):
    images = np.full((1, 9, 9), -3.0)
    images[0, 3:6, 3:6] = 0
    zeros = np.zeros_like(images)
    figure = scan_figure(images, zeros, zeros > 0, ["slice 0"], threshold=2.0, aspect=1, title="", meaning="error")
    write_figures(tmp_path / "figures", {"report": figure})
    assert matplotlib.image.imread(tmp_path / "figures/report.png").std() > 0
