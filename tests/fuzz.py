"""Fuzz the files that the scripts read: each script must work or end with a one-line error, and damage no file.

    python tests/fuzz.py --minutes 10

In the test suite, hypothesis draws a few cases per kind of file (test_fuzz.py). A kind is a path, a function that
corrupts the file, and the commands that read it.
"""

import argparse
import copy
import gzip
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.cohorts import SPLITS
from datasets.splits import LIST_NAMES
from tests.scripts.conftest import SHORT, TINY, Done, run_here, write_random_slices

TRAIN, TEST, PREDICT = (f"modality_cyclic_{kind}.py" for kind in ("train", "test", "predict"))
DATA = ("--dataset=phantom", "--data_dir=datasets/data")
FORWARD, BACKWARD = "unet_forward_phantom_t2_flair", "unet_backward_phantom_t2_flair"
RESULTS = f"experiments/results/{FORWARD}__{BACKWARD}"
COMBINED = "experiments/results/combined__cyclic_unet+intensity__1f5382"
AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])

# Replacements for a value in a JSON file.
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        0.5,
        -0.5,
        10**7,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "\ud800",
    ),
    *([], {}, [[]], [1], ["x"], [None], {"x": 1}, [10**6, 10**6], "forward", "unet", [0], [0.1, "y"], "\n$_{"),
]


