"""The README's way to a data set of one's own, taken step by step as it stands there."""

import csv
import json
import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest

# Axes to the right, the front and the top, 4 mm: on no grid that slices are cut from.
AFFINE = nibabel.affines.from_matvec(np.diag([4, 4, 4]), (-110, -110, -80))
SHAPE = (56, 58, 42)


@pytest.fixture(scope="module")
def section(repository) -> str:
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.search(r"^### Add your own data set$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]


def make_volume(path: Path, seed: int) -> None:
    """A brain with some texture; a ball where the path says lesion."""
    rng = np.random.default_rng(seed)
    away = np.moveaxis(np.indices(SHAPE), 0, -1) - np.divide(SHAPE, 2)
    brain = ((away / (17, 20, 16)) ** 2).sum(-1) < 1
    volume = np.where(brain, rng.integers(100, 900, SHAPE), 0).astype(np.int16)
    if "lesion" in path.name:
        volume = (((away - (6, 0, 0)) ** 2).sum(-1) < 25).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, AFFINE), path)


@pytest.fixture(scope="module")
def mine(section, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A working directory with the README's table and a cohort that fits it, and the README's commands."""
    folder = tmp_path_factory.mktemp("mine")
    table, text = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for line in text.splitlines()]
    path = folder / commands[0][commands[0].index("--csv") + 1]
    assert f"`{path.relative_to(folder)}`" in section
    path.parent.mkdir(parents=True)
    path.write_text(table)
    cells = {cell for row in csv.reader(table.splitlines()) for cell in row if cell.endswith(".nii.gz")}
    for seed, cell in enumerate(sorted(cells)):
        make_volume(path.parent / cell, seed)
    return folder, commands


def test_the_commands_of_the_readme_work(mine, as_subprocess, tiny, short):
    folder, commands = mine
    small = tuple(flag for flag in tiny if not flag.startswith(("--dataset", "--data_dir")))
    assert [Path(script).name for script, *_ in commands] == [
        "brats_preprocess.py",
        "modality_cyclic_train.py",
        "modality_cyclic_train.py",
        "modality_cyclic_test.py",
    ]
    for script, *args in commands:
        more = (*small, *short) if "train" in script else ("--workers", 1) if "brats" in script else ()
        repository = Path(__file__).parents[2]
        done = as_subprocess(repository / script, *args, *more, cwd=folder)
        assert done.code == 0, done.stderr

    slices = folder / "datasets/mine/slices"
    names = {part: sorted(path.name for path in (slices / part / "T2w").iterdir()) for part in ("train", "test")}
    assert names["train"] == sorted(f"control-{i}_T2w_{z}.npy" for i in (1, 2) for z in range(70, 90))
    assert len(names["test"]) == 1
    assert np.load(slices / "test/T2w" / names["test"][0]).shape == (240, 240)

    record = json.loads((folder / "experiments/unet_forward_brats_T2w_FLAIR/config.json").read_text())
    assert record["data"]["slices"] == 40
    assert record["data"]["grid"] == {"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [240, 240]}
    [metrics] = (folder / "experiments/results").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["n_slices"] == 1


def test_every_column_and_flag_is_in_the_readme(section):
    for column in ("subject", "seg", "brainmask", "healthy", "split"):
        assert f"| `{column}` |" in section
