"""The diffusion against Bayes' rule, and its samplers on Gaussian data, for which the ideal denoiser is known.

For data N(m, s²), with σ_t² = (1 − ᾱ_t) / ᾱ_t and y_t = x_t / √ᾱ_t, the ideal prediction of x_0 is
E[x_0 | x_t] = (s² y_t + σ_t² m) / (s² + σ_t²). All closed forms below are float64 numpy.
"""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)

STEPS = 40
MEAN, STD = 0.7, 0.4  # of the data
SHAPE = (3, 2, 4, 4)


def cumulative(betas):
    """Return ᾱ of every step and of the step before it, by definition."""
    alpha_bar = np.array([np.prod(1 - betas[: i + 1]) for i in range(len(betas))])
    return alpha_bar, np.array([1.0, *alpha_bar[:-1]])


def bayes_posterior(x_start, x_t, t, betas):
    """Mean and variance of q(x_{t-1} | x_t, x_0): the prior N(√ᾱ' x_0, 1 − ᾱ') times N(x_t; √(1−β) x_{t-1}, β)."""
    _, before = cumulative(betas)
    prior_precision, likelihood_precision = 1 / (1 - before[t]), (1 - betas[t]) / betas[t]
    prior_mean, likelihood_mean = math.sqrt(before[t]) * x_start, x_t / math.sqrt(1 - betas[t])
    precision = prior_precision + likelihood_precision
    mean = (prior_precision * prior_mean + likelihood_precision * likelihood_mean) / precision
    return mean, 1 / precision


def ideal_denoiser(diffusion, mean, std):
    """Return a model of E[x_0 | x_t], or of E[ε | x_t] if the diffusion's model predicts noise."""
    alpha_bar = torch.from_numpy(cumulative(diffusion.betas)[0])

    def model(x, t):
        at = alpha_bar[t].reshape(-1, *[1] * (x.ndim - 1))
        x_start = (std**2 * at.sqrt() * x + (1 - at) * mean) / (std**2 * at + 1 - at)
        if diffusion.model_mean_type is ModelMeanType.START_X:
            return x_start
        return (x - at.sqrt() * x_start) / (1 - at).sqrt()

    return model


def no_noise(step):
    raise AssertionError(f"noise was asked for in step {step}")


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def step_noises(normal):
    return normal(STEPS, *SHAPE)


# ----------------------------------------------------------------------------------------------------------
# Schedules


def test_linear_schedule_agrees_with_ddpm():
    betas = get_named_beta_schedule("linear", 1000)
    assert betas.dtype == np.float64
    assert len(betas) == 1000
    assert betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-12)
    assert np.diff(betas) == pytest.approx((0.02 - 1e-4) / 999, rel=1e-6)


def test_linear_schedule_with_fewer_steps_ends_at_the_same_noise_level():
    ends = [np.log(cumulative(get_named_beta_schedule("linear", n))[0][-1]) for n in (1000, 500)]
    assert get_named_beta_schedule("linear", 500)[[0, -1]] == pytest.approx([2e-4, 0.04], rel=1e-12)
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


def test_cosine_schedule_agrees_with_its_definition():
    betas = get_named_beta_schedule("cosine", 300)
    f = np.cos((np.arange(301) / 300 + 0.008) / 1.008 * np.pi / 2) ** 2
    clipped = betas >= 0.999
    assert clipped.sum() == 1  # the last one, which would otherwise be 1
    assert betas[-1] == 0.999
    assert cumulative(betas)[0][:-1] == pytest.approx(f[1:-1] / f[0], rel=1e-9)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"'sigmoid'.*linear or cosine"):
        get_named_beta_schedule("sigmoid", 10)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.1], [[0.1, 0.2]], [0.1, float("nan")]])
def test_invalid_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(
            betas=np.array(betas),
            model_mean_type=ModelMeanType.START_X,
            model_var_type=ModelVarType.FIXED_LARGE,
            loss_type=LossType.MSE,
        )