def make_place(folder: Path) -> None:
    """Fill a working directory: random slices, a trained and tested Cyclic UNet, a scan, and a preprocessed cohort."""
    rng = np.random.default_rng(0)
    write_random_slices(folder / "datasets/data", {"train": 2, "val": 1, "test": 2}, ("flair", "t2"), rng)
    once = (*TINY, *SHORT, "--config.score_model.training.iterations=1")
    import nibabel

    scan = np.zeros((48, 48, 3), np.int16)
    scan[12:36, 12:36] = rng.integers(100, 900, (24, 24, 3))
    nibabel.save(nibabel.Nifti1Image(scan, AFFINE), folder / "scan.nii.gz")
    seg = (scan > 500).astype(np.int16)
    seg[..., 0] = 0
    volumes = {"t2": scan, "flair": scan // 2, "seg": seg}
    for (split, name), (kind, volume) in product(zip(SPLITS, "ABC", strict=True), volumes.items()):
        (folder / f"raw/{name}").mkdir(parents=True, exist_ok=True)
        volume = volume if kind == "seg" else volume + np.int16(ord(name)) * (volume > 0)
        nibabel.save(nibabel.Nifti1Image(volume, AFFINE), folder / f"raw/{name}/{name}_{kind}.nii.gz")
        (folder / f"raw/{LIST_NAMES[split]}").write_text(name)
    row = ("A", *(f"raw/A/A_{kind}.nii.gz" for kind in volumes), "no", "test")
    (folder / "cohort.csv").write_text("subject,t2,flair,seg,healthy,split\n" + ",".join(row))
    for command in (
        PREPROCESS,
        (TRAIN, *once),
        (TRAIN, *once, "--training_process=backward"),
        (TEST, *DATA),
        (TEST, "--combine", RESULTS, "intensity"),
        PREDICTION_AGAIN,
    ):
        done = run_here(*command, cwd=folder)
        assert done.code == 0, done.stderr


def spoil_json(text: str, rng: random.Random) -> str:
    """Replace, delete or add values, truncate the text, or nest it deeply."""
    how = rng.random()
    if how < 0.05:
        return text[: rng.randrange(len(text))]
    if how < 0.08:
        return rng.choice(["[" * 100_000, "null", "7", '"x"', "[]", "{}", "", "\x00", text + text])
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        parent = tree
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = rng.choice(keys) if keys else None
            if key is None:
                break
            if isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
                parent = parent[key]
                continue
            if isinstance(parent, dict) and rng.random() < 0.15:
                del parent[key]
            elif isinstance(parent, dict) and rng.random() < 0.1:
                parent[rng.choice(["x", "", "y.z"])] = copy.deepcopy(rng.choice(ODD))
            else:
                parent[key] = copy.deepcopy(rng.choice(ODD))
            break
    return json.dumps(tree)


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncate, insert bytes or overwrite some."""
    data = bytearray(data)
    how = rng.random()
    if how < 0.2:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if how < 0.3:
        position = rng.randrange(len(data))
        return bytes(data[:position] + rng.randbytes(rng.randrange(1, 40)) + data[position:])
    # Headers and indices are at the beginning and the end of a file.
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        position = rng.choice(
            [rng.randrange(len(data)), rng.randrange(min(400, len(data))), -1 - rng.randrange(min(400, len(data)))]
        )
        data[position] = rng.randrange(256)
    return bytes(data)


def spoil_json_file(path: Path, rng: random.Random) -> None:
    path.write_bytes(spoil_json(path.read_text(encoding="utf-8"), rng).encode("utf-8", "replace"))


def spoil_file(path: Path, rng: random.Random) -> None:
    path.write_bytes(spoil_bytes(path.read_bytes(), rng))


def spoil_nifti(path: Path, rng: random.Random) -> None:
    """Corrupt mostly the uncompressed data: gzip's checksum detects any change to the compressed bytes."""
    data = path.read_bytes()
    compressed = rng.random() < 0.8
    path.write_bytes(gzip.compress(spoil_bytes(gzip.decompress(data), rng)) if compressed else spoil_bytes(data, rng))


def spoil_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Change the type, shape or range, or set all values to NaN."""
    ways: list[Callable[[np.ndarray], np.ndarray]] = [
        *(lambda a, kind=kind: a.astype(kind) for kind in ("i1", "c8", "S3", "U3", "f2", "f8", "?", "O", "M8[s]")),
        lambda a: a[..., :-1] if a.ndim else a,
        lambda a: a[:0] if a.ndim else a,
        lambda a: a[None],
        lambda a: a.reshape(-1),
        lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else a,
        lambda a: a * np.float32(1e30) if a.dtype.kind == "f" else a,
        lambda a: np.zeros_like(a),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(a.dtype.newbyteorder()),
    ]
    try:
        return rng.choice(ways)(array)
    except (TypeError, ValueError):
        return array[:0] if array.ndim else array


def spoil_npy(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        spoil_file(path, rng)
    else:
        np.save(path, spoil_array(np.load(path), rng))


def spoil_npz(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        spoil_file(path, rng)
        return
    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(sorted(arrays))
    if name == "run" or rng.random() < 0.3:
        arrays["run"] = np.array(spoil_json(str(arrays["run"]), rng).encode("utf-8", "replace").decode())
    elif rng.random() < 0.15:
        del arrays[name]
    else:
        arrays[name] = spoil_array(arrays[name], rng)
    np.savez_compressed(path, **arrays)


def spoil_pt(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        spoil_file(path, rng)
        return
    state = torch.load(path, weights_only=True)
    name = rng.choice(sorted(state, key=str))
    odd = [None, "x", 3, [], {}, torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, dtype=torch.complex64)]
    if rng.random() < 0.2:
        del state[name]
    elif rng.random() < 0.4 and isinstance(state[name], torch.Tensor) and state[name].is_floating_point():
        state[name] = state[name] * float("nan")
    else:
        state[name] = rng.choice(odd)
    torch.save(state if rng.random() < 0.9 else rng.choice(odd), path)


def spoil_csv(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        spoil_file(path, rng)
        return
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(["", "nan", "inf", "x", '"', "1e999", "-1", "$", "\x00", "0.5,0.5"])
    path.write_text("\n".join(",".join(row) for row in rows))


PREPROCESS = (
    *("datasets/brats_preprocess.py", "--output_dir=own", "--workers=1"),
    *("--data_dir=raw", "--modality=t2,flair", "--slices", "0", "3"),
)
TABLE = ("datasets/brats_preprocess.py", "--output_dir=other", "--workers=1", "--csv=cohort.csv", "--modality=t2")
TRAINING_ON_IT = (TRAIN, *TINY, *SHORT, "--data_dir=own", "--experiment_name=own")
PREDICTION = (PREDICT, "--dataset=phantom", "--scan=scan.nii.gz", "--output_dir=out")
PREDICTION_AGAIN = (*PREDICTION, "--output_dir=predicted")
COMBINED_PREDICTION = (*PREDICTION, f"--combined={COMBINED}")
RESCORE = (TEST, "--rescore", RESULTS)
KINDS: dict[str, tuple[str, Callable[[Path, random.Random], None], tuple[tuple[str, ...], ...]]] = {
    "config.json": (
        f"experiments/{FORWARD}/config.json",
        spoil_json_file,
        ((TEST, *DATA, "--logdir=experiments"), (TRAIN, *TINY, *SHORT), PREDICTION),
    ),
    "metrics.json": (f"{RESULTS}/metrics.json", spoil_json_file, (PREDICTION, ("evaluation.tables", RESULTS))),
    "combined.json": (f"{COMBINED}/metrics.json", spoil_json_file, (COMBINED_PREDICTION,)),
    "combined runs": (f"{RESULTS}/metrics.json", spoil_json_file, ((TEST, "--combine", RESULTS, "intensity"),)),
    "error_maps.npz": (f"{RESULTS}/error_maps.npz", spoil_npz, (RESCORE,)),
    "slices": ("datasets/data/test/flair/S4_flair_80.npy", spoil_npy, ((TEST, *DATA),)),
    "ema.pt": (f"experiments/{BACKWARD}/ema_0.5_000001.pt", spoil_pt, ((TEST, *DATA),)),
    "opt.pt": (
        f"experiments/{BACKWARD}/opt000001.pt",
        spoil_pt,
        ((TRAIN, *TINY, *SHORT, "--training_process=backward"),),
    ),
    "per_slice.csv": (f"{RESULTS}/per_slice.csv", spoil_csv, ((TEST, "--compare", RESULTS, RESULTS),)),
    "scan.nii.gz": ("scan.nii.gz", spoil_nifti, (PREDICTION,)),
    "result.nii.gz": ("predicted/scan_anomaly.nii.gz", spoil_nifti, (PREDICTION_AGAIN,)),
    "volume.nii.gz": ("raw/C/C_t2.nii.gz", spoil_nifti, ((*PREPROCESS, "--output_dir=other"),)),
    "cohort.csv": ("cohort.csv", spoil_csv, (TABLE,)),
    "subject.json": ("own/subjects/A.json", spoil_json_file, (PREPROCESS, TRAINING_ON_IT)),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in contents(folder).items():
        if files.get(name) != data:
            (folder / name).unlink()
    for name, data in files.items():
        if not (folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def complaint(done: Done, before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """Return a description of the failure, or "" if the command worked or refused with one error line."""
    # An error may follow a progress bar, which ends with a carriage return.
    lines = [line for line in (line.rpartition("\r")[2] for line in done.stderr.split("\n")) if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    if done.code not in (0, 1, 2) or "Traceback" in done.stderr:  # 1: a subject was skipped, the others were processed
        return f"exit code {done.code}: {done.stderr[-2000:]}"
    if done.code and len(errors) != 1:
        return f"not one sentence: {lines}"
    logs = ("log.txt", "events.out.tfevents")  # failures are logged, too
    changed = [name for name in before | after if of_a_run(name, before) != of_a_run(name, after)]
    changed = [name for name in changed if not Path(name).name.startswith(logs)]
    if done.code == 2 and changed:
        return f"refused, but changed {changed}: {errors}"
    return ""


def of_a_run(name: str, files: dict[str, bytes]) -> Any:
    """Return a file's content without the "run" record of command, machine and time."""
    data = files.get(name)
    try:
        record = json.loads(data or b"")
    except (ValueError, RecursionError):
        return data
    return {key: value for key, value in record.items() if key != "run"} if isinstance(record, dict) else data


def fuzz(kind: str, workdir: Path, rng: random.Random) -> tuple[Done, str]:
    """Corrupt a file of this kind at random, run a command that reads it, and restore all files."""
    path, corrupt, commands = KINDS[kind]
    original = contents(workdir)
    try:
        corrupt(workdir / path, rng)
        before = contents(workdir)
        pictures = kind in ("error_maps.npz", "scan.nii.gz")  # kinds that figures are drawn from
        done = run_here(*rng.choice(commands), cwd=workdir, pictures=pictures)
        return done, complaint(done, before, contents(workdir))
    finally:
        restore(workdir, original)


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoil the files that the scripts read, and see how the scripts end.")
    parser.add_argument("--minutes", type=float, default=10, help="for each kind of file")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of files")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_place(Path(folder))
        for kind in args.kinds:
            ends, found, seed = time.monotonic() + 60 * args.minutes, 0, args.seed
            worked = 0
            while time.monotonic() < ends:
                done, wrong = fuzz(kind, Path(folder), random.Random(seed))
                worked += done.code == 0
                if wrong:
                    found += 1
                    print(f"{kind}, seed {seed}: {wrong}\n", flush=True)
                seed += 1
            print(f"{kind}: {seed - args.seed} cases, {worked} worked, {found} wrong", flush=True)


if __name__ == "__main__":
    main()
