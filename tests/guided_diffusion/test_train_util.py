"""The training loop on a tiny regression: optimisation, output files, stopping and resuming."""

import itertools
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_regression import TRUTH, Stop, batch_of, flat, rows_of, squared_error, stopping_at, with_dropout
from torch import nn

from guided_diffusion.resample import LossSecondMomentResampler
from utils import recording
from utils.compiling import TRAINING

# ----------------------------------------------------------------------------------------------------------
# Optimisation


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_training_in_lower_precision(train, linear, precision):
    seen = []

    def losses(model, batch, step):
        x, y = batch
        prediction = model(x)
        seen.append(prediction.dtype)
        return (prediction.float() - y).square().flatten(1).mean(1)

    train(linear, compute_losses=losses, precision=precision, iterations=300, save_interval=300)
    assert set(seen) == {precision}
    assert linear.weight.dtype == torch.float32
    torch.testing.assert_close(linear.weight.detach(), TRUTH.T, atol=0.02, rtol=0)


def test_float16_gradients_do_not_underflow(train, linear):
    """Without loss scaling, these gradients are 0 in float16 and no weight changes."""

    def losses(model, batch, step):
        x, y = batch
        return 2e-8 * (model(x).float() - y).square().flatten(1).mean(1)

    before = flat(linear)
    train(linear, compute_losses=losses, precision=torch.float16)
    assert (flat(linear) - before).abs().min() > 0.01


def test_training_converges(train, linear, tmp_path):
    train(linear, iterations=300, log_interval=50, save_interval=300)
    losses = [float(row["loss"]) for row in rows_of(tmp_path)]
    assert losses[0] > 0.1
    assert losses[-1] < 1e-4
    torch.testing.assert_close(linear.weight.detach(), TRUTH.T, atol=0.01, rtol=0)


