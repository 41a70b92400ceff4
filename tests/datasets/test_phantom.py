"""The phantom cohort: files, contrasts, tumours and command line. All tests share one small cohort."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from datasets import phantom, phantom_anatomy, phantom_head, phantom_scan, phantom_tumour
from datasets.splits import LIST_NAMES
from tests.scripts.conftest import REPOSITORY, Done, run_here

pytestmark = pytest.mark.xdist_group("phantom")  # one process, so that the cohort is made once

COUNTS = {"train": 1, "val": 1, "test": 1}
SPLITS = ("train", "val", "test")  # by subject number
SEED = 4  # for which every tumour has a core
KINDS = (*phantom.MODALITIES, "seg")


def run_script(*args: object) -> Done:
    return run_here("datasets/phantom.py", *args, cwd=REPOSITORY)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Make a cohort and its figure by the command line, with two workers."""
    folder = tmp_path_factory.mktemp("phantom")
    counts = [arg for split, count in COUNTS.items() for arg in (f"--{split}", count)]
    done = run_script(
        "--output_dir", folder / "raw", "--seed", SEED, "--workers", 2, "--figure", folder / "a.png", *counts
    )
    assert done.code == 0, done.stderr
    return folder / "raw"


@pytest.fixture(scope="module")
def images(cohort) -> list[dict[str, nib.Nifti1Image]]:
    names = [phantom.subject_name(number) for number in range(len(SPLITS))]
    return [{kind: nib.load(cohort / name / f"{name}_{kind}.nii.gz") for kind in KINDS} for name in names]


@pytest.fixture(scope="module")
def truths() -> list[tuple]:
    """Return (volumes, anatomy, tumour) of each subject in the cohort."""
    return [phantom_head.make_subject(SEED, number, split) for number, split in enumerate(SPLITS)]


def test_files_have_the_brats_layout(cohort, images):
    lists = {f"brats_split_{part}.txt" for part in ("training", "validation", "testing")}
    names = [f"BraTS2021_0000{number}" for number in range(3)]
    scans = {f"{name}/{name}_{kind}.nii.gz" for name in names for kind in ("flair", "t1", "t1ce", "t2", "seg")}
    assert set(files_of(cohort)) == lists | scans
    for subject in images:
        for kind, image in subject.items():
            assert image.shape == (240, 240, 155)
            assert image.get_data_dtype() == (np.uint8 if kind == "seg" else np.int16)
            assert image.header.get_zooms() == (1, 1, 1)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            np.testing.assert_array_equal(image.affine[:3, 3], [0, 239, 0])


def test_split_lists_have_the_requested_counts_and_share_no_subject(cohort):
    lists = {split: (cohort / name).read_text().splitlines() for split, name in LIST_NAMES.items()}
    assert {split: len(names) for split, names in lists.items()} == COUNTS
    everyone = [name for names in lists.values() for name in names]
    assert sorted(everyone) == sorted(folder.name for folder in cohort.iterdir() if folder.is_dir())


def test_figure_is_drawn(cohort):
    assert (cohort.parent / "a.png").read_bytes().startswith(b"\x89PNG")


def test_subject_depends_only_on_seed_and_number(cohort, images, truths, tmp_path):
    """It does not depend on the number of workers or on earlier subjects."""
    for subject, (volumes, _, _) in zip(images, truths, strict=True):
        for kind in KINDS:
            np.testing.assert_array_equal(np.asarray(subject[kind].dataobj), volumes[kind])
    name = phantom.subject_name(2)
    phantom.write_subject(tmp_path, SEED, 2, "test")
    assert files_of(tmp_path) == {file: data for file, data in files_of(cohort).items() if file.startswith(name)}


def test_heads_differ_between_seeds_and_subjects(truths):
    other, _, _ = phantom_head.make_subject(SEED + 1, 0, "train")
    for volumes in (other, truths[1][0]):
        assert all((volumes[kind] != truths[0][0][kind]).any() for kind in KINDS)


@pytest.fixture(scope="module")
def with_healthy(tmp_path_factory) -> Path:
    """Make the cohort again, with one healthy subject in val and one in test."""
    folder = tmp_path_factory.mktemp("healthy")
    counts = [arg for split, count in COUNTS.items() for arg in (f"--{split}", count)]
    done = run_script("--output_dir", folder, "--seed", SEED, "--workers", 2, "--healthy", 1, *counts)
    assert "Wrote 5 subjects (1 train, 1 val, 1 test, 1 healthy val, 1 healthy test) and" in done.stdout
    return folder


