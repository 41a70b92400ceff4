"""Time preprocessing, training and scoring with one process and with two, and measure preprocessing's memory.

Everything runs on phantoms in a temporary folder, with one thread a process, so that two processes use twice the cores
of one. The start of the processes and their imports are not included.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.plan import REPOSITORY
from benchmarks.shared.script import create_parser, print_table, require_at_least
from benchmarks.shared.timing import Run, median_seconds, memory_peak_of, ratio, take_turns
from utils.cli import UserError, run

BATCH_SIZE = 32  # of training, over all processes, as in the paper
DEMO = ("--dataset=phantom", "--data_dir=slices", "--gpu_id=cpu")
TRAINING = (
    f"--config.score_model.training.batch_size={BATCH_SIZE}",
    "--config.score_model.sampling.timestep_respacing=1",  # of the example slice, which is not timed
)
MMCCD = "--model_name=diffusion"

# Calls the main function of a script and prints the duration of a function of a module.
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
        n_test = max(args.subjects, *args.memory_subjects) - 2
        call(folder, "datasets/phantom.py", "--output_dir=phantoms", "--train=1", "--val=1", f"--test={n_test}")
        link_cohort(folder, "raw", args.subjects)
        preprocess(folder, "raw", "slices")
        for flags in ((MMCCD,), ("--training_process=backward",)):  # the networks that scoring chains
            one = ("--config.score_model.training.iterations=1", "--logdir=experiments")
            call(folder, "modality_cyclic_train.py", *DEMO, *TRAINING, *flags, *one)

        rows = []
        for work in (time_preprocessing, time_training, time_scoring):
            sides = {processes: partial(work, folder, args.steps, processes) for processes in (1, 2)}
            one, two = take_turns(sides, args.repeats).values()
            seconds = (f"{median_seconds(turns):.2f}" for turns in (one, two))
            rows.append([work.__name__.removeprefix("time_"), *seconds, ratio(one, two)])
        print(f"{args.subjects} subjects, {args.steps} steps of {BATCH_SIZE}; medians of {args.repeats} turns")
        print_table(["seconds", "1 process", "2 processes", "ratio"], rows)
        print("\nPeak memory of preprocessing with 2 workers, all its processes together")
        for n_subjects in args.memory_subjects:
            link_cohort(folder, f"raw{n_subjects}", n_subjects)
            peak = preprocess(folder, f"raw{n_subjects}", f"slices{n_subjects}")
            print(f"{n_subjects} subjects: {peak / 2**20:,.0f} MiB", flush=True)


def parse_args() -> argparse.Namespace:
    subjects, steps = (18, "subjects to preprocess; all but two are scored"), (20, "training steps of a turn")
    parser = create_parser(__doc__, repeats=3, subjects=subjects, steps=steps)
    measured = "numbers of subjects to measure memory with"
    parser.add_argument("--memory_subjects", type=int, nargs=2, default=[10, 40], help=measured)
    args = parser.parse_args()
    require_at_least(args, repeats=1, steps=2)  # the first step warms up
    if min(args.subjects, *args.memory_subjects) < 3:
        raise UserError("give at least 3 subjects: one for training, one for validation, the others for testing")
    return args


def time_preprocessing(folder: Path, steps: int, processes: int) -> Run:
    """Time all subjects."""
    script = "datasets.brats_preprocess"
    return time_call(folder, script, script, "preprocess", *preprocessing_flags("raw", "again", processes))


def time_training(folder: Path, steps: int, processes: int) -> Run:
    """Time the steps of MMCCD's diffusion except the first one, as recorded in progress.csv."""
    training = {"iterations": steps, "save_interval": steps, "log_interval": 1}
    flags = [f"--config.score_model.training.{key}={value}" for key, value in training.items()]
    flags += [*DEMO, MMCCD, *TRAINING, "--overwrite", "--logdir=trained"]
    call(folder, "modality_cyclic_train.py", *flags, processes=processes)
    (path,) = (folder / "trained").glob("*/progress.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return Run(sum(BATCH_SIZE / float(row["images_per_second"]) for row in list(csv.DictReader(file))[1:]))


def time_scoring(folder: Path, steps: int, processes: int) -> Run:
    """Time MMCCD's error maps."""
    work = ("modality_cyclic_test", "scoring.scorer", "create_maps", *DEMO, MMCCD)
    return time_call(folder, *work, "--sampling=fast", "--logdir=experiments", processes=processes)


def time_call(folder: Path, script: str, module: str, function: str, *flags: str, processes: int = 1) -> Run:
    """Run a script and time one function."""
    output = call(folder, "timed.py", script, module, function, *flags, processes=processes)
    return Run(next(float(line.split()[1]) for line in output.splitlines() if line.startswith("seconds:")))


def preprocessing_flags(raw: str, slices: str, workers: int) -> tuple[str, ...]:
    return (f"--data_dir={raw}", f"--output_dir={slices}", f"--workers={workers}", "--overwrite")


def preprocess(folder: Path, raw: str, slices: str) -> int:
    """Preprocess a cohort; return the peak memory of all processes together, in bytes (0 without /proc)."""
    process = start(folder, "datasets/brats_preprocess.py", *preprocessing_flags(raw, slices, workers=2))
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in family(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), memory_peak_of(pid))
        time.sleep(0.02)
    finish(folder, process)
    return sum(peaks.values())


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended in the meantime
        return
    for child in children:
        yield from family(int(child))


def link_cohort(folder: Path, name: str, n_subjects: int) -> None:
    """Link the first `n_subjects` phantoms: one subject for training, one for validation, the rest for test."""
    phantoms = sorted(path for path in (folder / "phantoms").iterdir() if path.is_dir())[:n_subjects]
    names = [phantom.name for phantom in phantoms]
    (folder / name).mkdir()
    for phantom in phantoms:
        (folder / name / phantom.name).symlink_to(phantom)
    for part, subjects in (("training", names[:1]), ("validation", names[1:2]), ("testing", names[2:])):
        (folder / name / f"brats_split_{part}.txt").write_text("\n".join(subjects) + "\n", encoding="utf-8")


def call(folder: Path, script: str, *flags: str, processes: int = 1) -> str:
    """Run a script of the repository, or of the folder, in the folder; return its output."""
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
    """Wait for a process and return its output.

    Raises:
        UserError: if it failed.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{' '.join(process.args)} failed:\n{(folder / 'stderr').read_text()}")
    return output


if __name__ == "__main__":
    run(main)
