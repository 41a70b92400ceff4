"""The scripts with reconstruction baselines, one-way scores and the opposite cycle."""

import json
import shutil

import numpy as np
import pytest

from models import METHODS
from tests.scripts.conftest import expect_refusal

BASELINES = [name for name, entry in METHODS.items() if not entry.translates]
pytestmark = pytest.mark.xdist_group("scripts")  # one process, so that the chain runs once

TRAIN, TEST, PREDICT = (f"modality_cyclic_{kind}.py" for kind in ("train", "test", "predict"))
DATA = ("--dataset=phantom", "--data_dir=datasets/data")
FORWARD, BACKWARD = "unet_forward_phantom_t2_flair", "unet_backward_phantom_t2_flair"


@pytest.fixture(scope="module")
def workdir(workspace, chain, in_process, tiny, short):
    """Train all baselines in the chain's workspace."""
    for flags in (*((f"--model_name={name}",) for name in BASELINES), *HISTOGRAMS):
        done = in_process(TRAIN, *tiny, *short, *flags, cwd=workspace)
        assert done.code == 0, done.stderr
    return workspace


HISTOGRAMS = tuple(("--model_name=histogram", f"--training_process={one}") for one in ("forward", "backward"))
RUNS = {
    **{name: ((f"--model_name={name}",), f"{name}_forward_phantom_flair_flair", name) for name in BASELINES},
    "histogram": (
        ("--model_name=histogram",),
        "histogram_forward_phantom_t2_flair__histogram_backward_phantom_t2_flair",
        "cyclic_histogram",
    ),
    "one way": (("--score=one_way",), f"{FORWARD}__one_way", "one_way_unet"),
    "one way, masked": (
        ("--score=one_way", "--model_name=diffusion", "--experiment_name_forward=masked", "--sampling=fast"),
        "masked__one_way__fast",
        "one_way_diffusion",
    ),
}


