"""Respacing: the timesteps that are kept, and the process on these."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import space_timesteps

KEPT = [0, 3, 4, 10, 39]
STEPS = 40
SHAPE = (2, 1, 3, 3)


def original_alpha_bar(steps=STEPS):
    return np.cumprod(1 - get_named_beta_schedule("linear", steps))


# ----------------------------------------------------------------------------------------------------------
# space_timesteps


def test_a_count_spans_all_timesteps_evenly():
    kept = sorted(space_timesteps(1000, "100"))
    assert len(kept) == 100
    assert kept[0] == 0
    assert kept[-1] == 999
    assert set(np.diff(kept)) == {10, 11}  # 999 / 99 = 10.09


@pytest.mark.parametrize("count", [1, 2, 7, 500, 999, 1000])
def test_number_of_kept_timesteps(count):
    kept = space_timesteps(1000, str(count))
    assert len(kept) == count
    assert min(kept) == 0
    assert count == 1 or max(kept) == 999


def test_ddim_uses_integer_strides():
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert space_timesteps(1000, "ddim100") == set(range(0, 1000, 10))
    assert space_timesteps(10, "ddim4") == {0, 3, 6, 9}


@pytest.mark.parametrize(
    ("count", "kept"),
    [(1, {999}), (2, {499, 999}), (3, {332, 666, 999}), (4, {249, 499, 749, 999}), (1000, set(range(1000)))],
)
def test_trailing_keeps_the_last_step_and_not_the_first(count, kept):
    assert space_timesteps(1000, f"trailing{count}") == kept


@pytest.mark.parametrize("count", [1, 2, 7, 33, 500, 999])
def test_trailing_steps_are_evenly_spaced(count):
    kept = sorted(space_timesteps(1000, f"trailing{count}"))
    assert len(kept) == count
    gaps = np.diff([-1, *kept])  # including the one from x_0
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("everything", ["", [], "1000", "ddim1000", [1000]])
def test_all_steps(everything):
    assert space_timesteps(1000, everything) == set(range(1000))


@pytest.mark.parametrize("counts", ["10,15,20", [10, 15, 20], (10, 15, 20)])
def test_sections(counts):
    kept = sorted(space_timesteps(300, counts))
    for section, count in enumerate((10, 15, 20)):
        here = [t for t in kept if section * 100 <= t < (section + 1) * 100]
        assert len(here) == count
        assert (here[0], here[-1]) == (section * 100, section * 100 + 99)
        assert max(np.diff(here)) - min(np.diff(here)) <= 1


def test_the_first_sections_are_longer_if_lengths_differ():
    assert space_timesteps(10, [2, 2, 2]) == {0, 3, 4, 6, 7, 9}  # 4 + 3 + 3 steps


@pytest.mark.parametrize(
    "wrong",
    [
        *("x", "-5", "10.5", "10,,5", "0", "1001", "600,1", [0], [5, 501]),
        *("ddim", "ddimx", "ddim999", "ddim0", "trailing", "trailing0", "trailing1001"),
    ],
)
def test_invalid_respacing(wrong):
    with pytest.raises(ValueError, match=r"timestep"):
        space_timesteps(1000, wrong)


# ----------------------------------------------------------------------------------------------------------
# SpacedDiffusion


@pytest.mark.parametrize("use_timesteps", [KEPT, set(KEPT), list(reversed(KEPT))])
def test_marginals_are_those_of_the_kept_steps(make_diffusion, use_timesteps):
    spaced = make_diffusion(STEPS, use_timesteps=use_timesteps)
    assert spaced.num_timesteps == len(KEPT)
    np.testing.assert_allclose(np.cumprod(1 - spaced.betas), original_alpha_bar()[KEPT], rtol=1e-9)
    x_start, noise = torch.ones(5, 1), torch.full((5, 1), 2.0)
    t = torch.arange(5)
    original = make_diffusion(STEPS).q_sample(x_start, torch.tensor(KEPT), noise)
    torch.testing.assert_close(spaced.q_sample(x_start, t, noise), original)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_the_model_gets_the_original_timesteps(make_diffusion, sampler, rescale):
    spaced, received = make_diffusion(STEPS, use_timesteps=KEPT, rescale_timesteps=rescale), []

    def model(x, t):
        received.append(t.tolist())
        return x

    torch.manual_seed(0)
    getattr(spaced, sampler)(model, SHAPE)
    unit = 1000 / STEPS if rescale else 1
    assert received == [[t * unit] * 2 for t in reversed(KEPT)]


def test_training_passes_the_original_timesteps(make_diffusion):
    received = []

    def model(x, t):
        received.append(t.tolist())
        return x

    make_diffusion(STEPS, use_timesteps=KEPT).training_losses(model, torch.zeros(SHAPE), torch.tensor([1, 4]))
    assert received == [[3, 39]]


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("var_type", list(ModelVarType))
@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_keeping_all_steps_changes_nothing(make_diffusion, mean_type, var_type, sampler):
    diffusions = [
        make_diffusion(STEPS, mean_type, var_type),
        make_diffusion(STEPS, mean_type, var_type, use_timesteps=list(range(STEPS))),
    ]
    np.testing.assert_allclose(diffusions[0].betas, diffusions[1].betas, rtol=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(STEPS, *SHAPE, generator=generator)
    samples = [
        getattr(diffusion, sampler)(
            lambda x, t: 0.5 * x + 0.01 * t.reshape(-1, 1, 1, 1), SHAPE, noise=noise[0], step_noise=lambda t: noise[t]
        )
        for diffusion in diffusions
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-5, atol=1e-5)


def test_ddim_over_kept_steps_agrees_with_the_closed_form(make_diffusion):
    """For Gaussian data and the ideal denoiser, as in test_gaussian_diffusion.py."""
    mean, std, kept = 0.7, 0.4, sorted(space_timesteps(1000, "10"))
    spaced, alpha_bar = make_diffusion(1000, use_timesteps=kept), original_alpha_bar(1000)

    def model(x, t):
        a = torch.from_numpy(alpha_bar)[t].reshape(-1, 1, 1, 1)
        return (std**2 * a.sqrt() * x + (1 - a) * mean) / (std**2 * a + 1 - a)

    x_last = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = spaced.ddim_sample_loop(model, SHAPE, noise=x_last, clip_denoised=False)
    sigma = np.sqrt(1 / alpha_bar[kept] - 1)
    factor = np.prod((std**2 + sigma * np.array([0.0, *sigma[:-1]])) / (std**2 + sigma**2))
    expected = mean + factor * (x_last.numpy() / math.sqrt(alpha_bar[-1]) - mean)
    np.testing.assert_allclose(sample.numpy(), expected, rtol=3e-5)


@pytest.mark.parametrize("use_timesteps", [[], [-1, 3], [3, STEPS]])
def test_invalid_use_timesteps(make_diffusion, use_timesteps):
    with pytest.raises(ValueError, match=f"0 … {STEPS - 1}"):
        make_diffusion(STEPS, use_timesteps=use_timesteps)
