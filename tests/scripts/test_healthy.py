"""Training and validation on healthy people, testing on patients and healthy people: from a table to a prediction."""

import csv
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from evaluation.evaluate import masked_scores
from evaluation.metrics import RIM, bootstrap_interval
from evaluation.report import score_functions, scored
from evaluation.results import read_maps
from tests.scripts.conftest import expect_success
from tests.scripts.test_predict import head, lesion, save

pytestmark = pytest.mark.xdist_group("healthy")

SPLITS = {"train": ["h0", "h1"], "val": ["h2"], "test": ["h3", "h4", "p0", "p1"]}
NETWORKS = "unet_forward_phantom_t2_flair__unet_backward_phantom_t2_flair"


@pytest.fixture(scope="module")
def study(tmp_path_factory, in_process, tiny, short) -> tuple[Path, dict[str, str]]:
    """The folder of a study, and the outputs of its commands."""
    folder = tmp_path_factory.mktemp("healthy")
    rows = []
    for split, names in SPLITS.items():
        for name in names:
            healthy = name.startswith("h")
            row = {"subject": name, "seg": "", "healthy": "yes" if healthy else "", "split": split}
            for kind in ("flair", "t2"):
                volume = head(int(name[1:]) + 10 * healthy, kind)
                if healthy:
                    volume = np.where((volume > 0) & lesion(), 400, volume).astype(np.int16)
                row[kind] = save(folder / f"raw/{name}_{kind}.nii.gz", volume).relative_to(folder)
            if not healthy:
                row["seg"] = save(folder / f"raw/{name}_seg.nii.gz", lesion().astype(np.uint8)).relative_to(folder)
            rows.append(row)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = ("--csv=table.csv", "--output_dir=datasets/data", "--test_slices=all", "--slices", 75, 79, "--workers=1")
    train = ("modality_cyclic_train.py", *tiny, *short)
    data = ("--dataset=phantom", "--data_dir=datasets/data")
    scan = ("--dataset=phantom", "--scan=raw/p1_flair.nii.gz", "--output_dir=out", "--slices", 7, 8)
    commands = {
        "preprocess": ("datasets/brats_preprocess.py", *table),
        "forward": train,
        "backward": (*train, "--training_process=backward"),
        "test": ("modality_cyclic_test.py", *data),
        "predict": ("modality_cyclic_predict.py", *scan),
    }
    done = {name: expect_success(in_process(*command, cwd=folder)).stdout for name, command in commands.items()}
    return folder, done


def read(folder: Path) -> dict:
    return json.loads((folder / "experiments/results" / NETWORKS / "metrics.json").read_text())


def test_healthy_people_are_kept_in_validation_and_testing(study):
    folder, done = study
    for split, n in (("train", 8), ("val", 4), ("test", 16)):
        assert f"{split}: subjects read: {len(SPLITS[split])}, slices written: {n}" in done["preprocess"]
    assert len(list((folder / "datasets/data/test/seg").iterdir())) == 16


def test_only_the_healthy_threshold_is_chosen_on_healthy_people(study):
    metrics = read(study[0])
    for block in (metrics, metrics["chosen"], metrics["baseline_intensity"]):
        assert block["validation"] is None
        assert block["healthy"]["threshold"] is not None
    assert "no val lesions" in study[1]["test"]
    assert metrics["by_subject"]["n_healthy"] == 2
    assert metrics["by_subject"]["n_with_lesion"] == 2


def test_prediction_uses_the_healthy_threshold_and_says_so(study):
    folder, done = study
    threshold = read(folder)["chosen"]["healthy"]["threshold"]
    assert f"threshold: {threshold:.6g}, the healthy threshold in experiments/results/{NETWORKS}" in done["predict"]
    assert "(marked 1 % of healthy validation pixels)" in done["predict"]
    anomaly, mask = (
        np.asarray(nibabel.load(folder / f"out/p1_flair_{kind}.nii.gz").dataobj) for kind in ("anomaly", "mask")
    )
    np.testing.assert_array_equal(mask, anomaly >= np.float32(threshold))


def test_the_marked_share_of_healthy_brains_has_an_interval(study):
    folder, done = study
    _, maps = read_maps(folder / "experiments/results" / NETWORKS / "error_maps.npz")
    metrics = read(folder)
    block = metrics["by_subject"]["healthy"]["healthy"]
    threshold, shares = metrics["healthy"]["threshold"], []
    (part,) = scored(maps["test"], score_functions("none", 1, {})["scores"])
    marked = masked_scores(part, RIM) >= threshold
    for name in ("h3", "h4"):
        rows = [i for i, one in enumerate(part.names) if one.startswith(f"{name}_")]
        assert part.healthy[rows].all()
        shares.append(marked[rows].sum() / part.brainmask[rows].sum())
    assert block["marked_share"] == pytest.approx(np.mean(shares))
    assert block["marked_share_interval"] == pytest.approx(bootstrap_interval(shares))
    shown = re.search(r"^Cyclic UNet +healthy .*$", done["test"], re.M)[0]
    assert f"{block['marked_share']:.3f} [" in shown


def test_the_table_of_subjects_agrees_with_the_error_maps(study):
    folder, _ = study
    results = folder / "experiments/results" / NETWORKS
    with (results / "per_subject.csv").open(newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert list(rows) == SPLITS["test"]
    _, maps = read_maps(results / "error_maps.npz")
    (part,) = maps["test"]
    for name, row in rows.items():
        mine = [i for i, one in enumerate(part["names"]) if str(one).startswith(f"{name}_")]
        truth = part["truth"][mine]
        assert int(row["lesion_voxels"]) == truth.sum()
        assert int(row["n_slices"]) == 4
        assert float(row["healthy"]) == name.startswith("h")
        assert int(row["n_lesions"]) == ndimage.label(truth, np.ones((3, 3, 3)))[1]
        assert f"{float(row['chosen_healthy_marked_share']):.6g}" == row["chosen_healthy_marked_share"]


def test_figures_of_whole_subjects(study):
    names = {path.stem for path in (study[0] / "experiments/results" / NETWORKS / "figures").iterdir()}
    assert names >= {"froc", "subject_slice"} or names >= {"froc", "subject_best", "subject_worst"}


def test_the_published_threshold_by_name(study, in_process):
    folder, _ = study
    scan = ("--dataset=phantom", "--scan=raw/p1_flair.nii.gz", "--output_dir=named", "--slices", 7, 8)
    done = in_process("modality_cyclic_predict.py", *scan, "--threshold=validation", cwd=folder)
    assert done.code == 2
    assert "no validation threshold: preprocess validation slices with lesions" in done.stderr
    assert not (folder / "named").exists()
    done = in_process("modality_cyclic_predict.py", *scan, "--threshold=healthy", "--scoring=published", cwd=folder)
    assert (
        f"threshold: {read(folder)['healthy']['threshold']:.6g}, the healthy threshold" in expect_success(done).stdout
    )
