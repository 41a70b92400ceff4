"""The benchmark scripts at the demo's size: output and equivalence of both sides, not times."""

import contextlib
import csv
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import config as configs
from benchmarks import gpu, phantom_fidelity, scoring, training
from benchmarks.shared import plan, timing, work
from datasets import phantom
from models.sampling import SAMPLING
from tests.scripts.conftest import GRID, run_here
from utils import recording

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ("--gpu_id", "cpu", "--dataset", "phantom", "--repeats", "1", "--batch_size", "1")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_benchmark(name: str, *args: str) -> subprocess.CompletedProcess:
    script = str(REPOSITORY / "benchmarks" / f"{name}.py")
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)


RATIOS = {"scoring": ["plain / optimised", "plain / paper", "plain / fast"], "training": ["plain / optimised"]}


@pytest.mark.parametrize(("name", "ratios"), RATIOS.items())
def test_benchmarks_print_their_ratios(name, ratios):
    done = run_benchmark(name, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.findall(r"^(.* / .*): [\d.]+ \([\d.]+ … [\d.]+\)$", done.stdout, re.MULTILINE) == ratios
    assert len(re.findall(r"[1-9]\d* MiB$", done.stdout, re.MULTILINE)) == (5 if name == "scoring" else 2)


def test_training_counts_fewer_calls_with_bfloat16_weights(capsys):
    training.print_calls(configs.get_config("phantom"))
    found = re.search(r"CPU: ([\d,]+) with autocast, ([\d,]+) with bfloat16 weights$", capsys.readouterr().out.strip())
    with_autocast, with_weights = (int(number.replace(",", "")) for number in found.groups())
    assert 200 < with_weights < 0.9 * with_autocast


def test_calls_are_counted_without_views():
    x = torch.ones(4, 3, requires_grad=True)
    assert timing.count_calls(lambda: x.detach().view(2, 6).t()) == 0
    assert timing.count_calls(lambda: (x * 2).view(-1) + 1) == 2
    assert timing.count_calls(lambda: torch.autograd.grad((3 * x).exp().sum(), x)) >= 5  # 3 forward, 2 backward


def test_gpu_needs_one():
    done = run_benchmark("gpu", "--gpu_id=cpu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device to measure" in done.stderr


def test_gpu_measures_every_way_of_computing(monkeypatch, capsys):
    """On the CPU, where nothing is recorded or compiled, and without processes."""
    plain_calls, turns = [], []

    @contextlib.contextmanager
    def start_here(device, sides, in_a_row=1, environments=None):
        ((side, prepare),) = sides.items()
        with monkeypatch.context() as patched:
            patched.setattr(recording, "PLAIN_CALLS", recording.PLAIN_CALLS)  # restored afterwards
            work = prepare()
            plain_calls.append((side, recording.PLAIN_CALLS > 3))

            def turn(*args):
                turns.append(work(*args))
                return timing.Run(0.5, 2**20)

            yield {side: turn}

    monkeypatch.setattr(timing, "start_workers", start_here)
    monkeypatch.setattr(gpu, "count_kernels", lambda *args: 1234)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--repeats=1", "--batch_size=1", "--pass_sizes", "2", "--slices=1"])
    config = configs.get_config("phantom")
    config.data.image_size, device = 16, torch.device("cpu")
    gpu.measure(gpu.parse_args(), config, device, 1e12, {})
    table = capsys.readouterr().out
    hows = ["plain", "recorded", "compiled and recorded", "compiled, from the cache"]
    named = [f"{work}, {how}" for work in ("step of 1", "pass of 2") for how in hows]
    assert [name for name in named if re.search(rf"^{name}  +50\.00 ", table, re.MULTILINE)] == named
    assert plain_calls == [(how, how == "plain") for how in hows] * 2
    assert table.count("1,234") == 2
    monkeypatch.setitem(SAMPLING, "paper", ("2", 1, "errors", "none"))
    gpu.measure_slices(gpu.parse_args(), config, device)
    rows = re.findall(r"^(fast|paper) +[\d,]+ +0\.500 ", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["fast", "paper"]


def test_neighbours_times_both_spin_limits_idle_and_busy():
    done = run_benchmark("neighbours", "--repeats=1", "--steps=1", "--neighbours=1", "--batch_size=1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+, \w+) +([\d.]+) +[\d.]+ \([\d.]+ … [\d.]+\)$", done.stdout, re.MULTILINE)
    sides = [f"{work}, {spins}" for work in ("training", "scoring") for spins in ("default", "10000")]
    assert [name for name, _ in rows] == sides * 2
    assert all(float(speed) > 0 for _, speed in rows)


def test_scaling_prints_its_ratios_and_memory():
    tiny = ("--repeats=1", "--subjects=3", "--steps=2", "--memory_subjects", "3", "4")
    done = run_benchmark("scaling", *tiny)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+)  .*  [\d.]+ \([\d.]+ … [\d.]+\)$", done.stdout, re.MULTILINE)
    assert found == ["preprocessing", "training", "scoring"]
    assert re.findall(r"^(\d) subjects: [1-9]\d* MiB$", done.stdout, re.MULTILINE) == ["3", "4"]


@pytest.fixture
def slices(write_slices, tmp_path) -> Path:
    """One slice for each split, with a lesion in the last two."""
    images = torch.rand(3, 4, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    brain = np.pad(np.ones((40, 40), np.uint8), 12)
    lesion = np.pad(np.ones((8, 8), np.uint8), 28)
    for split, (flair, t2, *_) in zip(("train", "val", "test"), images, strict=True):
        images = {"flair": np.where(brain, flair + 3 * lesion, -3), "t2": np.where(brain, t2, -3)}
        shown = {**images, "seg": lesion * (split != "train"), "brainmask": brain}
        write_slices(tmp_path / "slices", split, {kind: {(split, 1): image} for kind, image in shown.items()})
    return tmp_path / "slices"


@pytest.fixture
def small_grid(monkeypatch) -> None:
    """Let validation slices choose among a tenth of the scores."""
    config = configs.get_config("phantom")
    configs.override(config, GRID)
    monkeypatch.setitem(configs.CONFIGS, "phantom", config.copy_and_resolve_references)


@pytest.fixture
def trainings_here(monkeypatch, tmp_path) -> None:
    """Train in this process and thread, which saves the imports of a process for each network."""

    pool = contextlib.nullcontext(mock.Mock(map=map))

    def run(command: list, **_: object) -> subprocess.CompletedProcess:
        done = run_here("modality_cyclic_train.py", *command[2:], cwd=tmp_path)
        return subprocess.CompletedProcess(command, done.code, done.stdout, done.stderr)

    monkeypatch.setattr(plan, "ThreadPoolExecutor", lambda workers: pool)
    monkeypatch.setattr(plan, "subprocess", mock.Mock(run=run))


def test_a_second_learning_curve_run_reuses_the_first(slices, trainings_here, tmp_path):
    flags = [f"--data_dir={slices}", "--gpu_id=cpu", f"--logdir={tmp_path / 'curve'}", "--workers=2", "--saves=2"]
    flags += [f"--csv={tmp_path / 'curve.csv'}", f"--figure={tmp_path / 'curve.png'}", "--seeds", "1"]
    for _ in range(2):
        steps = ("--unet_iterations=2", "--diffusion_iterations=2")
        done = run_here("benchmarks/learning_curve.py", *flags, *steps, cwd=tmp_path)
        assert done.code == 0, done.stderr
        rows = read_rows(tmp_path / "curve.csv")
        points = {(row["split"], row["method"], int(row["steps"])) for row in rows}
        assert len(rows) == len(points)
        assert points == {
            *((split, "intensity", 0) for split in ("val", "test")),
            *(("val", method, s) for method in ("cyclic_unet", "mmccd", "mmccd_errors") for s in (1, 2)),
            *(("test", method, 2) for method in ("cyclic_unet", "mmccd", "mmccd_errors")),
        }
        assert all(0 < float(row["auprc"]) <= 1 for row in rows)
        assert "Cyclic UNet" in done.stdout
    assert "pass/s" not in done.stderr  # the second run only reads the CSV
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_scores_prints_the_gain_of_the_chosen_score(slices, small_grid, tmp_path):
    flags = (f"--data_dir={slices}", "--test", str(slices), "--gpu_id=cpu", "--seeds", "1", "--iterations=1")
    flags += ("--methods", "dae", "cyclic_unet", "--cycles", "flair:t2", "--workers=2", "--draws=0")
    flags += (f"--logdir={tmp_path / 'all'}", f"--maps={tmp_path / 'maps'}")
    for _ in range(2):
        done = run_here("benchmarks/scores.py", *flags, cwd=tmp_path)
        assert done.code == 0, done.stderr
        for method in ("intensity", "dae", "cyclic_unet"):
            values = re.findall(rf"^flair +{method} +([\d.]+) +([\d.]+) ", done.stdout, re.MULTILINE)
            assert values, done.stdout
            assert all(0 < float(value) <= 1 for value in values[0])
            assert f"flair, {method}, seed 1: " in done.stdout
        assert re.search(r"^flair +dae +without match +[\d.]+ +[+-]", done.stdout, re.MULTILINE)
        assert re.search(r"^flair +combined +[\d.]+ ", done.stdout, re.MULTILINE)
    assert "pass/s" not in done.stderr  # the second run reads the maps of the first


def test_a_second_comparison_reuses_the_first(slices, small_grid, trainings_here, tmp_path):
    flags = [f"--data_dir={slices}", "--gpu_id=cpu", f"--logdir={tmp_path / 'all'}", "--seeds", "1", "--iterations=1"]
    flags += [f"--csv={tmp_path / 'all.csv'}", f"--figure={tmp_path / 'all.png'}", "--workers=2"]
    flags += ["--cycles", "flair:t2", "t2:flair"]
    methods = ("dae", "cyclic_histogram", "cyclic_unet", "mmccd", "one_way_unet")
    for which in (methods, ["cyclic_unet"]):
        done = run_here("benchmarks/comparison.py", *flags, "--methods", *which, cwd=tmp_path)
        assert done.code == 0, done.stderr
        rows = read_rows(tmp_path / "all.csv")
        settings = {(row["input"], row["method"], row["smooth"]) for row in rows}
        assert len(rows) == len(settings) == 2 * 3 * (len(methods) + 1)  # 2 inputs, 3 scores, and the intensity
        assert {row["method"] for row in rows} == {*methods, "intensity"}
        assert all(0 < float(row["auprc"]) <= 1 for row in rows)
        assert len(read_rows(tmp_path / "all_subjects.csv")) == len(rows)  # one test subject each
        assert re.search(r"^flair → t2 → flair, as it is$", done.stdout, re.MULTILINE)
        assert f"{8 if which is methods else 2} trainings, " in done.stdout  # both cycles share two UNets
    assert "2 trainings, 0 of them to be done" in done.stdout
    assert "pass/s" not in done.stderr  # the second run only reads the CSV
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_time_and_memory_of_whole_scans(tmp_path):
    flags = ["--subjects", "2", "--val", "0", "--slices", "3", "--image_size", "32", "--folder", str(tmp_path)]
    done = run_benchmark("subjects", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2 +6 +0\.\d+ +\d+ +[\d.]+ +0\.\d+$", done.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_explained_variance_equals_the_closed_form():
    a, noise = np.random.default_rng(0).standard_normal((2, 100_000))
    assert phantom_fidelity.explained(a, np.cos(a)) == pytest.approx(1, abs=0.02)  # for any function of a
    assert phantom_fidelity.explained(a, noise) == pytest.approx(0, abs=0.002)
    for share in (0.2, 0.7):
        b = np.sqrt(share) * a + np.sqrt(1 - share) * noise
        assert phantom_fidelity.explained(a, b) == pytest.approx(share, abs=0.02)


def test_the_phantom_is_compared_with_patients(tmp_path):
    phantom.write_cohort(tmp_path, {"train": 2, "val": 0, "test": 0}, seed=0, workers=2)
    done = run_here("benchmarks/phantom_fidelity.py", tmp_path, cwd=tmp_path)
    assert done.code == 0, done.stderr
    rows = re.findall(r"^(.+?) {2,}(-?[\d.]+) \(.* … .*\) +(-?[\d.]+) \(", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == list(phantom_fidelity.PATIENTS)
    for name, ours, patients in rows:
        assert float(patients) == phantom_fidelity.PATIENTS[name][0]
        assert -1 <= float(ours) <= 1 or name.startswith("sd")
    by_name = {name: float(ours) for name, ours, _ in rows}
    assert by_name["R2(t2|flair)"] < 0.6  # 0.77 if all modalities were recolourings of one map
    (tmp_path / "BraTS2021_00000/BraTS2021_00000_t2.nii.gz").unlink()
    done = run_here("benchmarks/phantom_fidelity.py", tmp_path, cwd=tmp_path)
    assert done.code == 2
    assert "BraTS2021_00000_t2.nii.gz" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "flag", "said"),
    [
        ("scoring", "--repeats=0", "--repeats must be at least 1, got 0"),
        ("subjects", "--image_size=8", "--image_size must be at least 32, got 8"),
        ("training", "--dataset=brat", "did you mean 'brats'?"),
        ("scoring", "--gpu_id=first", "neither a number nor cpu"),
    ],
)
def test_invalid_flags_give_a_one_line_error(name, flag, said):
    done = run_benchmark(name, flag)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_help_imports_nothing_slow(script):
    code = (
        "import runpy, sys, atexit\n"
        "slow = {'torch', 'monai', 'ml_collections', 'absl'}\n"
        "atexit.register(lambda: print('imported:', sorted(slow & set(sys.modules))))\n"
        f"sys.argv = ['{script.name}', '--help']\n"
        f"runpy.run_path('{script}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout
    assert "(default: " in done.stdout


# ----------------------------------------------------------------------------------------------------------
# Both sides compute the same

CPU = torch.device("cpu")


@pytest.fixture
def exact_config():
    """The demo's config, which has no dropout, in float32 with 2 attention heads."""
    config = configs.get_config("phantom")
    config.precision = "float32"
    config.score_model.model.num_heads = 2
    return config


def test_both_sides_compute_the_same_pass(exact_config):
    torch.manual_seed(0)
    exact_config.score_model.training.batch_size = 2
    plain, optimised = (
        prepare(exact_config, 2, CPU)() for prepare in (scoring.prepare_plain_pass, work.prepare_optimised_pass)
    )
    assert plain.std() > 1e-3
    torch.testing.assert_close(plain, optimised, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_both_sides_score_the_same_slice(exact_config, preset):
    part = scoring.part_of(scoring.whole_sweep(exact_config, preset), 3)
    plain = scoring.prepare_plain_score(part, CPU)()
    optimised = scoring.prepare_optimised_score(part, CPU, 2)()
    assert plain.std() > 1e-2
    torch.testing.assert_close(plain, optimised, rtol=1e-4, atol=1e-4)


def test_both_sides_have_the_same_training_losses(exact_config):
    exact_config.score_model.training.batch_size = 2
    plain, optimised = (
        prepare(exact_config, 2, CPU) for prepare in (training.prepare_plain_step, work.prepare_optimised_step)
    )
    for _ in range(2):
        assert plain().item() == pytest.approx(optimised().item(), abs=1e-4)