def test_healthy_subjects_have_the_last_numbers_and_change_no_other(cohort, with_healthy):
    before, after = files_of(cohort), files_of(with_healthy)
    scans = {file for file in before if file.endswith(".nii.gz")}
    assert {file: after[file] for file in scans} == {file: before[file] for file in scans}
    names = [phantom.subject_name(number) for number in range(5)]
    lists = {split: (with_healthy / name).read_text().splitlines() for split, name in LIST_NAMES.items()}
    assert lists == {"train": names[:1], "val": [names[1], names[3]], "test": [names[2], names[4]]}


def test_healthy_subjects_have_age_but_no_tumour(with_healthy, truths):
    for number, split in ((3, "val"), (4, "test")):
        name = phantom.subject_name(number)
        scans = {kind: np.asarray(nib.load(with_healthy / name / f"{name}_{kind}.nii.gz").dataobj) for kind in KINDS}
        assert not scans["seg"].any()
        _, anatomy, _ = phantom_head.make_subject(SEED, number, split, healthy=True)
        flair = scans["flair"][tuple(anatomy.coords.T)]
        assert np.median(flair[anatomy.wmh > 0.5]) > 1.1 * np.median(flair[(anatomy.wm > 0.95) & (anatomy.wmh < 0.02)])
        _, sick, tumour = phantom_head.make_subject(SEED, number, split)  # the same head with a tumour
        np.testing.assert_array_equal(anatomy.coords, sick.coords)
        far = np.linalg.norm(anatomy.coords - anatomy.coords[tumour.shares[2] > 0.5].mean(0), axis=1) > 110
        np.testing.assert_array_equal(anatomy.wmh[far], sick.wmh[far])


def test_background_is_zero_and_the_brain_is_not(images, truths):
    for subject, (_, anatomy, _) in zip(images, truths, strict=True):
        brain = np.zeros(phantom_anatomy.SHAPE, bool)
        brain[tuple(anatomy.coords.T)] = True
        assert 1.0e6 < brain.sum() < 1.7e6  # mm³, an adult's brain
        assert not brain[[0, -1]].any()
        assert not brain[:, [0, -1]].any()
        for modality in phantom.MODALITIES:
            np.testing.assert_array_equal(np.asarray(subject[modality].dataobj) > 0, brain)
        assert not np.asarray(subject["seg"].dataobj)[~brain].any()


def test_all_labels_are_present_and_nested(images):
    for subject in images:
        seg = np.asarray(subject["seg"].dataobj)
        assert set(np.unique(seg)) == {0, 1, 2, 4}
        around_core = ndimage.binary_dilation(seg == 1) & (seg != 1)
        assert (seg[around_core] == 4).mean() > 0.9


def healthy(anatomy: phantom_anatomy.Anatomy, tumour: phantom_tumour.Tumour) -> dict[str, np.ndarray]:
    """Return masks [V] of the voxels that contain only one healthy tissue."""
    unaffected = (tumour.shares[2] == 0) & (anatomy.wmh < 0.02) & (anatomy.vessels < 0.02)
    unaffected &= ~np.any([share > 0 for share in anatomy.nuclei.values()], axis=0)
    return {tissue: unaffected & (getattr(anatomy, tissue) > 0.95) for tissue in ("gm", "wm", "csf")}


@pytest.mark.parametrize(
    ("modality", "order"),
    [
        ("flair", ("gm", "wm", "csf")),
        ("t1", ("wm", "gm", "csf")),
        ("t1ce", ("wm", "gm", "csf")),
        ("t2", ("csf", "gm", "wm")),
    ],
)
def test_tissue_intensities_are_ordered_as_in_the_modality(images, truths, modality, order):
    for subject, (_, anatomy, tumour) in zip(images, truths, strict=True):
        voxels = np.asarray(subject[modality].dataobj)[tuple(anatomy.coords.T)]
        medians = {tissue: np.median(voxels[mask]) for tissue, mask in healthy(anatomy, tumour).items()}
        bright, middle, dark = (medians[tissue] for tissue in order)
        assert bright > 1.08 * middle > 1.08 * 1.08 * dark
        if modality == "flair":
            assert dark < 0.6 * middle  # fluid is attenuated


@pytest.mark.parametrize("label", [1, 2, 4])
@pytest.mark.parametrize("modality", phantom.MODALITIES)
def test_tumour_contrast_matches_the_table(images, truths, label, modality):
    """Exactly as painted; in the scan, thick slices and shading alter the ratio to nearby grey matter."""
    low, high = phantom_tumour.TUMOUR_CONTRAST[label][modality]
    for subject, (_, anatomy, tumour) in zip(images, truths, strict=True):
        inner = sum(share for other, share in tumour.shares.items() if is_inside(other, label))
        compartment = (tumour.shares[label] > 0.95) & (inner < 0.05)
        assert compartment.sum() >= 20
        painted = np.ones(len(compartment))
        tumour.paint(painted, modality)
        assert low < tumour.contrast[label][modality] < high
        assert np.median((painted / tumour.texture)[compartment]) == pytest.approx(
            tumour.contrast[label][modality], rel=0.02
        )

        voxels = np.asarray(subject[modality].dataobj)[tuple(anatomy.coords.T)]
        near = np.linalg.norm(anatomy.coords - anatomy.coords[compartment].mean(0), axis=1) < 40
        ratio = np.median(voxels[compartment]) / np.median(voxels[near & healthy(anatomy, tumour)["gm"]])
        assert ratio == pytest.approx(tumour.contrast[label][modality], rel=0.3)


