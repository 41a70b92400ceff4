"""Schedule samplers: the distribution of their draws, and weights that keep the loss unbiased."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from guided_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler

STEPS = 20  # the fewest that the linear schedule allows
HISTORY = 10


@pytest.fixture
def diffusion(make_diffusion):
    return make_diffusion(STEPS)


@pytest.fixture
def losses() -> np.ndarray:
    """Losses of each timestep [STEPS, HISTORY + 2], oldest first, 100 times as large at the first as at the last."""
    rng = np.random.default_rng(0)
    return rng.gamma(2.0, size=(STEPS, HISTORY + 2)) * np.geomspace(5, 0.05, STEPS)[:, None]


def record(sampler, losses):
    for column in losses.T:
        sampler.update(torch.arange(STEPS), torch.from_numpy(column))


def weights_per_timestep(sampler):
    """Return the weights given by `sample`, float64 [STEPS], after checking that they are constant per timestep."""
    t, weights = sampler.sample(100_000, torch.Generator().manual_seed(0))
    assert t.shape == weights.shape == (100_000,)
    assert t.dtype == torch.int64
    assert weights.dtype == torch.float32
    found = np.full(STEPS, np.nan)
    for step in range(STEPS):
        (found[step],) = weights[t == step].unique().tolist()
    return found


def test_uniform_draws_have_weight_1(diffusion):
    sampler = create_named_schedule_sampler("uniform", diffusion)
    np.testing.assert_allclose(weights_per_timestep(sampler), 1.0, rtol=1e-6)
    t, _ = sampler.sample(20_000, torch.Generator().manual_seed(1))
    assert chisquare(np.bincount(t, minlength=STEPS)).pvalue > 0.01


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_draws_depend_only_on_the_generator(diffusion, name):
    draws = [
        create_named_schedule_sampler(name, diffusion).sample(50, torch.Generator().manual_seed(seed))[0]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_second_moment_is_uniform_until_every_history_is_full(diffusion, losses):
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    record(sampler, losses[:, : HISTORY - 1])
    sampler.update(torch.arange(STEPS - 1), torch.from_numpy(losses[:-1, HISTORY - 1]))
    np.testing.assert_allclose(weights_per_timestep(sampler), 1.0, rtol=1e-6)
    sampler.update(torch.tensor([STEPS - 1]), torch.from_numpy(losses[-1:, HISTORY - 1]))
    assert np.ptp(weights_per_timestep(sampler)) > 1


def second_moment_probabilities(losses):
    """Return √E[L²] over the last losses, normalised and mixed with 0.1 % of a uniform distribution."""
    p = np.sqrt((losses[:, -HISTORY:] ** 2).mean(1))
    return 0.999 * p / p.sum() + 0.001 / STEPS


def test_second_moment_draws_follow_its_probabilities(diffusion, losses):
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    record(sampler, losses)
    expected = second_moment_probabilities(losses)
    t, _ = sampler.sample(20_000, torch.Generator().manual_seed(1))
    assert chisquare(np.bincount(t, minlength=STEPS), 20_000 * expected).pvalue > 0.01
    np.testing.assert_allclose(weights_per_timestep(sampler), 1 / (STEPS * expected), rtol=1e-5)


def test_second_moment_is_unbiased(diffusion, losses):
    """Σ p_t w_t L_t is the mean of L_t for any subsequent losses."""
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    record(sampler, losses)
    following = np.random.default_rng(1).gamma(1.0, size=STEPS)
    expectation = np.sum(second_moment_probabilities(losses) * weights_per_timestep(sampler) * following)
    assert expectation == pytest.approx(following.mean(), rel=1e-5)


def test_second_moment_accepts_several_losses_of_one_timestep(diffusion):
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2, uniform_prob=0.0)
    record(sampler, np.ones((STEPS, 2)))
    sampler.update(torch.tensor([4, 4]), torch.tensor([3.0, 4.0]))
    weights = sampler.weights()
    assert weights[4] / weights[0] == pytest.approx(np.sqrt((3**2 + 4**2) / 2))


def test_unknown_sampler(diffusion):
    with pytest.raises(ValueError, match=r"'loss'.*uniform or loss-second-moment"):
        create_named_schedule_sampler("loss", diffusion)
