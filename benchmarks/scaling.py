"""Time preprocessing, training and scoring with one process and with two, and measure preprocessing's memory.

All is done on phantoms in a temporary folder, with one thread a process, so that two have twice the cores of one.
What a process takes to start and to import is left out.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.timing import Run, check_at_least_one, median_seconds, print_table, ratio
from utils.cli import ArgumentParser, UserError, run

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH_SIZE = 32  # of training, over all processes, as in the paper
DEMO = ("--dataset=phantom", "--data_dir=slices", "--gpu_id=cpu")
TRAINING = (
    f"--config.score_model.training.batch_size={BATCH_SIZE}",
    "--config.score_model.sampling.timestep_respacing=1",  # of the example slice, which is not timed
)
MMCCD = "--model_name=diffusion"

# Calls the main function of a script and says how long a function of a module took.
TIMED = """
import importlib, sys, time
from utils.cli import run
_, script, module, name, *args = sys.argv
sys.argv = [script, *args]
script, module = map(importlib.import_module, (script, module))
work = getattr(module, name)
def timed(*args):
    start = time.perf_counter()
    result = work(*args)
    print("seconds:", time.perf_counter() - start)
    return result
setattr(module, name, timed)
run(script.main)
"""


def main() -> None:
    args = parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "timed.py").write_text(TIMED, encoding="utf-8")
        call(folder, "datasets/phantom.py", "--output_dir=phantoms", "--train=1", "--val=1", "--test=1")
        link_cohort(folder, "raw", args.subjects)
        preprocess(folder, "raw", "slices", workers=2)
        for flags in ((MMCCD,), ("--training_process=backward",)):  # for scoring to have something to chain
            one = ("--config.score_model.training.iterations=1", "--logdir=experiments")
            call(folder, "modality_cyclic_train.py", *DEMO, *TRAINING, *flags, *one)

        work = {
            "preprocessing": partial(time_preprocessing, folder),
            "training": partial(time_training, folder, args.steps),
            "scoring": partial(time_scoring, folder),
        }
        rows = [row(name, seconds, args.repeats) for name, seconds in work.items()]
        print(f"{args.subjects} subjects, {args.steps} steps of {BATCH_SIZE}; medians of {args.repeats} turns")
        print_table(["seconds", "1 process", "2 processes", "ratio"], rows)
        print("\nPeak memory of preprocessing with 2 workers, all its processes together")
        for n_subjects in args.memory_subjects:
            link_cohort(folder, f"raw{n_subjects}", n_subjects)
            peak = preprocess(folder, f"raw{n_subjects}", f"slices{n_subjects}", workers=2)
            print(f"{n_subjects} subjects: {peak / 2**20:,.0f} MiB", flush=True)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="turns of each side that the medians are taken over")
    add("--subjects", type=int, default=18, help="subjects that are preprocessed; all but two are scored")
    add("--steps", type=int, default=20, help="training steps of a turn")
    add("--memory_subjects", type=int, nargs=2, default=[10, 40], help="subjects that memory is measured over")
    args = parser.parse_args()
    check_at_least_one(args, "repeats")
    if min(args.subjects, *args.memory_subjects) < 3:
        raise UserError("give at least 3 subjects: one for training, one for validation, the others for testing")
    if args.steps < 2:
        raise UserError("--steps must be at least 2, since the first one warms up")
    return args


def row(name: str, seconds: Callable[[int], float], repeats: int) -> list[str]:
    """What some work takes in one process and in two, in turns: 1 2 1 2 …"""
    runs: dict[int, list[Run]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes, turns in runs.items():
            turns.append(Run(seconds(processes), peak_memory=0))
    return [name, *(f"{median_seconds(turns):.2f}" for turns in runs.values()), ratio(runs[1], runs[2])]


def time_preprocessing(folder: Path, workers: int) -> float:
    """Seconds for all subjects."""
    said = call(
        folder,
        "timed.py",
        *2 * ("datasets.brats_preprocess",),
        "preprocess",
        *preprocessing("raw", "again", workers),
    )
    return seconds_in(said)


def time_training(folder: Path, steps: int, processes: int) -> float:
    """Seconds of the steps of MMCCD's diffusion but the first one, as progress.csv tells them."""
    flags = (
        f"--config.score_model.training.iterations={steps}",
        f"--config.score_model.training.save_interval={steps}",
        "--config.score_model.training.log_interval=1",
        "--overwrite",
        "--logdir=trained",
    )
    call(folder, "modality_cyclic_train.py", *DEMO, MMCCD, *TRAINING, *flags, processes=processes)
    (path,) = (folder / "trained").glob("*/progress.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return sum(BATCH_SIZE / float(row["images_per_second"]) for row in list(csv.DictReader(file))[1:])


def time_scoring(folder: Path, processes: int) -> float:
    """Seconds that MMCCD takes for the error maps."""
    flags = (*DEMO, MMCCD, "--sampling=fast", "--logdir=experiments")
    return seconds_in(
        call(
            folder,
            "timed.py",
            "modality_cyclic_test",
            "scoring.scorer",
            "create_maps",
            *flags,
            processes=processes,
        )
    )


def seconds_in(said: str) -> float:
    return next(float(line.split()[1]) for line in said.splitlines() if line.startswith("seconds:"))


def preprocessing(raw: str, slices: str, workers: int) -> tuple[str, ...]:
    """The flags of preprocessing."""
    return (f"--data_dir={raw}", f"--output_dir={slices}", f"--workers={workers}", "--overwrite")


def preprocess(folder: Path, raw: str, slices: str, workers: int) -> int:
    """Preprocess a cohort; returns the peak memory of all processes together, in bytes (0 where there is no /proc)."""
    process = start(folder, "datasets/brats_preprocess.py", *preprocessing(raw, slices, workers))
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in family(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))
        time.sleep(0.02)
    finish(folder, process)
    return sum(peaks.values())


def family(pid: int) -> Iterator[int]:
    """A process, its children, theirs and so on."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended meanwhile
        return
    for child in children:
        yield from family(int(child))


def peak_of(pid: int) -> int:
    """The peak memory of a process so far, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def link_cohort(folder: Path, name: str, n_subjects: int) -> None:
    """A cohort of so many subjects, each a phantom under another name, with split lists: one, one and the rest."""
    phantoms = sorted(path for path in (folder / "phantoms").iterdir() if path.is_dir())
    names = [f"BraTS2021_{i:05d}" for i in range(n_subjects)]
    for i, subject in enumerate(names):
        phantom = phantoms[i % len(phantoms)]
        (folder / name / subject).mkdir(parents=True)
        for path in phantom.iterdir():
            (folder / name / subject / path.name.replace(phantom.name, subject)).symlink_to(path)
    for part, subjects in (("training", names[:1]), ("validation", names[1:2]), ("testing", names[2:])):
        (folder / name / f"brats_split_{part}.txt").write_text("\n".join(subjects) + "\n", encoding="utf-8")


def call(folder: Path, script: str, *flags: str, processes: int = 1) -> str:
    """Run a script of the repository, or of the folder, in the folder; returns what it said."""
    return finish(folder, start(folder, script, *flags, processes=processes))


def start(folder: Path, script: str, *flags: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = folder / script if (folder / script).exists() else REPOSITORY / script
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(path), *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )


def finish(folder: Path, process: subprocess.Popen) -> str:
    """What it said, when it is done.

    Raises:
        UserError: it failed.
    """
    said, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(process.args)} failed:\n{(folder / 'stderr').read_text()}")
    return said


if __name__ == "__main__":
    run(main)
