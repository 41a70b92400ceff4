"""Dropout with its own random numbers, FiLM in one group norm, and moving averages."""

import pytest
import torch

from guided_diffusion.nn import Dropout, film, update_ema

N = 400_003  # not a multiple of 4, so that fewer elements share the last draw


def drop(p: float, n: int = N, seed: int = 0) -> torch.Tensor:
    """Return a mask of the dropped elements."""
    torch.manual_seed(seed)
    return Dropout(p).train()(torch.ones(n)) == 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate(p):
    sigma = (p * (1 - p) / N) ** 0.5
    assert drop(p).float().mean().item() == pytest.approx(p, abs=5 * sigma)


def test_all_positions_in_a_draw_have_the_same_rate():
    dropped = drop(0.1)[: N // 4 * 4].view(-1, 4).float().mean(0)
    torch.testing.assert_close(dropped, torch.full((4,), 0.1), atol=5 * (0.09 / (N // 4)) ** 0.5, rtol=0)


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_neighbours_are_independent(distance):
    dropped = drop(0.5).float() - 0.5
    correlation = (dropped[:-distance] * dropped[distance:]).mean() / 0.25
    assert correlation.abs() < 5 / N**0.5


def test_kept_elements_are_scaled_up():
    torch.manual_seed(0)
    x = torch.randn(1000)
    y = Dropout(0.25).train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert 0 < kept.sum() < 1000


def test_gradient_flows_through_kept_elements():
    torch.manual_seed(0)
    x = torch.randn(1000, requires_grad=True)
    y = Dropout(0.25).train()(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0).float() / 0.75)


def test_seed_determines_the_mask():
    assert torch.equal(drop(0.5, 1000, seed=1), drop(0.5, 1000, seed=1))
    assert not torch.equal(drop(0.5, 1000, seed=1), drop(0.5, 1000, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_preserved(dtype):
    x = torch.ones(2, 3, 5, 7, dtype=dtype)
    y = Dropout(0.5).train()(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert set(y.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("p", [0, 1e-9])
def test_nothing_is_dropped_at_rate_0(p):
    assert not drop(p, 1000).any()


def test_everything_is_dropped_at_rate_1():
    assert drop(1, 1000).all()


def test_evaluation_mode_is_the_identity():
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)


# ----------------------------------------------------------------------------------------------------------
# FiLM and averages


@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (1, 8, 2, 2), (4, 8, 1, 1)])
def test_film_in_one_group_norm_equals_the_formula(shape):
    """In double precision, which takes the path of lower ones: value and all gradients."""
    n, c = shape[:2]
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.GroupNorm(4, c).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(c, generator=generator))
    x, weight = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    scale, shift = torch.randn(2, n, c, 1, 1, dtype=torch.float64, generator=generator)
    inputs = [x, scale, shift, *norm.parameters()]
    for tensor in inputs:
        tensor.requires_grad_(True)
    found = film(norm, x, scale, shift)
    expected = norm(x) * (1 + scale) + shift
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rate", [0.1, 0.6, 0.9999])
def test_average_with_a_tensor_as_rate(rate):
    generator = torch.Generator().manual_seed(0)
    averaged, current = ([torch.randn(size, generator=generator) for size in (3, (2, 4))] for _ in range(2))
    expected = [rate * a + (1 - rate) * b for a, b in zip(averaged, current, strict=True)]
    by_number = [a.clone() for a in averaged]
    update_ema(averaged, current, torch.tensor(rate))
    update_ema(by_number, current, rate)
    for found, number, value in zip(averaged, by_number, expected, strict=True):
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(number, value)
