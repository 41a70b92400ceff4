"""README and docs: commands run as written, links resolve, and pages stay short."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("docs")  # one process, so that its cohorts are made once

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OWN_DATA = "datasets/mine"  # in commands that need the reader's own cohort

# Flags that scale the documented commands down from a real cohort and a GPU to a test.
SMALL = {
    "phantom.py": ("--train=1", "--val=1", "--test=1", "--workers=1"),
    "brats_preprocess.py": ("--workers=1",),
    "modality_cyclic_predict.py": ("--slices", 76, 78),
}

# RAS axes and voxels of 4 mm, so that preprocessing has to resample.
AFFINE = nibabel.affines.from_matvec(np.diag([4, 4, 4]), (-110, -110, -80))
SHAPE = (56, 58, 42)


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every `python` command in a page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_a_page_is_short_and_its_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= (12_000 if page.name == "README.md" else 8_000)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


@pytest.fixture(scope="module")
def cohort(workspace, tmp_path_factory) -> Path:
    """A working directory with a cohort named like BraTS 2021, and scans for prediction."""
    folder = tmp_path_factory.mktemp("reader")
    [raw] = [path for path in (workspace / "datasets").iterdir() if path.name.startswith("RSNA")]
    (folder / "datasets").mkdir()
    (folder / "datasets" / raw.name).symlink_to(raw)
    for package in ("evaluation", "models", "utils"):  # for `python -m`, which readers run in the repository
        (folder / package).symlink_to(REPOSITORY / package)
    (folder / "folder_of_scans").mkdir()
    scan = sorted(raw.glob("*/*_flair.nii.gz"))[-1]
    for copy in ("patient_flair.nii.gz", "folder_of_scans/scan.nii.gz"):
        shutil.copy(scan, folder / copy)
    return folder


def test_the_commands_run_as_written(cohort, in_process, as_subprocess, tiny, short):
    """Run README, then the pages in the order of its links; benchmarks have their own tests."""
    readme, *docs = PAGES
    text = readme.read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in text for page in docs)
    network = [flag for flag in tiny if not flag.startswith(("--dataset", "--data_dir"))]
    # 16 px, because the paper's sampling runs here with all its steps and bands.
    sizes = SMALL | {"modality_cyclic_train.py": (*network, "--config.data.image_size=16", *short)}
    run = []
    for page in (readme, *sorted(docs, key=lambda page: text.index(f"docs/{page.name}"))):
        for script, *args in commands(page):
            if script.startswith("benchmarks/") or OWN_DATA in " ".join(args) or "patch" in args:
                continue
            name = Path(script).name
            command = as_subprocess if script == "-m" else in_process
            done = command(script, *args, *sizes.get(name, ()), cwd=cohort)
            assert done.code == 0, f"{page.name}: {script} {args}\n{done.stderr}"
            run.append(name)
    assert {*sizes, "modality_cyclic_test.py", "split_traintest.py", "-m"} <= set(run)


def read_section(title: str) -> str:
    text = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
    return re.search(rf"^## {title}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]


def make_volume(path: Path, seed: int) -> None:
    """Write a textured brain, or a ball if the file name contains `lesion`."""
    rng = np.random.default_rng(seed)
    away = np.moveaxis(np.indices(SHAPE), 0, -1) - np.divide(SHAPE, 2)
    brain = ((away / (17, 20, 16)) ** 2).sum(-1) < 1
    volume = np.where(brain, rng.integers(100, 900, SHAPE), 0).astype(np.int16)
    if "lesion" in path.name:
        volume = (((away - (6, 0, 0)) ** 2).sum(-1) < 25).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, AFFINE), path)


def make_cohort(section: str, folder: Path) -> list[list[str]]:
    """Write the table of a section of data.md and the volumes it lists; return the section's commands."""
    table, text = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for line in text.splitlines()]
    path = folder / commands[0][commands[0].index("--csv") + 1]
    assert f"`{path.relative_to(folder)}`" in section
    path.parent.mkdir(parents=True)
    path.write_text(table)
    cells = {cell for row in csv.reader(table.splitlines()) for cell in row if cell.endswith(".nii.gz")}
    for seed, cell in enumerate(sorted(cells)):
        make_volume(path.parent / cell, seed)
    return commands


def test_the_commands_for_your_own_data_set(tmp_path, in_process, tiny, short):
    folder, commands = tmp_path, make_cohort(read_section("Add your own data set"), tmp_path)
    small = tuple(flag for flag in tiny if not flag.startswith(("--dataset", "--data_dir")))
    assert [Path(script).name for script, *_ in commands] == [
        "brats_preprocess.py",
        "modality_cyclic_train.py",
        "modality_cyclic_train.py",
        "modality_cyclic_test.py",
    ]
    for script, *args in commands:
        more = (*small, *short) if "train" in script else ("--workers", 1) if "brats" in script else ()
        done = in_process(script, *args, *more, cwd=folder)
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


def test_the_slices_of_healthy_people_beside_patients(tmp_path, in_process):
    preprocessing, *_ = make_cohort(read_section("Healthy people beside patients"), tmp_path)
    done = in_process(*preprocessing, "--workers", 1, cwd=tmp_path)
    assert (done.code, done.stderr) == (0, "")
    out = tmp_path / preprocessing[preprocessing.index("--output_dir") + 1]
    names = {split: sorted(path.name for path in (out / split / "seg").iterdir()) for split in ("train", "val", "test")}
    subjects = {"train": ["IXI002"], "val": ["IXI012"], "test": ["IXI013", "patient-1"]}
    assert names == {
        split: [f"{subject}_seg_{z}.npy" for subject in members for z in range(70, 90)]
        for split, members in subjects.items()
    }


def test_every_column_is_documented():
    section = read_section("Add your own data set")
    for column in ("subject", "seg", "brainmask", "healthy", "split"):
        assert f"| `{column}` |" in section