def is_inside(label: int, other: int) -> bool:
    """Return whether compartment `label` is inside `other`; the core is inside the rim, the rim inside the oedema."""
    order = (2, 4, 1)
    return order.index(label) > order.index(other)


def test_contrasts_are_drawn_independently():
    """A lesion that is obvious in one modality may be faint in another."""
    rng = np.random.default_rng(0)
    drawn = [phantom_tumour.draw_contrast(rng) for _ in range(200)]
    ratios = [(label, modality) for label in (1, 2, 4) for modality in phantom.MODALITIES]
    table = np.array([[contrast[label][modality] for label, modality in ratios] for contrast in drawn])
    correlation = np.corrcoef(table.T) - np.eye(len(ratios))
    assert np.abs(correlation).max() < 0.3
    for values, (label, modality) in zip(table.T, ratios, strict=True):
        low, high = phantom_tumour.TUMOUR_CONTRAST[label][modality]
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high


def test_tumour_displaces_surrounding_tissue(truths):
    """Tissue at the outline moves outwards; far from the tumour nothing moves."""
    _, anatomy, _ = truths[0]
    center, radius = anatomy.coords.mean(0).round(), np.full(3, 15.0)
    offset = anatomy.coords[:, 0] - center[0]
    on_axis = (np.abs(anatomy.coords[:, 1:] - center[1:]) < 2).all(1)
    marked = anatomy._replace(gm=(np.abs(offset) < 8) * 1.0, wm=(np.abs(offset) >= 8) * 1.0, csf=np.zeros(len(offset)))
    moved = phantom_tumour.apply_mass_effect(marked, center, radius, 0.3)
    extent = [np.ptp(offset[on_axis & (one.gm > 0.5)]) for one in (marked, moved)]
    assert extent[1] > extent[0] + 2
    far = np.linalg.norm(anatomy.coords - center, axis=1) > 80
    np.testing.assert_array_equal(moved.gm[far], marked.gm[far])
    np.testing.assert_allclose(moved.gm + moved.wm + moved.csf, 1, atol=1e-5)


@pytest.fixture(scope="module")
def anatomy(truths) -> phantom_anatomy.Anatomy:
    return truths[0][1]