def test_steps_agree_with_adamw(train, linear, tmp_path):
    """Loshchilov & Hutter 2019, algorithm 2, with the learning rate halved every 3 steps."""
    weights = np.append(linear.weight.detach().double().numpy(), linear.bias.item())
    m, v = np.zeros(4), np.zeros(4)
    for step in range(8):
        x, y = (values.double().numpy() for values in batch_of(step))
        x = np.hstack([x, np.ones((8, 1))])
        gradient = 2 * x.T @ (x @ weights - y[:, 0]) / 8
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        lr = 0.05 * 0.5 ** (step // 3)
        weights = weights - lr * 0.2 * weights - lr * direction
    train(linear, iterations=8, lr_decay_steps=3, weight_decay=0.2)
    np.testing.assert_allclose(flat(linear).numpy(), weights, rtol=1e-4, atol=1e-5)


def test_learning_rate_is_halved_and_logged(train, linear, tmp_path):
    train(linear, iterations=7, lr=0.08, lr_decay_steps=3, log_interval=1)
    rates = [float(row["learning_rate"]) for row in rows_of(tmp_path)]
    assert rates == pytest.approx([0.08, 0.08, 0.08, 0.04, 0.04, 0.04, 0.02])


def test_ema_has_a_warm_up(train, linear):
    weights, averages = [flat(linear).double()], []

    def record(logger, network, step):
        weights.append(flat(linear).double())
        averages.append(flat(network).double())

    train(linear, iterations=12, ema_rate=0.3, save_interval=1, on_save=record)
    rates = [min(0.3, (1 + step) / (10 + step)) for step in range(12)]
    assert rates[0] == 0.1
    assert rates[2] < rates[3] == 0.3  # covers both arguments of min
    expected = weights[0]
    for rate, now, average in zip(rates, weights[1:], averages, strict=True):
        expected = rate * expected + (1 - rate) * now
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(average, now, atol=1e-4)


def test_frozen_parameters_do_not_change(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before = flat(model[0]), flat(model[1])
    loop = train(model, weight_decay=0.5)
    assert torch.equal(flat(model[0]), before[0])
    assert torch.equal(flat(loop.ema_model[0]), before[0])
    assert not torch.equal(flat(model[1]), before[1])


def test_losses_and_batches_get_the_step(train, linear):
    calls = []

    def losses(model, batch, step):
        calls.append((step, torch.equal(batch[0], batch_of(step)[0]), model.training))
        return squared_error(model, batch, step)

    train(linear, iterations=3, compute_losses=losses)
    assert calls == [(0, True, True), (1, True, True), (2, True, True)]


# ----------------------------------------------------------------------------------------------------------
# Output


def test_files(train, linear, tmp_path):
    loop = train(linear, iterations=5, ema_rate=0.9999)
    steps = ("000002", "000004", "000005")  # the last step is always saved
    expected = {f"{kind}{step}.pt" for kind in ("model", "ema_0.9999_", "opt") for step in steps}
    assert {path.name for path in tmp_path.glob("*.pt")} == expected
    for name, network in (("model000005.pt", loop.model), ("ema_0.9999_000005.pt", loop.ema_model)):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved.keys() == {"weight", "bias"}
        assert all(torch.equal(saved[key], value) for key, value in network.state_dict().items())


def test_progress_has_a_row_per_interval_and_at_the_end(train, linear, tmp_path):
    losses = []

    def recorded(model, batch, step):
        losses.append(squared_error(model, batch, step))
        return losses[-1]

    train(linear, iterations=5, compute_losses=recorded)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["step", "loss", "learning_rate", "images_per_second"]
    assert [row["step"] for row in rows] == ["2", "4", "5"]
    means = [loss.mean().item() for loss in losses]
    expected = [np.mean(means[:2]), np.mean(means[2:4]), means[4]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(expected, rel=1e-4)
    assert all(float(row["images_per_second"]) > 0 for row in rows)


def test_images_per_second(train, linear, tmp_path, monkeypatch):
    clock = itertools.count(100.0, 0.5)  # read at the start, and twice per row
    monkeypatch.setattr("guided_diffusion.train_util.time.monotonic", lambda: next(clock))
    train(linear, iterations=4)
    assert [float(row["images_per_second"]) for row in rows_of(tmp_path)] == [2 * 8 / 0.5] * 2


def test_tensorboard_has_the_scalars_and_the_image(train, linear, tmp_path):
    def picture(logger, network, step):
        logger.image(step, "a picture", np.linspace(0, 1, 12).reshape(3, 4))

    train(linear, iterations=5, on_save=picture)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate", "images_per_second"}
    for row, name in itertools.product(rows_of(tmp_path), events.Tags()["scalars"]):
        (value,) = [event.value for event in events.Scalars(name) if event.step == int(row["step"])]
        assert value == pytest.approx(float(row[name]), rel=1e-4)
    images = events.Images("a picture")
    assert [image.step for image in images] == [2, 4, 5]
    assert {(image.height, image.width) for image in images} == {(3, 4)}


def test_on_save_gets_the_averaged_network(train, linear):
    seen = []

    def record(logger, network, step):
        seen.append((step, flat(network), network.training))

    loop = train(linear, iterations=3, on_save=record)
    assert [(step, training) for step, _, training in seen] == [(2, False), (3, False)]
    assert torch.equal(seen[-1][1], flat(loop.ema_model))
    assert not torch.equal(seen[0][1], seen[1][1])


def test_log_lists_saved_checkpoints(train, linear, tmp_path):
    train(linear, iterations=3)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("saved ema_0.9_000002.pt after 2 steps")
    assert lines[1].endswith("saved ema_0.9_000003.pt after 3 steps")


# ----------------------------------------------------------------------------------------------------------
# Stopping and resuming


@pytest.mark.parametrize("stop_at", [2, 5])
def test_resumed_run_equals_uninterrupted_run(train, tmp_path, stop_at):
    full_run = train(with_dropout(0), "whole")
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", batches_from=stopping_at(stop_at))
    torch.manual_seed(99)
    resumed = train(with_dropout(1), "parts")  # fresh weights that the checkpoint replaces
    assert resumed.step == full_run.step == 6
    assert torch.equal(flat(resumed.model), flat(full_run.model))
    assert torch.equal(flat(resumed.ema_model), flat(full_run.ema_model))
    for name in ("model000006.pt", "ema_0.9_000006.pt"):
        a, b = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [[row["loss"] for row in rows_of(tmp_path / folder)] for folder in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert f"resuming from opt{stop_at // 2 * 2:06d}.pt" in (tmp_path / "parts" / "log.txt").read_text()


def test_seed_determines_dropout(train):
    ends = [flat(train(with_dropout(0), str(i), seed=seed).model) for i, seed in enumerate((0, 0, 5))]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_dropout_differs_between_steps_and_seeds(train):
    """Nor does seed s + 1 repeat the masks of seed s one step later."""
    dropped = []

    def record(module, inputs, output):
        dropped.append((output == 0) & (inputs[0] != 0))

    for seed in range(3):
        model = with_dropout(0)
        model[1].register_forward_hook(record)
        train(model, str(seed), seed=seed, iterations=3)
    assert len(dropped) == 9
    assert all(0.2 < mask.float().mean() < 0.8 for mask in dropped)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(dropped, 2))


def test_a_longer_run_resumes_the_optimizer(train):
    train(with_dropout(0), "short", iterations=3)
    longer = train(with_dropout(1), "short", iterations=6)
    assert torch.equal(flat(longer.model), flat(train(with_dropout(0), "whole").model))


def test_a_finished_run_is_logged_and_not_modified(train, linear, tmp_path):
    train(linear)
    before = {path.name: path.read_bytes() for path in [*tmp_path.glob("*.pt"), tmp_path / "progress.csv"]}
    train(nn.Linear(3, 1))
    assert "already finished: 6 of 6 steps" in (tmp_path / "log.txt").read_text()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.glob("*.pt"))) == len(before) - 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_loss_stops_training(train, linear, tmp_path, bad):
    def losses(model, batch, step):
        return squared_error(model, batch, step) * (bad if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match=f"the loss is {bad} after 4 steps"):
        train(linear, compute_losses=losses)
    assert not list(tmp_path.glob("*000004.pt"))  # the broken state is not saved
    assert [row["step"] for row in rows_of(tmp_path)] == ["2"]


# ----------------------------------------------------------------------------------------------------------
# Recorded steps, with a stand-in for CUDA graphs


def test_recorded_steps_equal_plain_ones(train, tmp_path, request, graphs):
    """Every step, with dropout, and a learning rate and an EMA rate that change while steps are replayed."""
    steps = {"iterations": 9, "save_interval": 1, "lr_decay_steps": 3, "ema_rate": 0.6}
    train(with_dropout(0), "recorded", **steps)
    assert len(graphs) == 2  # gradients and update
    request.getfixturevalue("no_capture")
    train(with_dropout(0), "plain", **steps)
    assert len(graphs) == 2
    assert "cannot be recorded" not in (tmp_path / "recorded" / "log.txt").read_text()
    log = (tmp_path / "plain" / "log.txt").read_text()
    for name in ("gradients", "the optimizer's step"):
        assert log.count(f"{name} cannot be recorded as a CUDA graph (operation not permitted): slower") == 1
    for path in (tmp_path / "plain").glob("*.pt"):
        ours, theirs = (
            torch.load(tmp_path / folder / path.name, weights_only=True) for folder in ("recorded", "plain")
        )
        assert_equal(ours, theirs)


def assert_equal(a, b):
    """Compare nested dictionaries and lists, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_recorded_training_is_resumed_exactly(train, graphs):
    full_run = train(with_dropout(0), "whole", iterations=9)
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", iterations=9, batches_from=stopping_at(7))
    resumed = train(with_dropout(1), "parts", iterations=9)
    assert torch.equal(flat(resumed.model), flat(full_run.model))
    assert torch.equal(flat(resumed.ema_model), flat(full_run.ema_model))


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_checkpoints_move_between_devices(train, tmp_path, request, monkeypatch, first):
    """A run on the CPU continues as on a GPU, and the reverse, close to one that never moved."""
    options = {"iterations": 8, "weight_decay": 0.1, "lr_decay_steps": 3}
    expected = train(with_dropout(0), "whole", **options)

    def as_on_a_gpu(here):
        if here:
            request.getfixturevalue("graphs")
        monkeypatch.setattr(recording, "available", lambda device: here)

    as_on_a_gpu(first == "gpu")
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", batches_from=stopping_at(4), **options)
    (group,) = torch.load(tmp_path / "parts" / "opt000004.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["lr"], group["capturable"]) == (0.025, False)
    as_on_a_gpu(first == "cpu")
    moved = train(with_dropout(1), "parts", **options)
    assert "resuming from opt000004.pt" in (tmp_path / "parts" / "log.txt").read_text()
    torch.testing.assert_close(flat(moved.model), flat(expected.model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat(moved.ema_model), flat(expected.ema_model), rtol=1e-4, atol=1e-5)


def test_moments_in_another_layout_are_resumed(train, tmp_path):
    """As saved on a GPU by a version that trained in channels-last."""

    def losses(model, batch, step):
        return model(batch[0].view(8, 3, 1, 1).expand(8, 3, 2, 2)).flatten(1).square().mean(1)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))

    expected = train(network(), "whole", compute_losses=losses)
    with pytest.raises(Stop):
        train(network(), "parts", compute_losses=losses, batches_from=stopping_at(4))
    path = tmp_path / "parts" / "opt000004.pt"
    saved = torch.load(path, weights_only=True)
    for moments in saved["optimizer"]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            if moments[key].ndim == 4:
                moments[key] = moments[key].contiguous(memory_format=torch.channels_last)
    torch.save(saved, path)
    assert torch.equal(flat(train(network(), "parts", compute_losses=losses).model), flat(expected.model))


def test_bfloat16_weights_are_copies_of_those_that_are_trained(train, linear, graphs):
    seen = set()

    def losses(model, batch, step):
        x, y = batch
        seen.add((model.weight.dtype, model.training))
        return (model(x.to(model.weight.dtype)).float() - y).square().flatten(1).mean(1)

    train(linear, compute_losses=losses, precision=torch.bfloat16, iterations=300, save_interval=300)
    assert seen == {(torch.bfloat16, True)}
    assert linear.weight.dtype == torch.float32
    torch.testing.assert_close(linear.weight.detach(), TRUTH.T, atol=0.02, rtol=0)
    assert len(graphs) == 2


def test_a_copys_buffers_are_those_of_the_model(train, graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    loop = train(model)
    assert model[1].num_batches_tracked == 6
    assert model[1].running_mean.abs().min() > 0
    assert torch.equal(loop.train_step.network[1].running_var, model[1].running_var)


def test_float16_is_not_recorded(train, linear, tmp_path, graphs):
    def losses(model, batch, step):
        x, y = batch
        return (model(x).float() - y).square().flatten(1).mean(1)

    train(linear, compute_losses=losses, precision=torch.float16)
    reason = "training steps are not recorded as CUDA graphs (float16 scales its gradients by their size): slower"
    assert (tmp_path / "log.txt").read_text().count(reason) == 1
    assert graphs == []


def test_a_sampler_that_reads_losses_is_not_recorded(train, linear, tmp_path, graphs, make_diffusion):
    sampler = LossSecondMomentResampler(make_diffusion(use_timesteps=[0, 500]), history_per_term=2)
    train(linear, schedule_sampler=sampler)
    reason = "training steps are not recorded as CUDA graphs (the schedule sampler waits for the losses): slower"
    assert (tmp_path / "log.txt").read_text().count(reason) == 1
    assert graphs == []


def test_the_copy_is_compiled_before_the_first_step(train, linear, monkeypatch, graphs):
    calls = []

    def compiled(network, call, samples, cost, report):
        calls.append((network, samples, cost))
        loss, gradients = call(network)
        assert loss > 0
        assert [gradient.shape for gradient in gradients] == [(1, 3), (1,)]
        return network

    monkeypatch.setattr("utils.compiling.compiled", compiled)
    loop = train(linear, compile_for=48, iterations=6)
    assert calls == [(loop.train_step.network, 48, TRAINING)]
    assert loop.train_step.network is not linear