def read(folder) -> tuple[dict, dict[str, np.ndarray]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    with np.load(folder / "error_maps.npz") as file:
        return metrics, dict(file)


@pytest.mark.parametrize("which", RUNS)
def test_every_method_scores_and_predicts(workdir, in_process, tmp_path, which):
    flags, name, method = RUNS[which]
    done = in_process(TEST, *DATA, *flags, cwd=workdir)
    assert done.code == 0, done.stderr
    metrics, maps = read(workdir / "experiments/results" / name)
    assert metrics["method"] == method
    one_way = which.startswith("one way")
    assert set(metrics["checkpoints"]) == {"forward"} | ({"backward"} if which == "histogram" else set())
    assert 0 < metrics["auprc"] < 1
    assert np.isfinite(maps["test_scores"]).all()
    if which != "one way, masked":
        reference = maps["test_image"]
        if one_way:
            files = sorted((workdir / "datasets/data/test/t2").glob("*.npy"))
            assert len(files) == len(reference)
            assert not np.allclose(maps["test_scores"], (reference - maps["test_reconstruction"]) ** 2)
        else:
            error = (reference - maps["test_reconstruction"]) ** 2
            np.testing.assert_allclose(maps["test_scores"], error, rtol=1e-4, atol=1e-5)

    case = sorted(workdir.glob("datasets/RSNA*/*_00005"))[0]
    scans = {kind: case / f"{case.name}_{kind}.nii.gz" for kind in ("flair", "t2")}
    other = (f"--scan_trans={scans['t2']}",) if one_way else ()
    done = in_process(
        PREDICT,
        *("--dataset=phantom", *flags, f"--scan={scans['flair']}", *other, f"--output_dir={tmp_path}"),
        *("--slices", 75, 77),
        cwd=workdir,
    )
    assert done.code == 0, done.stderr
    assert (tmp_path / f"{case.name}_flair_report.png").is_file()
    if which == "one way":
        flags = ("--dataset=phantom", *flags, f"--scan={scans['flair']}", f"--output_dir={tmp_path / 'other'}")
        link = tmp_path / "t2.nii.gz"
        link.symlink_to(scans["flair"])
        done = in_process(PREDICT, *flags, f"--scan_trans={link}", "--slices", 75, 77, cwd=workdir)
        expect_refusal(done, "t2.nii.gz is the same scan as", "name the other modality")
        # The score depends on the target scan.
        other = scans["t2"].with_name(f"{case.name}_t1.nii.gz")
        done = in_process(PREDICT, *flags, f"--scan_trans={other}", "--slices", 75, 77, cwd=workdir)
        assert done.code == 0, done.stderr
        one, another = (folder / f"{case.name}_flair_anomaly.nii.gz" for folder in (tmp_path, tmp_path / "other"))
        assert one.read_bytes() != another.read_bytes()


def test_the_one_way_score_is_the_translation_error(workdir, in_process):
    done = in_process(TEST, *DATA, "--score=one_way", cwd=workdir)
    assert done.code == 0, done.stderr
    _, maps = read(workdir / "experiments/results" / f"{FORWARD}__one_way")
    _, cycle = read(workdir / "experiments/results" / f"{FORWARD}__{BACKWARD}")
    np.testing.assert_allclose(maps["test_reconstruction"], cycle["test_translation"], rtol=1e-4, atol=1e-5)
    done = in_process(TEST, *DATA, "--input=t2", "--trans=flair", *REVERSED, cwd=workdir)
    assert done.code == 0, done.stderr
    _, reverse = read(workdir / "experiments/results" / f"{BACKWARD}__{FORWARD}")
    t2 = reverse["test_image"]  # the other modality of the same slices
    np.testing.assert_allclose(maps["test_scores"], (t2 - cycle["test_translation"]) ** 2, rtol=1e-4, atol=1e-5)


REVERSED = (f"--experiment_name_forward={BACKWARD}", f"--experiment_name_backward={FORWARD}")


def test_the_error_suggests_the_networks_of_the_opposite_cycle(workdir, in_process):
    for model_name, flags in (("unet", REVERSED), ("diffusion", REVERSED[1:])):
        cycle = ("--input=t2", "--trans=flair", f"--model_name={model_name}")
        done = in_process(TEST, *DATA, *cycle, cwd=workdir)
        expect_refusal(done, f"or use the networks of the opposite cycle: {' '.join(flags)}")
        assert done.stderr.endswith(f"{flags[-1]}\n")


@pytest.mark.parametrize("name", ["dae", "ddpm"])
def test_resumed_baseline_matches_uninterrupted_training(workdir, in_process, tiny, short, tmp_path, name):
    import torch

    for iterations in (2, 4):
        override = f"--config.score_model.training.iterations={iterations}"
        flags = (f"--model_name={name}", f"--logdir={tmp_path}", override)
        done = in_process(TRAIN, *tiny, *short, *flags, cwd=workdir)
        assert done.code == 0, done.stderr
    assert "resuming from opt000002.pt" in done.stdout
    folder = f"{name}_forward_phantom_flair_flair"
    one, other = (
        torch.load(experiments / folder / "ema_0.5_000004.pt", weights_only=True)
        for experiments in (tmp_path, workdir / "experiments")
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_is_selected_on_validation_slices(workdir, in_process, tmp_path):
    for name in (FORWARD, BACKWARD):
        shutil.copytree(workdir / "experiments" / name, tmp_path / name)
    done = in_process(TEST, *DATA, "--select=validation", f"--logdir={tmp_path}", cwd=workdir)
    assert done.code == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if ": validation AUPRC " in line:
            name, value = line.split(": validation AUPRC ")
            found[name] = float(value)
    assert set(found) == {f"{kind} weights of step {step}" for kind in ("EMA", "raw") for step in (2, 4)}
    (chosen,) = [line.removeprefix("chosen: ") for line in done.stdout.splitlines() if line.startswith("chosen: ")]
    assert found[chosen] == max(found.values())
    metrics, _ = read(tmp_path / "results" / f"{FORWARD}__{BACKWARD}__selected")
    kind, *_, step = chosen.split()
    for path in metrics["checkpoints"].values():
        assert path.endswith(f"{int(step):06d}.pt")
        assert ("ema_" in path) == (kind == "EMA")


REFUSED = {
    "a target modality": (TRAIN, ["--model_name=dae", "--trans=t2"], ["reconstructs the input modality", "--trans"]),
    "a way back": (TRAIN, ["--model_name=ddpm", "--training_process=backward"], ["there is no backward translator"]),
    "a part beyond the schedule": (
        TRAIN,
        ["--model_name=ddpm", "--config.score_model.baselines.noise_timestep=1000"],
        ["noise_timestep=1000", "between 0 and 999"],
    ),
    "no bottleneck": (
        TRAIN,
        ["--model_name=autoencoder", "--config.score_model.baselines.latent_channels=0"],
        ["latent_channels=0"],
    ),
    "a grid of nothing": (TRAIN, ["--model_name=dae", "--config.score_model.baselines.noise_size=0"], ["noise_size=0"]),
    "negative noise": (TRAIN, ["--model_name=dae", "--config.score_model.baselines.noise_std=-1"], ["noise_std=-1"]),
    "groups": (TRAIN, ["--model_name=autoencoder", "--config.score_model.model.norm_groups=7"], ["norm_groups=7"]),
    "a target to test": (TEST, ["--model_name=autoencoder", "--trans=t2"], ["reconstructs the input modality"]),
    "one way of a baseline": (TEST, ["--model_name=dae", "--score=one_way"], ["leave out --score one_way"]),
    "not trained": (TEST, ["--model_name=dae", "--input=t1"], ["dae_forward_phantom_t1_t1", "train it first"]),
    "not counted": (TEST, ["--model_name=histogram", "--trans=t1"], ["histogram_forward_phantom_t1_flair"]),
    "weights of another": (
        TEST,
        ["--model_name=dae", "--experiment_name_forward=autoencoder_forward_phantom_flair_flair"],
        ["forward autoencoder, not the forward dae"],
    ),
    "one way without the other scan": (
        PREDICT,
        ["--scan=datasets", "--output_dir=out", "--score=one_way"],
        ["--scan_trans", "go together"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_in_one_sentence(workdir, in_process, tiny, short, mistake):
    script, args, phrases = REFUSED[mistake]
    shared = {TRAIN: (*tiny, *short, "--experiment_name=new"), TEST: DATA, PREDICT: ("--dataset=phantom",)}[script]
    if mistake == "one way without the other scan":
        scan = next(workdir.glob("datasets/RSNA*/*/*_flair.nii.gz"))
        args = [f"--scan={scan}", *args[1:]]
    done = in_process(script, *shared, *args, cwd=workdir)
    expect_refusal(done, *phrases)
    assert not (workdir / "experiments/new").exists()


def test_checkpoint_selection_needs_validation_slices(workdir, in_process, tmp_path):
    shutil.copytree(workdir / "datasets/data/test", tmp_path / "data/test")
    done = in_process(TEST, "--dataset=phantom", f"--data_dir={tmp_path / 'data'}", "--select=validation", cwd=workdir)
    assert done.code == 2
    assert "--select validation needs validation slices" in done.stderr.splitlines()[-1]