# ----------------------------------------------------------------------------------------------------------
# The forward process and its posterior


def test_q_sample_with_given_noise(make_diffusion, normal):
    diffusion, t = make_diffusion(STEPS), [0, 7, STEPS - 1]
    x_start, noise = normal(*SHAPE), normal(*SHAPE)
    x_t = diffusion.q_sample(x_start, torch.tensor(t), noise)
    alpha_bar = cumulative(get_named_beta_schedule("linear", STEPS))[0][t].reshape(-1, 1, 1, 1)
    expected = np.sqrt(alpha_bar) * x_start.numpy() + np.sqrt(1 - alpha_bar) * noise.numpy()
    np.testing.assert_allclose(x_t.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_q_sample_has_the_moments_of_q(make_diffusion):
    torch.manual_seed(0)
    diffusion, t, n = make_diffusion(), [5, 200, 999], 100_000
    x_start = torch.tensor([2.0, -3.0, 1.5])[:, None].expand(3, n)
    x_t = diffusion.q_sample(x_start, torch.tensor(t)).double()
    alpha_bar = cumulative(get_named_beta_schedule("linear", 1000))[0][t]
    mean, variance = np.sqrt(alpha_bar) * [2.0, -3.0, 1.5], 1 - alpha_bar
    # Five standard errors of a mean and of a variance of n normal draws.
    assert np.all(np.abs(x_t.mean(1).numpy() - mean) < 5 * np.sqrt(variance / n))
    assert np.all(np.abs(x_t.var(1).numpy() / variance - 1) < 5 * math.sqrt(2 / n))
    assert abs(np.corrcoef(x_t.numpy())[0, 1]) < 5 / math.sqrt(n)


def test_posterior_agrees_with_bayes_rule(make_diffusion, normal):
    diffusion, betas = make_diffusion(STEPS), get_named_beta_schedule("linear", STEPS)
    x_start, x_t = normal(1, 1, 3, 3), normal(1, 1, 3, 3)
    for t in range(1, STEPS):
        mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, torch.tensor([t]))
        expected_mean, expected_variance = bayes_posterior(x_start.numpy(), x_t.numpy(), t, betas)
        np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-5, atol=1e-6)
        assert variance.item() == pytest.approx(expected_variance, rel=1e-5)
        assert log_variance.item() == pytest.approx(math.log(expected_variance), rel=1e-5)