def test_most_shading_is_shared_between_modalities(anatomy):
    """The bias field of the coils outweighs those of the modalities."""
    rng = np.random.default_rng(0)
    coils = phantom_scan.bias_field(rng, anatomy, phantom_scan.BIAS_FIELD[1])
    own = [phantom_scan.bias_field(rng, anatomy, phantom_scan.OWN_BIAS_FIELD[1]) for _ in range(2)]
    assert coils.mean() == pytest.approx(0, abs=1e-4)
    assert np.corrcoef(coils + own[0], coils + own[1])[0, 1] > 0.5
    assert abs(np.corrcoef(own[0], own[1])[0, 1]) < 0.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_thick_along_their_axis_and_misregistered_by_less_than_a_voxel(anatomy, axis, monkeypatch):
    monkeypatch.setitem(phantom_scan.SLICES, "t2", ((axis,), (4, 4)))
    center = tuple((np.array(anatomy.brain.shape) // 2).tolist())
    point = np.zeros(anatomy.brain.shape)
    point[center] = 1
    assert anatomy.brain[center]
    scans = [
        phantom_scan.acquire(np.random.default_rng(0), anatomy, (scale * point)[anatomy.brain], "t2")
        for scale in (1, 0)
    ]
    volume = anatomy.unmask(scans[0] - scans[1], 0)  # the surroundings of the brain cancel
    spread = [np.flatnonzero(volume.sum(tuple({0, 1, 2} - {other})) > 1e-6) for other in range(3)]
    assert [len(where) for where in spread] == [5 if other == axis else 2 for other in range(3)]
    assert volume.sum() == pytest.approx(1, abs=1e-4)
    middle = [np.average(np.arange(n), weights=volume.sum(tuple({0, 1, 2} - {i}))) for i, n in enumerate(volume.shape)]
    shift = np.abs(np.array(middle) - center)
    assert (shift <= phantom_scan.MAX_SHIFT + 0.5 * (np.arange(3) == axis)).all()  # 4 slices have no middle one
    assert shift.max() > 0.05


@pytest.mark.parametrize("modality", phantom.MODALITIES)
def test_tissue_texture_is_independent_between_modalities(anatomy, modality):
    others = {"flair": "t2", "t2": "t1", "t1": "t1ce", "t1ce": "flair"}
    rng = np.random.default_rng(0)
    wm = (anatomy.wm > 0.95) & (anatomy.wmh < 0.02) & ~np.any([n > 0 for n in anatomy.nuclei.values()], axis=0)
    one, other = (np.log(phantom_scan.contrast(rng, anatomy, m)[wm]) for m in (modality, others[modality]))
    assert one.std() > 0.02
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.3


def test_contrast_of_nuclei_vessels_and_fluid(anatomy):
    """Iron darkens the pallidum on T2 and not on T1; gadolinium brightens vessels on T1ce and not on T1."""
    rng = np.random.default_rng(0)
    images = {modality: phantom_scan.contrast(rng, anatomy, modality) for modality in phantom.MODALITIES}
    pallidum, gm = anatomy.nuclei["pallidum"] > 0.9, (anatomy.gm > 0.95) & (anatomy.vessels < 0.05)
    vessel, partial = anatomy.vessels > 0.8, (np.abs(anatomy.csf - 0.5) < 0.05) & (anatomy.vessels < 0.05)
    assert min(pallidum.sum(), vessel.sum(), partial.sum()) > 50
    medians = {m: [np.median(image[where]) for where in (gm, pallidum, vessel, partial)] for m, image in images.items()}
    assert medians["t2"][1] < 0.8 * medians["t2"][0]
    assert medians["t1"][1] > 1.05 * medians["t1"][0]
    assert medians["t1ce"][2] > 1.3 > 0.9 > medians["t1"][2]
    for modality, compare in (("t2", np.greater), ("flair", np.less)):
        pure = np.median(images[modality][(anatomy.csf > 0.95) & (anatomy.vessels < 0.05)])
        share = (medians[modality][3] - medians[modality][0]) / (pure - medians[modality][0])
        assert compare(share, 0.5)  # the contrast of half a voxel of fluid, relative to a full one


def window(anatomy: phantom_anatomy.Anatomy, tumour: phantom_tumour.Tumour) -> np.ndarray:
    """Return the number of tumour voxels in each of slices 70 to 89, [20]."""
    slices = anatomy.coords[tumour.shares[2] > 0.5, 2]
    return np.bincount(slices, minlength=phantom_anatomy.SHAPE[2])[70:90]


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_subjects_have_tumour_in_the_window(truths, split):
    _, anatomy, tumour = truths[SPLITS.index(split)]
    assert window(anatomy, tumour).any()
    rng = np.random.default_rng(0)
    more = [phantom_tumour.grow_tumour(rng, anatomy, phantom_tumour.TUMOUR_SLICES[split]) for _ in range(15)]
    areas = [window(*grown).max() for grown in more]
    assert min(areas) > 0
    assert max(areas) > 4 * min(areas)  # small and large


def test_most_training_subjects_keep_healthy_slices_in_the_window(truths):
    rng = np.random.default_rng(0)
    _, anatomy, _ = truths[0]
    grown = [phantom_tumour.grow_tumour(rng, anatomy, phantom_tumour.TUMOUR_SLICES["train"]) for _ in range(25)]
    slices = np.array([(window(*one) == 0).sum() for one in grown])
    assert (slices >= 3).mean() >= 0.7
    assert (slices < 20).mean() >= 0.3  # many have tumour there, as patients do


def test_smooth_noise_is_smooth_and_has_unit_variance():
    noise = np.stack([phantom_anatomy.smooth_noise(np.random.default_rng(n), (20, 16, 12), 5) for n in range(200)])
    np.testing.assert_allclose(noise.std(0), 1, atol=0.25)
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--train", "0"], "--train is 0"),
        (["--val", "-1"], "--val is -1"),
        (["--test", "0"], "--test is 0"),
        (["--test", "many"], "--test"),
        (["--healthy", "-1"], "--healthy is -1"),
        (["--workers", "0"], "--workers is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--figure", "picture.txt"], "--figure is picture.txt"),
        (["--figure", "nowhere/picture.png"], "--figure is nowhere/picture.png"),
        (["--trian", "3"], "did you mean '--train'"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(tmp_path, args, named):
    done = run_script("--output_dir", tmp_path / "raw", *args)
    assert done.code == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "raw").exists()


def test_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "raw").write_text("")
    done = run_script("--output_dir", tmp_path / "raw")
    assert done.code == 2
    assert "--output_dir" in done.stderr
    assert done.stderr.count("\n") == 1
