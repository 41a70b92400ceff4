"""User errors: exit code 2, one sentence with the remedy on stderr, and nothing written."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.scripts.conftest import expect_refusal, write_random_slices

pytestmark = pytest.mark.xdist_group("bad input")  # one process, so that the experiments are trained once

TRAIN, TEST = "modality_cyclic_train.py", "modality_cyclic_test.py"
FORWARD, BACKWARD = "unet_forward_phantom_t2_flair", "unet_backward_phantom_t2_flair"
DATA = ("--dataset=phantom", "--data_dir=datasets/data")
DIFFUSION = ("--model_name=diffusion",)
SCORE_MODEL = "--config.score_model"

# Training arguments, after a tiny network's flags, and phrases of the error. More config values: test_config.py.
TRAINING = {
    "modality not preprocessed": (["--trans=t1ce"], ["t1ce", "flair", "t2", "preprocess"]),
    "modality mistyped": (["--input=flar"], ["'flar'", "did you mean 'flair'?"]),
    "data set is a modality": (["--dataset=flair"], ["'flair' is a modality", "--input flair", "phantom"]),
    "data set mistyped": (["--dataset=brat"], ["'brat'", "did you mean 'brats'?"]),
    "config key mistyped": (
        [f"{SCORE_MODEL}.training.iteration=5"],
        ["'score_model.training.iteration'", "did you mean 'score_model.training.iterations'?"],
    ),
    "config key of the public library": (
        [f"{SCORE_MODEL}.sampling.clip_denoised=True"],
        ["unknown config key 'score_model.sampling.clip_denoised'"],
    ),
    "config value of another type": ([f"{SCORE_MODEL}.training.iterations=many"], ["iterations=many", "int"]),
    "config value after a space": ([f"{SCORE_MODEL}.training.iterations", "5"], ["'5'"]),
    "heads": ([f"{SCORE_MODEL}.model.num_heads=3"], ["num_heads=3"]),
    "noise schedule": ([*DIFFUSION, f"{SCORE_MODEL}.diffusion.noise_schedule=square"], ["'square'", "linear"]),
    "schedule sampler": ([*DIFFUSION, f"{SCORE_MODEL}.training.schedule_sampler=normal"], ["'normal'", "uniform"]),
    "mean type": ([*DIFFUSION, f"{SCORE_MODEL}.diffusion.model_mean_type=X"], ["'X'", "START_X"]),
    "variance type": ([*DIFFUSION, f"{SCORE_MODEL}.diffusion.model_var_type=X"], ["'X'", "FIXED_LARGE"]),
    "too few steps for the schedule": ([*DIFFUSION, f"{SCORE_MODEL}.diffusion.steps=5"], ["steps=5", "linear"]),
    "fewer steps than the preview samples": (
        [*DIFFUSION, f"{SCORE_MODEL}.diffusion.steps=20", f"{SCORE_MODEL}.sampling.timestep_respacing=30"],
        ["30", "20 timesteps"],
    ),
    "a mask as input": (["--input=seg"], ["--input 'seg' is a mask", "name a modality"]),
    "a network that no memory holds": (
        [f"{SCORE_MODEL}.model.model_channels=4096", f"{SCORE_MODEL}.model.channel_mult=(64, 64)"],
        ["training this network needs about", "GB", "--config.score_model.model.model_channels"],
    ),
    "blocks that take minutes to make": ([f"{SCORE_MODEL}.model.num_res_blocks=1000"], ["num_res_blocks: 1000", "64"]),
    "levels of which a single slice fills the memory": (
        [f"{SCORE_MODEL}.model.channel_mult=({'1, ' * 10})", "--config.data.image_size=1024"],
        ["score_model.model.channel_mult", "too long"],
    ),
    "noise finer than the image": (
        ["--model_name=dae", f"{SCORE_MODEL}.baselines.noise_size=100_000"],
        ["noise_size=100000", "between 1 and 32"],
    ),
    "sampling steps with a line break": ([*DIFFUSION, f"{SCORE_MODEL}.sampling.timestep_respacing=10\n"], [r"'10\n'"]),
    "sampling steps of the preview": ([*DIFFUSION, f"{SCORE_MODEL}.sampling.timestep_respacing=abc"], ["'abc'"]),
    "diffusion backward": ([*DIFFUSION, "--training_process=backward"], ["--model_name unet", "backward"]),
    "one modality": (["--trans=flair"], ["--input", "--trans", "'flair'"]),
    "flag mistyped": (["--trainnig_process=backward"], ["did you mean '--training_process'?"]),
    "choice mistyped": (["--training_process=forwards"], ["'forwards'", "forward", "backward"]),
    "device": (["--gpu_id=foo"], ["--gpu_id", "'foo'", "cpu"]),
    "seed": (["--seed=first"], ["--seed", "first"]),
    "seed too large": ([f"--seed={10**30}"], ["seed"]),
    "no data": (["--data_dir=nowhere"], ["nowhere", "brats_preprocess.py"]),
    "a batch that no memory holds": (
        [f"{SCORE_MODEL}.training.batch_size={10**7}"],
        ["GB", "training.batch_size", "data.image_size"],
    ),
    "a name that no system takes": ([f"--experiment_name={'x' * 300}"], ["xxx", "name too long"]),
    "a path that no system takes": ([f"--data_dir={'x' * 300}"], ["xxx", "name too long"]),
    "no iterations": ([f"{SCORE_MODEL}.training.iterations=0"], ["iterations=0", "at least 1"]),
    "experiments in a file": (["--logdir=datasets/note.txt"], ["note.txt", "--logdir"]),
    "broken slices": (["--data_dir=datasets/broken"], ["datasets/broken/train", "S1_flair_80.npy"]),
    "slices of two shapes": (
        ["--data_dir=datasets/two_shapes"],
        ["datasets/two_shapes/train", "slice S1_80", "flair (48, 48), t2 (24, 48)", "preprocess again"],
    ),
    "slices that are volumes": (
        ["--data_dir=datasets/volumes"],
        ["datasets/volumes/train", "slice S2_80", "flair (48, 48, 2)", "preprocess again"],
    ),
    "slices that are not finite": (
        ["--data_dir=datasets/nan"],
        ["S1_flair_80.npy", "range from nan to nan", "preprocess again"],
    ),
    "slices of an absurd range": (
        ["--data_dir=datasets/huge"],
        ["S1_t2_80.npy", "range from -1e+30", "to at most 1000"],
    ),
    "slices of complex numbers": (["--data_dir=datasets/complex"], ["S1_flair_80.npy", "complex64"]),
    **{
        f"experiment called {name!r}": ([f"--experiment_name={name}"], ["--experiment_name", "plain name"])
        for name in ("results", ".lock", "~", "a\nb", "a\udc80b", ".hidden")
    },
    "experiment outside": (["--experiment_name=../outside"], ["--experiment_name '../outside'", "plain name"]),
    "experiment below": (["--experiment_name=a/b"], ["--experiment_name 'a/b'", "plain name"]),
    "experiment at the root": (["--experiment_name=/outside"], ["--experiment_name '/outside'", "plain name"]),
    "experiment that is logdir": (["--experiment_name=."], ["--experiment_name '.'", "plain name"]),
    "experiment above logdir": (["--experiment_name=.."], ["--experiment_name '..'", "plain name"]),
    "experiment outside to overwrite": (["--experiment_name=..", "--overwrite"], ["--experiment_name '..'"]),
    "input outside": (["--input=../flair"], ["--input '../flair'", "plain name"]),
    "trans outside": (["--trans=../../x/t2"], ["--trans '../../x/t2'", "plain name"]),
    "config's input outside": (["--config.data.input=../flair"], ["--input '../flair'", "plain name"]),
}

# Testing arguments, after DATA, and phrases of the error.
BARE = ["--checkpoint_forward=bare/forward.pt", "--checkpoint_backward=bare/backward.pt"]
RESPACING = [*DIFFUSION, "--timestep_respacing"]
TESTING = {
    "modality not preprocessed": (
        ["--input=t1ce", *BARE, "@tiny"],
        ["t1ce", "flair", "datasets/data/test", "preprocess"],
    ),
    "data set is a modality": (["--dataset=t2"], ["'t2' is a modality", "--input t2"]),
    "data set mistyped": (["--dataset=fantom"], ["did you mean 'phantom'?"]),
    "config key mistyped": (["--config.scor_model.mask.width=8"], ["did you mean 'score_model.mask.width'?"]),
    "config value of another type": (["--config.score_model.sampling.eta=some"], ["eta=some", "float"]),
    "flag mistyped": (["--experiment_name_foward=x"], ["did you mean '--experiment_name_forward'?"]),
    "device": (["--gpu_id=-1"], ["--gpu_id", "'-1'"]),
    "use_ddim": (["--use_ddim=maybe"], ["--use_ddim", "'maybe'"]),
    "experiment mistyped": (
        ["--experiment_name_forward=unet_forwad_phantom_t2_flair"],
        ["'unet_forwad_phantom_t2_flair'", f"did you mean '{FORWARD}'?"],
    ),
    "experiment never trained": (["--input=t1"], ["unet_forward_phantom_t2_t1", "train it first"]),
    "experiment without checkpoint": (
        ["--experiment_name_backward=begun"],
        ["'begun'", "no EMA checkpoint", "train it"],
    ),
    "forward experiment outside": (
        ["--experiment_name_forward=../outside"],
        ["--experiment_name_forward '../outside'", "plain name"],
    ),
    "backward experiment at the root": (
        ["--experiment_name_backward=/outside"],
        ["--experiment_name_backward '/outside'", "plain name"],
    ),
    "experiment that is logdir": (["--experiment_name_forward=."], ["--experiment_name_forward '.'"]),
    "input outside": (["--input=../flair"], ["../flair'", "plain name"]),
    "input outside with a checkpoint": ([*BARE, "@tiny", "--input=../flair"], ["--input '../flair'"]),
    "experiments elsewhere": (["--logdir=elsewhere"], ["elsewhere", FORWARD]),
    "checkpoint not there": (["--checkpoint_forward=gone.pt"], ["no checkpoint at gone.pt", "--checkpoint_forward"]),
    "checkpoint is text": (["--checkpoint_forward=bare/text.pt", "@tiny"], ["bare/text.pt"]),
    "checkpoint is a list": (["--checkpoint_backward=bare/list.pt", "@tiny"], ["bare/list.pt"]),
    "checkpoint is a whole module": (["--checkpoint_forward=bare/module.pt", "@tiny"], ["bare/module.pt"]),
    "checkpoint of another network": (
        ["--checkpoint_forward=bare/diffusion.pt", "@tiny"],
        ["bare/diffusion.pt", "does not fit"],
    ),
    "checkpoint with a flipped bit": (
        ["--checkpoint_forward=bare/flipped.pt", "@tiny"],
        ["bare/flipped.pt", "checksum"],
    ),
    "checkpoint that is not finite": (["--checkpoint_forward=bare/nan.pt", "@tiny"], ["bare/nan.pt", "not finite"]),
    "checkpoint of whole numbers": (["--checkpoint_forward=bare/whole.pt", "@tiny"], ["bare/whole.pt", "int8"]),
    "checkpoint of complex numbers": (
        ["--checkpoint_forward=bare/complex.pt", "@tiny"],
        ["bare/complex.pt", "complex64"],
    ),
    "checkpoint without its overrides": (BARE, ["bare/forward.pt", "does not fit"]),
    "forward as backward": (
        [f"--experiment_name_backward={FORWARD}"],
        [FORWARD, "is a forward unet", "not the backward unet"],
    ),
    "unet as diffusion": (
        [*DIFFUSION, f"--experiment_name_forward={FORWARD}"],
        [FORWARD, "is a forward unet", "not the forward diffusion"],
    ),
    "record that is no record": (["--experiment_name_forward=damaged"], ["damaged/config.json"]),
    "record that lacks something": (["--experiment_name_forward=lacking"], ["lacking/config.json"]),
    "other input than trained": (
        ["--input=t1", f"--experiment_name_forward={FORWARD}", f"--experiment_name_backward={BACKWARD}"],
        ["data.input=t1", FORWARD, "flair"],
    ),
    "translators of different modalities": (["--experiment_name_backward=other_pair"], ["other_pair", "t1"]),
    "translators of different normalisation": (
        ["--experiment_name_forward=scale_a", "--experiment_name_backward=scale_b"],
        ["scale_a", "scale_b", "0.9", "0.8", "--percentage_upper"],
    ),
    "translators of different grids": (
        ["--experiment_name_forward=grid_a", "--experiment_name_backward=grid_b"],
        ["grid_a", "grid_b", "[1.0, 1.0, 1.0]", "[1.0, 1.0, 3.0]", "--csv"],
    ),
    "other image size than trained": (["--config.data.image_size=64"], ["image_size=64", FORWARD, "32"]),
    "other network than trained": (
        ["--config.score_model.model.channel_mult=(1, 2)"],
        ["channel_mult=(1, 2)", FORWARD, "(1, 1)"],
    ),
    "other band than trained": ([*DIFFUSION, "--config.score_model.mask.width=4"], ["mask.width=4", "8"]),
    "one modality": (["--trans=flair", *BARE, "@tiny"], ["--input", "--trans", "'flair'"]),
    "too many sampling steps": ([*RESPACING, "5000"], ["5000", "1000"]),
    "no sampling steps": ([*RESPACING, "0"], ["0", "1000"]),
    "negative sampling steps": ([*RESPACING, "-5"], ["-5"]),
    "sampling steps in words": ([*RESPACING, "abc"], ["'abc'", "ddim"]),
    "sampling steps with a line break": ([*RESPACING, "10\n"], [r"'10\n'", "ddim"]),
    "a mask as target": (["--trans=brainmask", *BARE, "@tiny"], ["--trans 'brainmask' is a mask"]),
    "impossible stride": ([*RESPACING, "ddim999"], ["999"]),
    "negative batch": (["--config.score_model.sampling.batch_size=-1"], ["batch_size=-1", "at least 1"]),
    "no data": (["--data_dir=nowhere"], ["nowhere", "brats_preprocess.py"]),
    "no test slices": (["--data_dir=datasets/no_test"], ["datasets/no_test/test"]),
    "results in a file": (["--logdir=datasets/note.txt", *BARE, "@tiny"], ["note.txt", "--logdir"]),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, in_process, tiny, short):
    """A working directory with random slices, trained experiments and corrupted ones."""
    folder = tmp_path_factory.mktemp("place")
    counts, rng = {"train": 3, "val": 1, "test": 2}, np.random.default_rng(0)
    write_random_slices(folder / "datasets/data", counts, ("flair", "t1", "t2"), rng)
    shutil.copytree(folder / "datasets/data", folder / "datasets/no_test")
    shutil.rmtree(folder / "datasets/no_test/test")
    shutil.copytree(folder / "datasets/data", folder / "datasets/broken")
    (folder / "datasets/broken/train/flair/S1_flair_80.npy").write_bytes(b"cut off")
    for name, file, shape in (
        ("two_shapes", "t2/S1_t2_80.npy", (24, 48)),
        ("volumes", "flair/S2_flair_80.npy", (48, 48, 2)),
        ("nan", "flair/S1_flair_80.npy", np.full((48, 48), np.nan, np.float32)),
        ("huge", "t2/S1_t2_80.npy", np.full((48, 48), -1e30, np.float32)),
        ("complex", "flair/S1_flair_80.npy", np.ones((48, 48), np.complex64)),
    ):
        shutil.copytree(folder / "datasets/data", folder / "datasets" / name)
        spoilt = np.random.default_rng(0).integers(-3, 3, shape).astype("f4") if isinstance(shape, tuple) else shape
        np.save(folder / "datasets" / name / "train" / file, spoilt)
    (folder / "datasets/note.txt").write_text("not a folder")

    once = (*tiny, *short, "--config.score_model.training.iterations=1")
    for flags in (
        (),
        ("--training_process=backward",),
        DIFFUSION,
        ("--training_process=backward", "--trans=t1", "--experiment_name=other_pair"),
    ):
        done = in_process(TRAIN, *once, *flags, cwd=folder)
        assert done.code == 0, done.stderr

    experiments = folder / "experiments"
    (experiments / "begun").mkdir()
    for name, text in {"damaged": "{", "lacking": "{}"}.items():
        shutil.copytree(experiments / FORWARD, experiments / name)
        (experiments / name / "config.json").write_text(text)
    for name, experiment, changes in (
        ("scale_a", FORWARD, {"normalisation": {"percentage_lower": 0.02, "percentage_upper": 0.9}}),
        ("scale_b", BACKWARD, {"normalisation": {"percentage_lower": 0.02, "percentage_upper": 0.8}}),
        ("grid_a", FORWARD, {"grid": {"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [48, 48]}}),
        ("grid_b", BACKWARD, {"grid": {"axcodes": "LPS", "spacing": [1.0, 1.0, 3.0], "shape": [48, 48]}}),
    ):
        shutil.copytree(experiments / experiment, experiments / name)
        record = json.loads((experiments / name / "config.json").read_text())
        record["data"] |= changes
        (experiments / name / "config.json").write_text(json.dumps(record))
    bare = folder / "bare"
    bare.mkdir()
    for name, experiment in {
        "forward": FORWARD,
        "backward": BACKWARD,
        "diffusion": "diffusion_forward_phantom_t2_flair",
    }.items():
        shutil.copy(experiments / experiment / "ema_0.5_000001.pt", bare / f"{name}.pt")
    (bare / "text.pt").write_text("not a checkpoint")
    intact = bytearray((bare / "forward.pt").read_bytes())
    intact[len(intact) // 2] ^= 1  # among the weights
    (bare / "flipped.pt").write_bytes(intact)
    state = torch.load(bare / "forward.pt", weights_only=True)
    first = next(iter(state))
    for name, spoilt in (
        ("nan", torch.full_like(state[first], torch.nan)),
        ("whole", state[first].to(torch.int8)),
        ("complex", state[first].to(torch.complex64)),
    ):
        torch.save(state | {first: spoilt}, bare / f"{name}.pt")
    torch.save([1, 2, 3], bare / "list.pt")
    torch.save(torch.nn.Conv2d(1, 1, 3), bare / "module.pt")
    return folder


def listing(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", TRAINING)
def test_training_refuses_mistakes(workdir, in_process, tiny, short, mistake):
    args, phrases = TRAINING[mistake]
    before = listing(workdir)
    done = in_process(TRAIN, *tiny, *short, "--experiment_name=new", *args, cwd=workdir)
    expect_refusal(done, f"{TRAIN}: ", *phrases)
    assert listing(workdir) == before


@pytest.mark.parametrize("mistake", TESTING)
def test_testing_refuses_mistakes(workdir, in_process, tiny, mistake):
    args, phrases = TESTING[mistake]
    # The last flag wins, so the mistake follows the tiny network's flags.
    network = [flag for flag in tiny if flag not in DATA] if "@tiny" in args else []
    before = listing(workdir)
    done = in_process(TEST, *DATA, *network, *(arg for arg in args if arg != "@tiny"), cwd=workdir)
    expect_refusal(done, f"{TEST}: ", *phrases)
    assert listing(workdir) == before


@pytest.mark.parametrize("split", ["test", "val"])
def test_slices_without_brain_are_refused_before_they_are_scored(workdir, in_process, tmp_path, split):
    shutil.copytree(workdir / "datasets/data", tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / split / "brainmask").iterdir():
        np.save(path, np.zeros((48, 48), np.uint8))
    done = in_process(TEST, *DATA, f"--data_dir={tmp_path}", cwd=workdir)
    expect_refusal(done, f"{tmp_path}/{split} has no brain", "preprocess again")
    assert "scoring" not in done.stderr
    (workdir / "experiments/results").rmdir()  # it is empty


def test_commands_without_a_mistake_succeed(workdir, in_process):
    for flags in ((), (*RESPACING, "5")):
        done = in_process(TEST, *DATA, "--logdir=experiments", *flags, cwd=workdir)
        assert done.code == 0, done.stderr
    shutil.rmtree(workdir / "experiments/results")


@pytest.mark.parametrize(
    ("script", "args", "phrases"),
    [
        (TRAIN, ["--dataset=phantom", "--trans=t1ce", "--data_dir=datasets/data"], ["no modality 't1ce'"]),
        (TEST, [*DATA, "--experiment_name_forward=unet_forward"], ["no experiment 'unet_forward'"]),
    ],
)
def test_a_subprocess_exits_with_code_2_and_one_line(workdir, as_subprocess, repository, script, args, phrases):
    before = listing(workdir)
    expect_refusal(as_subprocess(repository / script, *args, cwd=workdir), f"{script}: ", *phrases)
    assert listing(workdir) == before


def test_an_intact_experiment_has_a_complete_record(workdir):
    record = json.loads((workdir / "experiments" / FORWARD / "config.json").read_text())
    assert {"model_name", "training_process", "config"} <= set(record)


def test_fitting_more_slices_than_memory_holds_is_refused(workdir, in_process, tiny, monkeypatch):
    monkeypatch.setattr("utils.device.available_memory", lambda: 10**5)
    before = listing(workdir)
    done = in_process(TRAIN, *tiny, "--model_name=histogram", "--experiment_name=new", cwd=workdir)
    expect_refusal(done, "fitting all training slices needs about", "reduce --config.data.image_size")
    assert listing(workdir) == before


def test_long_training_is_announced_before_its_first_step(workdir, in_process, tiny, short):
    long = ("--config.score_model.training.iterations=100_000_000", "--config.score_model.training.batch_size=100")
    flags = [flag for flag in (*tiny, *short) if not flag.startswith(tuple(one.split("=")[0] for one in long))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("guided_diffusion.train_util.TrainLoop.run", lambda loop: None)
        done = in_process(TRAIN, *flags, *long, "--experiment_name=long", cwd=workdir)
    shutil.rmtree(workdir / "experiments/long")
    assert done.code == 0, done.stderr
    assert "hours on this CPU: use a GPU or --preset small" in done.stdout
