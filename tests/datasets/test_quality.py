"""Checks of scans: bad ones are refused or warned about, by the same rule in preprocessing and in prediction."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets.cohorts import Subject, read_table
from datasets.quality import (
    BRAIN_LITRES,
    MAX_INTENSITY,
    brain_warnings,
    coverage_warnings,
    intensity_warnings,
    require_background,
)
from datasets.records import NORMALISATION
from datasets.subject import Settings, normalise, slice_subject
from scoring.scan import read_scan
from utils.cli import UserError
from utils.grid import SliceGeometry

SHAPE = (48, 46, 44)
VOXEL = 4.0  # mm
AFFINE = np.diag([-VOXEL, -VOXEL, VOXEL, 1])
GEOMETRY, DEPTH = SliceGeometry("LPS", (VOXEL,) * 3, (60, 60)), 46  # coarser than BraTS, for speed


def brain(litres: float = 1.2) -> np.ndarray:
    """Return a smooth ball of intensities from 0.3 to 1 on a background of 0."""
    offset = np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2
    radius = (litres * 1e6 * 3 / 4 / np.pi) ** (1 / 3) / VOXEL  # voxels
    inside = (offset**2).sum(-1) < radius**2
    return np.where(inside, 0.65 + 0.35 * np.sin(offset @ (1.1, 0.7, 1.6) / radius), 0)


def with_outlier(ranges: float) -> np.ndarray:
    """Return a brain with one voxel that is so many times the range of the others above them."""
    volume = brain()
    volume[24, 23, 22] = 1 + 0.7 * ranges
    return volume


def wrapped(dtype: type) -> np.ndarray:
    """Return a brain that exceeds the range of its type by up to 40 %."""
    return (brain() * 1.4 * np.iinfo(dtype).max).astype(np.int64).astype(dtype)


# ----------------------------------------------------------------------------------------------------------
# Background


@pytest.mark.parametrize(
    ("volume", "value"),
    [
        (np.where(brain(), brain() * 900, -1024).astype(np.int16), "-1024"),
        ((brain() - brain().mean()) / brain().std(), r"-0\.\d"),  # z-scored with its background
        (np.where(brain(), brain(), 0.5).astype(np.float32), "0.5"),
        (np.full(SHAPE, 7), "7"),
    ],
)
def test_a_background_other_than_0_is_refused(volume, value):
    with pytest.raises(ValueError, match=rf"background is {value}\d*, not 0: set all voxels outside the brain to 0"):
        require_background(volume)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(value):
    for volume in (with_outlier(value), np.where(brain(), brain(), value)):
        with pytest.raises(ValueError, match="some voxels are not finite"):
            require_background(volume)


@pytest.mark.parametrize(
    "volume",
    [
        brain(),
        brain()[24:, 23:, 22:],  # touches three faces
        brain()[:, :, 15:29],  # touches two, and fills most of them
        np.where(brain(), brain() - 0.6, 0),  # a part of the brain is negative
        brain()[18:30, 17:29, 16:28],  # no background at all
        np.zeros(SHAPE),
    ],
)
def test_a_background_of_0_is_accepted_wherever_the_brain_is(volume):
    require_background(volume)


# ----------------------------------------------------------------------------------------------------------
# Volume of the brain


@pytest.mark.parametrize(
    ("millilitres", "message"),
    [
        (99, "less than 0.1 litres are non-zero, less than any brain: check the voxel size"),
        (101, None),
        (2199, None),
        (2201, "more than 2.2 litres are non-zero, more than any brain: skull-strip it"),
    ],
)
@pytest.mark.parametrize(
    "axes",
    [
        np.diag([10, 10, 10]),
        np.diag([-10, 10, 10]),
        [[0, 0, -20], [5, 0, 0], [0, 10, 0]],
        nibabel.eulerangles.euler2mat(0.3, 0.2, 0.1) * 10,
    ],
)
def test_the_volume_of_a_brain_is_bounded(millilitres, message, axes):
    assert BRAIN_LITRES == (0.1, 2.2)
    mask = (np.arange(14**3) < millilitres).reshape(14, 14, 14)
    warned = brain_warnings(mask, nibabel.affines.from_matvec(axes, (1, 2, 3)))  # voxels of 1 ml
    assert len(warned) == bool(message)
    assert not message or warned[0].startswith(message)


# ----------------------------------------------------------------------------------------------------------
# Intensities


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16])
def test_integers_that_wrapped_around_are_warned_about(dtype):
    assert intensity_warnings(wrapped(dtype)) == [
        f"intensities seem to have wrapped around {np.dtype(dtype)}: export the scan with a larger type"
    ]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16])
def test_integers_that_use_their_whole_range_are_not_warned_about(dtype):
    whole = (brain() * np.iinfo(dtype).max).astype(dtype)
    assert np.ptp(whole) == pytest.approx(np.iinfo(dtype).max, rel=0.01)
    assert intensity_warnings(whole) == []
    assert intensity_warnings(np.zeros(SHAPE, dtype)) == []


def test_the_contrast_of_tissue_and_of_a_few_vessels_is_not_warned_about():
    rng = np.random.default_rng(0)
    texture = brain() * 180 + rng.uniform(-50, 50, SHAPE)
    volume = np.where(brain(), np.clip(texture, 1, 250), 0).astype(np.uint8)
    volume[24, 20:28, 22] = 255
    volume[24, 20:28, 23] = 1
    assert volume.max() == 255
    assert intensity_warnings(volume) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_not_warned_about(dtype):
    assert intensity_warnings(wrapped(np.int16).astype(dtype)) == []


@pytest.mark.parametrize("sign", [1, 1000])
def test_a_damaged_voxel_is_refused_and_a_bright_vessel_is_not(sign):
    for ranges in (5000, 1e9, 1e300):
        with pytest.raises(ValueError, match="orders of magnitude above the others: clip damaged voxels"):
            normalise(with_outlier(ranges) * sign, **NORMALISATION)
    image = normalise(with_outlier(50) * sign, **NORMALISATION)
    assert 100 < image.max() <= MAX_INTENSITY


# ----------------------------------------------------------------------------------------------------------
# Gaps


def test_gaps_in_a_modality_give_warnings():
    full = np.zeros((8, 8, 9), bool)
    full[1:7, 1:7, 1:8] = True
    thinner, gaps = full.copy(), full.copy()
    thinner[1, 1:4] = False  # 3 of 36 columns
    gaps[:, :, 2:7:2] = False
    assert coverage_warnings({"t1": full, "t2": thinner}, full) == []
    assert coverage_warnings({"t1": full, "t2": gaps}, full) == [
        "t2 is 0 in more than 10% of the brain",
        "t2 has empty slices between others",
    ]
    assert coverage_warnings({"t1": gaps}, gaps) == ["t1 has empty slices between others"]


# ----------------------------------------------------------------------------------------------------------
# The same rule in preprocessing and in prediction


def scan(
    volume: np.ndarray, sform: np.ndarray | None = AFFINE, qform: np.ndarray | None = AFFINE
) -> nibabel.Nifti1Image:
    """Return a scan whose header has these affines."""
    image = nibabel.Nifti1Image(volume.astype(np.float32) if volume.dtype.kind == "f" else volume, AFFINE)
    image.set_sform(sform, int(sform is not None))
    image.set_qform(qform, int(qform is not None))
    return image


JUDGED = {  # the scan, and the verdict: whether it is refused, and a part of the reason or warning
    "ordinary": (scan(brain()), None, ""),
    "background -1024": (scan(np.where(brain(), brain(), -1024)), True, "its background is -1024, not 0"),
    "background -1024 beyond the training grid": (
        scan(np.pad(np.where(brain(), brain(), -1024), 20, constant_values=-1024)),
        True,
        "its background is -1024, not 0",
    ),
    "constant": (scan(np.full(SHAPE, 7, np.int16)), True, "its background is 7, not 0"),
    "constant brain": (scan((brain() > 0).astype(np.uint8)), True, "its 0.02 and 0.9 quantiles are both 1"),
    "not finite": (scan(with_outlier(np.nan)), True, "some voxels are not finite"),
    "not finite beyond the training grid": (
        scan(np.pad(brain(), 20, constant_values=np.nan)),
        True,
        "some voxels are not finite",
    ),
    "an outlier": (scan(with_outlier(5000)), True, "orders of magnitude above the others"),
    "a skull": (scan(brain(3.0)), False, "more than 2.2 litres are non-zero"),
    "too small": (scan(brain(0.05)), False, "less than 0.1 litres are non-zero"),
    "no orientation": (scan(brain(), None, None), False, "the header has no orientation"),
    "a contradiction": (
        scan(brain(), AFFINE, AFFINE * [[-1], [1], [1], [1]]),
        False,
        "the header contradicts itself (sform LPS and qform RPS): left and right may be swapped; using sform",
    ),
    "wrapped": (scan(wrapped(np.uint8)), False, "intensities seem to have wrapped around uint8"),
}


def judge(path: Path, route: str) -> tuple[bool, list[str]]:
    """Return whether a scan is refused, and the reason or the warnings, without the names of the file and modality."""
    shared = route == "BraTS folder"
    try:
        if route == "prediction":
            return False, read_scan(path, GEOMETRY, NORMALISATION, None).warnings
        if shared:
            subject = Subject("A", {"flair": path}, healthy=True)
        else:
            table = path.with_name("table.csv")
            table.write_text(f"subject,flair,healthy\nA,{path.name},yes")
            subject = read_table(table).subjects["A"]
        settings = Settings(Path("out"), ("flair",), *NORMALISATION.values(), 20, 24, max_label=4, shared_grid=shared)
        warnings = slice_subject(settings, "train", subject).warnings
        return False, [warning.removeprefix("flair: ") for warning in warnings]
    except UserError as error:
        return True, str(error).split(": ", 1)[1:]


@pytest.mark.parametrize("case", JUDGED)
def test_preprocessing_and_prediction_judge_a_scan_alike(tmp_path, monkeypatch, case):
    monkeypatch.setattr("datasets.subject.BRATS_SLICES", GEOMETRY)
    monkeypatch.setattr("datasets.subject.DEPTH", DEPTH)
    image, refused, text = JUDGED[case]
    nibabel.save(image, path := tmp_path / "scan.nii")
    verdicts = {route: judge(path, route) for route in ("BraTS folder", "table", "prediction")}
    if refused is None:
        assert verdicts == dict.fromkeys(verdicts, (False, []))
        return
    assert {refusal for refusal, _ in verdicts.values()} == {refused}
    [(sentence,)] = {tuple(said) for _, said in verdicts.values()}
    assert text in sentence