def test_posterior_of_the_first_step_is_x_start(make_diffusion, normal):
    diffusion, betas = make_diffusion(STEPS), get_named_beta_schedule("linear", STEPS)
    x_start = normal(1, 1, 3, 3)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, normal(1, 1, 3, 3), torch.tensor([0]))
    np.testing.assert_allclose(mean.numpy(), x_start.numpy(), rtol=1e-6)
    assert variance.item() == 0
    # log 0 is replaced by the log-variance of the next step.
    assert log_variance.item() == pytest.approx(math.log(bayes_posterior(0.0, 0.0, 1, betas)[1]), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Model evaluation


@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_p_mean_variance(make_diffusion, normal, var_type):
    diffusion = make_diffusion(STEPS, var_type=var_type)
    betas, x, prediction = get_named_beta_schedule("linear", STEPS), normal(2, 1, 3, 3), normal(2, 1, 3, 3)
    t = [1, 30]
    out = diffusion.p_mean_variance(lambda x, t: prediction, x, torch.tensor(t), clip_denoised=False)
    assert torch.equal(out["pred_xstart"], prediction)
    for i, step in enumerate(t):
        mean, variance = bayes_posterior(prediction[i].numpy(), x[i].numpy(), step, betas)
        if var_type is ModelVarType.FIXED_LARGE:
            variance = betas[step]
        np.testing.assert_allclose(out["mean"][i].numpy(), mean, rtol=1e-5, atol=1e-6)
        assert out["variance"].expand_as(x)[i].numpy() == pytest.approx(variance, rel=1e-5)
        assert out["log_variance"].expand_as(x)[i].numpy() == pytest.approx(math.log(variance), rel=1e-5)


@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_first_log_variance_is_that_of_the_second_steps_posterior(make_diffusion, normal, var_type):
    diffusion = make_diffusion(STEPS, var_type=var_type)
    out = diffusion.p_mean_variance(lambda x, t: x, normal(1, 1, 2, 2), torch.tensor([0]))
    _, variance = bayes_posterior(0.0, 0.0, 1, get_named_beta_schedule("linear", STEPS))
    assert out["log_variance"].item() == pytest.approx(math.log(variance), rel=1e-5)


@pytest.mark.parametrize("clip_denoised", [True, False])
def test_clip_denoised(make_diffusion, normal, clip_denoised):
    diffusion, t = make_diffusion(STEPS), torch.tensor([20])
    x, prediction = normal(1, 1, 3, 3), torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    out = diffusion.p_mean_variance(lambda x, t: prediction, x, t, clip_denoised=clip_denoised)
    expected = np.clip(prediction.numpy(), -1, 1) if clip_denoised else prediction.numpy()
    np.testing.assert_array_equal(out["pred_xstart"].numpy(), expected)
    mean, _ = bayes_posterior(expected, x.numpy(), 20, get_named_beta_schedule("linear", STEPS))
    np.testing.assert_allclose(out["mean"].numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_pass_on_clip_denoised(make_diffusion, normal, sampler):
    diffusion, x_last = make_diffusion(STEPS), normal(*SHAPE)
    loop = getattr(diffusion, sampler)
    samples = {
        clip: loop(
            lambda x, t: torch.full_like(x, 4.0),
            SHAPE,
            noise=x_last,
            clip_denoised=clip,
            step_noise=lambda t: torch.zeros(SHAPE),
        )
        for clip in (True, False)
    }
    # The last step's mean is the predicted x_0 itself.
    np.testing.assert_allclose(samples[True].numpy(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(samples[False].numpy(), 4.0, rtol=1e-5)


def test_predicting_noise_is_equivalent_to_predicting_x_start(make_diffusion, normal, step_noises):
    start, eps = (make_diffusion(STEPS, mean_type=kind) for kind in ModelMeanType)
    assert (start.model_mean_type, eps.model_mean_type) == (ModelMeanType.START_X, ModelMeanType.EPSILON)
    models = [ideal_denoiser(diffusion, MEAN, STD) for diffusion in (start, eps)]
    x, t = normal(*SHAPE), torch.tensor([0, 15, STEPS - 1])
    outs = [
        diffusion.p_mean_variance(model, x, t, clip_denoised=False)
        for diffusion, model in zip((start, eps), models, strict=True)
    ]
    for key in ("mean", "variance", "pred_xstart"):
        np.testing.assert_allclose(outs[0][key].numpy(), outs[1][key].numpy(), rtol=1e-4, atol=1e-5)
    for sampler in ("p_sample_loop", "ddim_sample_loop"):
        samples = [
            getattr(diffusion, sampler)(model, SHAPE, noise=x, clip_denoised=False, step_noise=lambda t: step_noises[t])
            for diffusion, model in zip((start, eps), models, strict=True)
        ]
        np.testing.assert_allclose(samples[0].numpy(), samples[1].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["p_sample", "ddim_sample", "p_mean_variance", "training_losses"])
def test_the_model_gets_the_timesteps_and_the_condition(make_diffusion, normal, method):
    diffusion, calls = make_diffusion(STEPS), []
    x, t, condition = normal(*SHAPE), torch.tensor([0, 3, 39]), {"image": normal(*SHAPE), "number": 5}

    def model(x, timesteps, **kwargs):
        calls.append((timesteps, kwargs))
        return x

    getattr(diffusion, method)(model, x, t, model_kwargs=condition)
    ((timesteps, kwargs),) = calls
    assert timesteps.tolist() == [0, 3, 39]
    assert kwargs.keys() == condition.keys()
    assert all(kwargs[key] is condition[key] for key in condition)


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_run_all_steps_in_descending_order_with_the_condition(make_diffusion, sampler):
    diffusion, calls = make_diffusion(STEPS), []

    def model(x, timesteps, image):
        calls.append((*timesteps.tolist(), image))
        return x

    torch.manual_seed(0)
    sample = getattr(diffusion, sampler)(model, SHAPE, model_kwargs={"image": 7})
    assert sample.shape == SHAPE
    assert calls == [(step, step, step, 7) for step in range(STEPS - 1, -1, -1)]


@pytest.mark.parametrize("steps", [STEPS, 2000])
def test_rescale_timesteps(make_diffusion, steps):
    diffusion, calls = make_diffusion(steps, rescale_timesteps=True), []

    def model(x, timesteps):
        calls.append(timesteps)
        return x

    diffusion.p_mean_variance(model, torch.zeros(2, 1, 1, 1), torch.tensor([3, steps - 1]))
    assert calls[0].tolist() == pytest.approx([3 * 1000 / steps, (steps - 1) * 1000 / steps])


# ----------------------------------------------------------------------------------------------------------
# DDIM


def ddim_contraction(betas, std):
    """Return the factor by which DDIM at η = 0 scales x_T / √ᾱ_T − m, for data N(m, std²) and the ideal denoiser.

    A DDIM step is y' = y + (σ' − σ) E[ε | y], and E[ε | y] = σ (y − m) / (std² + σ²): each step multiplies y − m
    by (std² + σ σ') / (std² + σ²).
    """
    alpha_bar, before = cumulative(betas)
    sigma, after = np.sqrt((1 - alpha_bar) / alpha_bar), np.sqrt((1 - before) / before)
    return np.prod((std**2 + sigma * after) / (std**2 + sigma**2))


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("std", [STD, 1.0, 3.0])
def test_ddim_on_gaussian_data_agrees_with_the_closed_form(make_diffusion, normal, std, mean_type):
    diffusion, x_last = make_diffusion(STEPS, mean_type=mean_type), normal(*SHAPE)
    sample = diffusion.ddim_sample_loop(
        ideal_denoiser(diffusion, MEAN, std), SHAPE, noise=x_last, clip_denoised=False, step_noise=no_noise
    )
    betas = get_named_beta_schedule("linear", STEPS)
    start = x_last.numpy() / math.sqrt(cumulative(betas)[0][-1]) - MEAN
    np.testing.assert_allclose(sample.numpy(), MEAN + ddim_contraction(betas, std) * start, rtol=3e-5, atol=1e-5)


def test_ddim_with_many_steps_recovers_the_data(make_diffusion, normal):
    diffusion, shape = make_diffusion(1000), (1, 1, 100, 100)
    sample = diffusion.ddim_sample_loop(
        ideal_denoiser(diffusion, MEAN, STD), shape, noise=normal(*shape), clip_denoised=False
    )
    # With infinitely many steps DDIM maps N(0, 1) to N(m, s²); 10,000 draws have a mean within 5 · 0.004 and a
    # standard deviation within 3.5 %.
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert sample.std().item() == pytest.approx(STD, rel=0.05)


def test_ddim_contraction_converges_to_that_of_the_probability_flow():
    gaps = []
    for steps in (100, 1000, 10_000):
        betas = get_named_beta_schedule("linear", steps)
        sigma_last = math.sqrt(1 / np.prod(1 - betas) - 1)
        gaps.append(abs(ddim_contraction(betas, STD) / (STD / math.hypot(STD, sigma_last)) - 1))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.005


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_ddim_recovers_constant_data(make_diffusion, normal, mean_type):
    diffusion = make_diffusion(STEPS, mean_type=mean_type)
    sample = diffusion.ddim_sample_loop(
        ideal_denoiser(diffusion, MEAN, 0.0), SHAPE, noise=normal(*SHAPE), clip_denoised=False
    )
    np.testing.assert_allclose(sample.numpy(), MEAN, rtol=2e-6)


def test_ddim_at_eta_0_is_deterministic_and_draws_no_noise(make_diffusion, normal):
    diffusion, x_last = make_diffusion(STEPS), normal(*SHAPE)
    model = ideal_denoiser(diffusion, MEAN, STD)
    before = torch.get_rng_state()
    samples = [diffusion.ddim_sample_loop(model, SHAPE, noise=x_last) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*samples)
    noisy = diffusion.ddim_sample_loop(model, SHAPE, noise=x_last, eta=0.5)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(noisy, samples[0], atol=1e-3)


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance(make_diffusion, normal, step_noises):
    diffusion, x_last = make_diffusion(STEPS), normal(*SHAPE)
    sample = diffusion.ddim_sample_loop(
        ideal_denoiser(diffusion, MEAN, STD),
        SHAPE,
        noise=x_last,
        clip_denoised=False,
        eta=1.0,
        step_noise=lambda t: step_noises[t],
    )
    expected = ancestral_by_bayes(x_last.numpy(), step_noises.numpy(), large=False)
    np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_ddim_at_eta_0_3_agrees_with_its_definition(make_diffusion, normal):
    """Song et al. 2021, eq. 12 and 16, for one step at η = 0.3."""
    diffusion, t, eta = make_diffusion(STEPS), 25, 0.3
    alpha_bar, before = (a[t] for a in cumulative(get_named_beta_schedule("linear", STEPS)))
    x, x_start, noise = normal(*SHAPE), normal(*SHAPE), normal(*SHAPE)
    out = diffusion.ddim_sample(lambda x, t: x_start, x, torch.full((3,), t), clip_denoised=False, eta=eta, noise=noise)
    sigma = eta * math.sqrt((1 - before) / (1 - alpha_bar)) * math.sqrt(1 - alpha_bar / before)
    eps = (x - math.sqrt(alpha_bar) * x_start) / math.sqrt(1 - alpha_bar)
    expected = math.sqrt(before) * x_start + math.sqrt(1 - before - sigma**2) * eps + sigma * noise
    np.testing.assert_allclose(out["sample"].numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out["pred_xstart"], x_start)


# ----------------------------------------------------------------------------------------------------------
# Ancestral sampling


def ancestral_by_bayes(x, noises, large):
    """Sample from x_T with the given noise, for data N(MEAN, STD²) and the ideal denoiser."""
    betas = get_named_beta_schedule("linear", len(noises))
    alpha_bar, _ = cumulative(betas)
    for t in range(len(betas) - 1, -1, -1):
        a = alpha_bar[t]
        x_start = (STD**2 * math.sqrt(a) * x + (1 - a) * MEAN) / (STD**2 * a + 1 - a)
        if t == 0:
            return x_start
        mean, variance = bayes_posterior(x_start, x, t, betas)
        x = mean + math.sqrt(betas[t] if large else variance) * noises[t]
    raise AssertionError("no steps")


@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_ancestral_sampling_with_given_noise(make_diffusion, normal, step_noises, var_type):
    diffusion, x_last = make_diffusion(STEPS, var_type=var_type), normal(*SHAPE)
    sample = diffusion.p_sample_loop(
        ideal_denoiser(diffusion, MEAN, STD),
        SHAPE,
        noise=x_last,
        clip_denoised=False,
        step_noise=lambda t: step_noises[t],
    )
    expected = ancestral_by_bayes(x_last.numpy(), step_noises.numpy(), large=var_type is ModelVarType.FIXED_LARGE)
    np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    # The small variance is exact for constant data, the large one for unit-variance data (Ho et al. 2020, 3.2).
    ("var_type", "std"),
    [(ModelVarType.FIXED_SMALL, 0.0), (ModelVarType.FIXED_SMALL, STD), (ModelVarType.FIXED_LARGE, 1.0)],
)
def test_ancestral_sampling_recovers_the_data(make_diffusion, normal, var_type, std):
    torch.manual_seed(0)
    diffusion, shape = make_diffusion(400, var_type=var_type), (1, 1, 100, 100)
    sample = diffusion.p_sample_loop(
        ideal_denoiser(diffusion, MEAN, std), shape, noise=normal(*shape), clip_denoised=False
    )
    # Five standard errors of 10,000 draws, plus the variance's bias with 400 steps.
    assert sample.mean().item() == pytest.approx(MEAN, abs=0.05 * max(std, 1e-4))
    assert sample.std().item() == pytest.approx(std, rel=0.06, abs=1e-4)


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
def test_the_last_step_adds_no_noise(make_diffusion, normal, sampler):
    diffusion, x, t = make_diffusion(STEPS), normal(2, 1, 3, 3), torch.tensor([0, 5])
    options = {"eta": 1.0} if sampler == "ddim_sample" else {}
    quiet, loud = (
        getattr(diffusion, sampler)(lambda x, t: 0.1 * x, x, t, noise=scale * torch.ones_like(x), **options)
        for scale in (0.0, 100.0)
    )
    assert torch.equal(quiet["sample"][0], loud["sample"][0])
    np.testing.assert_allclose(quiet["sample"][0].numpy(), 0.1 * x[0].numpy(), rtol=1e-5)
    assert (loud["sample"][1] - quiet["sample"][1]).min() > 1


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
def test_samplers_draw_from_torch_unless_given_noise(make_diffusion, sampler):
    diffusion = make_diffusion(STEPS)
    loop, model = getattr(diffusion, sampler), ideal_denoiser(diffusion, MEAN, STD)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(loop(model, SHAPE))
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[0], samples[2], atol=1e-3)


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_training_losses(make_diffusion, normal, mean_type):
    diffusion, t = make_diffusion(STEPS, mean_type=mean_type), [0, 11, STEPS - 1]
    x_start, noise = normal(*SHAPE), normal(*SHAPE)
    losses = diffusion.training_losses(lambda x, t: 0.3 * x + 0.1, x_start, torch.tensor(t), noise=noise)
    alpha_bar = cumulative(get_named_beta_schedule("linear", STEPS))[0][t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(alpha_bar) * x_start.numpy() + np.sqrt(1 - alpha_bar) * noise.numpy()
    target = x_start if mean_type is ModelMeanType.START_X else noise
    expected = ((0.3 * x_t + 0.1 - target.numpy()) ** 2).mean((1, 2, 3))
    assert losses["loss"].shape == (3,)
    np.testing.assert_allclose(losses["loss"].numpy(), expected, rtol=1e-5)


def test_ideal_denoiser_has_the_theoretical_loss(make_diffusion):
    """The expected squared error of E[x_0 | x_t] is the posterior's variance, 1 / (1/s² + ᾱ/(1−ᾱ))."""
    torch.manual_seed(0)
    diffusion, t, n = make_diffusion(STEPS), [2, 10, 30], 200_000
    x_start = MEAN + STD * torch.randn(3, n)
    losses = diffusion.training_losses(ideal_denoiser(diffusion, MEAN, STD), x_start, torch.tensor(t))["loss"]
    alpha_bar = cumulative(get_named_beta_schedule("linear", STEPS))[0][t]
    variance = 1 / (1 / STD**2 + alpha_bar / (1 - alpha_bar))
    np.testing.assert_allclose(losses.numpy(), variance, rtol=5 * math.sqrt(2 / n))


def test_training_loss_has_a_gradient(make_diffusion, normal):
    weight = torch.tensor(0.5, requires_grad=True)
    losses = make_diffusion(STEPS).training_losses(lambda x, t: weight * x, normal(*SHAPE), torch.tensor([1, 2, 3]))
    losses["loss"].mean().backward()
    assert weight.grad.abs() > 0
