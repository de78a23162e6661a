"""Objectives and samplers against closed forms, slow references and oracle models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.lab.diffusion import (
    DIFFUSION_PRESETS,
    SAMPLERS,
    Diffusion,
    generator_for,
    sample,
    to_uint8,
)
from recipes.lab.diffusion.guidance import _Guidance
from recipes.lab.diffusion.variance import _decoder_nll, _gaussian_kl

EPSILON = Diffusion("epsilon")
VELOCITY = Diffusion("v_prediction")
FLOW = Diffusion("flow")
HYBRID = Diffusion("epsilon", learn_sigma=True)

SHAPE = (3, 4, 4)
NUM_CLASSES = 5


def slow_schedule(num_steps: int = 1000) -> tuple[list[float], list[float]]:
    """Beta and alpha-bar in Python floats."""
    betas = [1e-4 + (2e-2 - 1e-4) * step / (num_steps - 1) for step in range(num_steps)]
    alpha_bars, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        alpha_bars.append(product)
    return betas, alpha_bars


BETAS, ALPHA_BARS = slow_schedule()


def alpha_bar_at(timestep: Tensor) -> Tensor:
    return torch.tensor(ALPHA_BARS, dtype=torch.float64)[timestep].view(-1, 1, 1, 1)


class Recorded(nn.Module):
    """Returns a fixed output and keeps what it was called with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, **call: Any) -> tuple[Tensor]:
        self.call = call
        return (self.output,)


class GaussianOracle(nn.Module):
    """The exact minimizer of each loss for data N(mean[label], std^2); std 0 knows x_0."""

    def __init__(self, prediction: str, means: Tensor, std: float = 0.0) -> None:
        super().__init__()
        self.prediction, self.means, self.std = prediction, means.double(), std

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        noisy, mean = hidden_states.double(), self.means[class_labels]
        if self.prediction == "flow":
            noise_scale = (timestep.double() / 1000).view(-1, 1, 1, 1)
            signal_scale = 1 - noise_scale
        else:
            signal_scale = alpha_bar_at(timestep).sqrt()
            noise_scale = (1 - alpha_bar_at(timestep)).sqrt()
        variance = (signal_scale * self.std) ** 2 + noise_scale**2
        excess = (noisy - signal_scale * mean) / variance
        clean, noise = mean + signal_scale * self.std**2 * excess, noise_scale * excess
        predicted = {
            "epsilon": noise,
            "v_prediction": signal_scale * noise - noise_scale * clean,
            "flow": noise - clean,
        }[self.prediction]
        return (predicted.float(),)


class TinyModel(nn.Module):
    """A conv net conditioned on time and label; 2c channels if asked for."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        generator = generator_for(factor)
        channels = SHAPE[0]
        self.conv = nn.Conv2d(channels, factor * channels, 3, padding=1)
        self.label = nn.Embedding(NUM_CLASSES + 1, channels)
        for parameter in self.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        self.dropout = nn.Dropout(0.5)
        self.batch_sizes: list[int] = []

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        assert timestep.shape == class_labels.shape == hidden_states.shape[:1]
        self.batch_sizes.append(len(hidden_states))
        time = (timestep / 1000).to(hidden_states.dtype).view(-1, 1, 1, 1)
        hidden = hidden_states + time + self.label(class_labels)[:, :, None, None]
        return (torch.tanh(self.conv(self.dropout(hidden))),)


def draw(batch_size: int, *key: int) -> tuple[Tensor, Tensor]:
    """Images on 8-bit levels, and noise."""
    generator = generator_for(*key)
    levels = torch.randint(256, (batch_size, *SHAPE), generator=generator)
    return levels / 127.5 - 1, torch.randn(batch_size, *SHAPE, generator=generator)


def draw_samples(model: nn.Module, diffusion: Diffusion, count: int = 8, **options: Any) -> Tensor:
    settings = {
        "labels": torch.arange(count) % NUM_CLASSES,
        "indices": torch.arange(count),
        "seed": 3,
        "num_classes": NUM_CLASSES,
        "shape": SHAPE,
        "steps": 4,
    }
    return sample(model, diffusion, **{**settings, **options})


class TestForwardProcess:
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_noisy_input_and_target(self, prediction: str) -> None:
        images, noise = draw(4, 0)
        timesteps = torch.tensor([0, 10, 500, 999])
        model = Recorded(torch.zeros(4, *SHAPE))
        losses = Diffusion(prediction).training_losses(
            model, images, torch.arange(4), timesteps=timesteps, noise=noise
        )
        alpha_bar = alpha_bar_at(timesteps)
        noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images
        target = noise.double() if prediction == "epsilon" else velocity
        torch.testing.assert_close(model.call["hidden_states"].double(), noisy, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.call["timestep"], timesteps)
        torch.testing.assert_close(model.call["class_labels"], torch.arange(4))
        expected = target.square().mean(dim=(1, 2, 3)).float()
        torch.testing.assert_close(losses["mse"], expected)
        assert losses.keys() == {"loss", "mse"}

    def test_noisy_input_has_the_mean_and_variance_of_q(self) -> None:
        count, timestep = 4000, 300
        noise = torch.randn(count, 1, 2, 2, generator=generator_for(1))
        model = Recorded(torch.zeros(count, 1, 2, 2))
        EPSILON.training_losses(
            model,
            torch.full_like(noise, 0.7),
            torch.zeros(count, dtype=torch.int64),
            timesteps=torch.full((count,), timestep),
            noise=noise,
        )
        noisy, alpha_bar = model.call["hidden_states"], ALPHA_BARS[timestep]
        # Five standard errors of 16,000 draws.
        assert abs(noisy.mean() - 0.7 * math.sqrt(alpha_bar)) < 5 * math.sqrt(
            (1 - alpha_bar) / noise.numel()
        )
        assert abs(noisy.var() / (1 - alpha_bar) - 1) < 5 * math.sqrt(2 / noise.numel())

    def test_flow_is_the_straight_line_at_a_thousandfold_time(self) -> None:
        images, noise = draw(3, 2)
        timesteps = torch.tensor([0.0, 0.25, 1.0])
        model = Recorded(torch.zeros(3, *SHAPE))
        losses = FLOW.training_losses(
            model, images, torch.zeros(3, dtype=torch.int64), timesteps=timesteps, noise=noise
        )
        noisy = model.call["hidden_states"]
        torch.testing.assert_close(noisy[0], images[0])
        torch.testing.assert_close(noisy[1], 0.75 * images[1] + 0.25 * noise[1])
        torch.testing.assert_close(noisy[2], noise[2])
        torch.testing.assert_close(model.call["timestep"], torch.tensor([0.0, 250.0, 1000.0]))
        torch.testing.assert_close(losses["loss"], (noise - images).square().mean(dim=(1, 2, 3)))

    def test_other_step_counts_end_at_the_same_noise(self) -> None:
        ends = [
            Diffusion("epsilon", num_train_timesteps=steps).scheduler("ddpm", 5).alphas_cumprod[-1]
            for steps in (500, 1000)
        ]
        assert math.log(ends[0]) == pytest.approx(math.log(ends[1]), rel=0.02)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
    def test_an_oracle_has_no_loss(self, prediction: str) -> None:
        images, noise = draw(6, 3)
        chosen = Diffusion(prediction)
        timesteps = chosen.sample_timesteps(6, generator_for(3))
        losses = chosen.training_losses(
            GaussianOracle(prediction, images),
            images,
            torch.arange(6),
            timesteps=timesteps,
            noise=noise,
        )
        assert losses["loss"].shape == (6,)
        assert losses["loss"].max() < 1e-6

    def test_losses_are_float32_under_autocast(self) -> None:
        images, noise = draw(2, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = HYBRID.training_losses(
                TinyModel(factor=2),
                images.bfloat16(),
                torch.zeros(2, dtype=torch.int64),
                timesteps=torch.tensor([0, 400]),
                noise=noise,
            )
        assert {loss.dtype for loss in losses.values()} == {torch.float32}

    def test_errors(self) -> None:
        images, noise = draw(2, 5)
        labels = torch.zeros(2, dtype=torch.int64)
        timesteps = torch.tensor([1, 2])
        model = TinyModel(factor=2)
        with pytest.raises(ValueError, match="returned 6 channels, expected 3"):
            EPSILON.training_losses(model, images, labels, timesteps=timesteps, noise=noise)
        with pytest.raises(ValueError, match="floats in"):
            FLOW.training_losses(model, images, labels, timesteps=timesteps, noise=noise)
        with pytest.raises(ValueError, match="integers"):
            EPSILON.training_losses(model, images, labels, timesteps=timesteps / 1000, noise=noise)
        with pytest.raises(ValueError, match="shape of images"):
            EPSILON.training_losses(model, images, labels, timesteps=timesteps, noise=noise[:, :1])


class TestTimesteps:
    @pytest.mark.parametrize("chosen", [EPSILON, VELOCITY])
    def test_integers_cover_the_schedule_evenly(self, chosen: Diffusion) -> None:
        timesteps = chosen.sample_timesteps(20_000, generator_for(0))
        assert timesteps.dtype == torch.int64
        assert (timesteps.min(), timesteps.max()) == (0, 999)
        assert abs(timesteps.double().mean() - 499.5) < 5 * 289 / math.sqrt(20_000)

    def test_flow_times_are_uniform(self) -> None:
        timesteps = FLOW.sample_timesteps(20_000, generator_for(0))
        assert timesteps.dtype == torch.float32
        assert 0 <= timesteps.min() < 0.001 < 0.999 < timesteps.max() < 1
        assert abs(timesteps.mean() - 0.5) < 5 * 0.289 / math.sqrt(20_000)

    def test_the_generator_decides(self) -> None:
        first, second = (EPSILON.sample_timesteps(9, generator_for(7)) for _ in range(2))
        assert torch.equal(first, second)


def slow_bound_bits(
    image: float, noisy: float, epsilon: float, variance: float, step: int
) -> float:
    """One element's term of the bound, from DDPM's and IDDPM's formulas in Python floats."""

    def posterior_variance(at: int) -> float:
        return BETAS[at] * (1 - ALPHA_BARS[at - 1]) / (1 - ALPHA_BARS[at])

    def posterior_mean(clean: float) -> float:
        if step == 0:
            return clean
        previous = ALPHA_BARS[step - 1]
        return (
            math.sqrt(previous) * BETAS[step] * clean
            + math.sqrt(1 - BETAS[step]) * (1 - previous) * noisy
        ) / (1 - ALPHA_BARS[step])

    def cumulative(value: float) -> float:
        return 0.5 * math.erfc(-value / math.sqrt(2))

    true_variance = posterior_variance(max(step, 1))
    fraction = (variance + 1) / 2
    model_variance = BETAS[step] ** fraction * true_variance ** (1 - fraction)
    alpha_bar = ALPHA_BARS[step]
    clean = (noisy - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
    mean, std = posterior_mean(clean), math.sqrt(model_variance)
    if step > 0:
        ratio = true_variance / model_variance
        distance = (posterior_mean(image) - mean) ** 2 / model_variance
        return 0.5 * (ratio - 1 - math.log(ratio) + distance) / math.log(2)
    upper = 1.0 if image > 0.999 else cumulative((image + 1 / 255 - mean) / std)
    lower = 0.0 if image < -0.999 else cumulative((image - 1 / 255 - mean) / std)
    return -math.log(max(upper - lower, 1e-12)) / math.log(2)


class TestVariationalBound:
    @pytest.mark.parametrize("step", [0, 1, 2, 50, 500, 999])
    def test_agrees_with_a_slow_reference(self, step: int) -> None:
        images, noise = draw(2, 6)
        images[0, 0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
        generator = generator_for(6, step)
        # Close to the truth, so that the first decoder terms are not all at the floor.
        epsilon = noise + 0.3 * torch.randn(noise.shape, generator=generator)
        variance = 2 * torch.rand(noise.shape, generator=generator) - 1
        model = Recorded(torch.cat([epsilon, variance], dim=1))
        losses = HYBRID.training_losses(
            model,
            images,
            torch.zeros(2, dtype=torch.int64),
            timesteps=torch.full((2,), step),
            noise=noise,
        )
        noisy = model.call["hidden_states"]
        for index in range(2):
            columns = (
                tensor[index].flatten().tolist() for tensor in (images, noisy, epsilon, variance)
            )
            terms = [slow_bound_bits(*values, step) for values in zip(*columns, strict=True)]
            expected = sum(terms) / len(terms)
            assert losses["vb"][index].item() == pytest.approx(expected, rel=1e-3)
        torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])
        torch.testing.assert_close(losses["mse"], (epsilon - noise).square().mean(dim=(1, 2, 3)))

    def test_a_perfect_model_has_no_divergence(self) -> None:
        images, noise = draw(3, 8)
        output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
        vb = HYBRID.training_losses(
            Recorded(output),
            images,
            torch.zeros(3, dtype=torch.int64),
            timesteps=torch.tensor([1, 100, 999]),
            noise=noise,
        )["vb"]
        assert vb.abs().max() < 1e-5

    def test_gradients(self) -> None:
        images, noise = draw(3, 9)
        output = 0.1 * torch.randn(3, 6, 4, 4, generator=generator_for(9))
        output.requires_grad_()
        losses = HYBRID.training_losses(
            Recorded(output),
            images,
            torch.zeros(3, dtype=torch.int64),
            timesteps=torch.tensor([0, 5, 700]),
            noise=noise,
        )
        (of_bound,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
        (of_error,) = torch.autograd.grad(losses["mse"].sum(), output)
        assert torch.equal(of_bound[:, :3], torch.zeros(3, *SHAPE))
        assert of_bound[1:, 3:].abs().min() > 0
        assert of_bound.isfinite().all()
        assert of_error[:, :3].abs().min() > 0
        assert torch.equal(of_error[:, 3:], torch.zeros(3, *SHAPE))

    def test_kl_of_two_gaussians(self) -> None:
        means, others = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, 0.5, 1.0])
        variances, other_variances = torch.tensor([1.0, 0.3, 2.0]), torch.tensor([1.0, 2.0, 0.5])
        divergence = _gaussian_kl(means, variances.log(), others, other_variances.log())
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(means, variances.sqrt()),
            torch.distributions.Normal(others, other_variances.sqrt()),
        )
        torch.testing.assert_close(divergence, expected)

    @pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0, 0.98, 1.5])
    @pytest.mark.parametrize("std", [0.008, 0.1, 2.0])
    def test_decoder_masses_sum_to_one(self, mean: float, std: float) -> None:
        levels = torch.arange(256) / 127.5 - 1
        nll = _decoder_nll(levels, torch.full((256,), mean), torch.full((256,), 2 * math.log(std)))
        assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-4)

    def test_decoder_keeps_its_digits_in_both_tails(self) -> None:
        levels = torch.tensor([102, 153]) / 127.5 - 1
        nll = _decoder_nll(levels, torch.zeros(2), torch.full((2,), 2 * math.log(0.033)))
        lower, upper = (
            0.5 * math.erfc((0.2 + shift) / 0.033 / math.sqrt(2)) for shift in (1 / 255, -1 / 255)
        )
        expected = -math.log(upper - lower)
        torch.testing.assert_close(nll, torch.full((2,), expected), rtol=1e-4, atol=0)


VALID_PAIRS = [
    *((prediction, name) for prediction in ("epsilon", "v_prediction") for name in SAMPLERS[:3]),
    ("flow", "euler-flow"),
]


class TestSamplers:
    @pytest.mark.parametrize(("prediction", "sampler"), VALID_PAIRS)
    def test_an_oracle_recovers_the_images(self, prediction: str, sampler: str) -> None:
        means, _ = draw(NUM_CLASSES + 1, 10)
        model = GaussianOracle(prediction, means)
        samples = draw_samples(model, Diffusion(prediction), sampler=sampler, steps=10)
        labels = torch.arange(8) % NUM_CLASSES
        torch.testing.assert_close(samples, means[labels], atol=2e-3, rtol=0)

    @pytest.mark.parametrize(
        ("prediction", "sampler", "order"),
        [
            ("epsilon", "dpm++", 2),
            ("v_prediction", "dpm++", 2),
            ("epsilon", "ddim", 1),
            ("v_prediction", "ddim", 1),
            ("flow", "euler-flow", 1),
        ],
    )
    def test_solvers_converge_to_the_probability_flow_at_their_order(
        self, prediction: str, sampler: str, order: int
    ) -> None:
        mean, std = 0.4, 0.5
        model = GaussianOracle(prediction, torch.full((NUM_CLASSES + 1, *SHAPE), mean), std)
        noise = torch.stack(
            [torch.randn(SHAPE, generator=generator_for(3, index)) for index in range(8)]
        )
        # Along the flow of a Gaussian, the standardized value stays what it was at the start.
        alpha_bar = 0.0 if prediction == "flow" else ALPHA_BARS[-1]
        start_std = math.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
        expected = mean + std * (noise - math.sqrt(alpha_bar) * mean) / start_std
        errors = [
            (draw_samples(model, Diffusion(prediction), sampler=sampler, steps=steps) - expected)
            .abs()
            .max()
            .item()
            for steps in (20, 80)
        ]
        assert errors[1] < 0.1**order
        assert errors[1] < errors[0] / 3**order

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_ancestral_sampling_has_the_moments_of_the_data(self, prediction: str) -> None:
        model = GaussianOracle(prediction, torch.full((NUM_CLASSES + 1, *SHAPE), 0.4), 0.5)
        samples = draw_samples(model, Diffusion(prediction), 60, sampler="ddpm", steps=500)
        draws = samples.numel()
        assert samples.mean().item() == pytest.approx(0.4, abs=5 * 0.5 / math.sqrt(draws))
        assert samples.std().item() == pytest.approx(0.5, rel=0.06)

    def test_ddim_takes_the_published_step(self) -> None:
        model = TinyModel()
        result = draw_samples(model, EPSILON, 1, sampler="ddim", steps=7)
        noisy = torch.randn(1, *SHAPE, generator=generator_for(3, 0))
        label = torch.zeros(1, dtype=torch.int64)
        grid = EPSILON.scheduler("ddim", 7).timesteps.tolist()
        model.eval()
        for step, following in zip(grid, [*grid[1:], None], strict=True):
            with torch.no_grad():
                epsilon = model(noisy, torch.tensor([step]), label, False)[0]
            alpha_bar = ALPHA_BARS[step]
            following_bar = 1.0 if following is None else ALPHA_BARS[following]
            clean = (noisy - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
            noisy = math.sqrt(following_bar) * clean + math.sqrt(1 - following_bar) * epsilon
        torch.testing.assert_close(result, noisy, atol=1e-3, rtol=1e-4)

    def test_learned_variance_spans_posterior_to_beta(self) -> None:
        class WithVariance(TinyModel):
            def __init__(self, value: float) -> None:
                super().__init__()
                self.value = value

            def forward(self, **call: Any) -> tuple[Tensor]:
                (prediction,) = super().forward(**call)
                return (torch.cat([prediction, torch.full_like(prediction, self.value)], 1),)

        fixed = draw_samples(TinyModel(), EPSILON, sampler="ddpm")
        smallest = draw_samples(WithVariance(-1.0), HYBRID, sampler="ddpm")
        largest = draw_samples(WithVariance(1.0), HYBRID, sampler="ddpm")
        torch.testing.assert_close(smallest, fixed, rtol=1e-4, atol=1e-3)
        assert (largest - fixed).abs().max() > 0.01
        ignored = draw_samples(WithVariance(1.0), HYBRID, sampler="dpm++")
        assert torch.equal(ignored, draw_samples(TinyModel(), EPSILON, sampler="dpm++"))

    @pytest.mark.parametrize(("prediction", "sampler"), VALID_PAIRS)
    @pytest.mark.parametrize("steps", [2, 13, 250])
    def test_grids_start_at_pure_noise(self, prediction: str, sampler: str, steps: int) -> None:
        timesteps = Diffusion(prediction).scheduler(sampler, steps).timesteps
        assert len(timesteps) == len(timesteps.unique()) == steps
        assert timesteps[0] == (1000 if prediction == "flow" else 999)

    def test_flow_steps_are_even(self) -> None:
        scheduler = FLOW.scheduler("euler-flow", 4)
        torch.testing.assert_close(
            scheduler.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0])
        )
        assert scheduler.sigmas[-1] == 0

    @pytest.mark.parametrize(
        ("prediction", "sampler", "message"),
        [
            ("flow", "ddpm", "valid: euler-flow; the nearest is 'euler-flow'"),
            ("epsilon", "euler-flow", r"valid: dpm\+\+, ddim, ddpm; the nearest is 'ddim'"),
            ("v_prediction", "dpm+", r"the nearest is 'dpm\+\+'"),
        ],
    )
    def test_wrong_pairs(self, prediction: str, sampler: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Diffusion(prediction).scheduler(sampler, 5)

    @pytest.mark.parametrize(
        ("chosen", "sampler", "steps"),
        [
            (EPSILON, "ddpm", 1),
            (EPSILON, "ddpm", 1001),
            (EPSILON, "dpm++", 1000),
            (EPSILON, "ddim", 0),
            (FLOW, "euler-flow", 0),
        ],
    )
    def test_step_counts(self, chosen: Diffusion, sampler: str, steps: int) -> None:
        with pytest.raises(ValueError, match="steps, got"):
            chosen.scheduler(sampler, steps)


class TestSample:
    @pytest.mark.parametrize(
        ("chosen", "sampler"),
        [(VELOCITY, "dpm++"), (EPSILON, "ddim"), (HYBRID, "ddpm"), (FLOW, "euler-flow")],
    )
    @pytest.mark.parametrize("cfg", [1.0, 2.0])
    def test_batch_size_does_not_matter(self, chosen: Diffusion, sampler: str, cfg: float) -> None:
        model = TinyModel(factor=2 if chosen.learn_sigma else 1)
        whole, threes, ones = (
            draw_samples(model, chosen, sampler=sampler, cfg=cfg, batch_size=batch_size)
            for batch_size in (8, 3, 1)
        )
        assert whole.shape == (8, *SHAPE)
        scale = whole.abs().max().item()
        torch.testing.assert_close(threes, whole, atol=1e-5 * scale, rtol=1e-5)
        torch.testing.assert_close(ones, whole, atol=1e-5 * scale, rtol=1e-5)

    @pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
    def test_the_index_decides(self, sampler: str) -> None:
        model = TinyModel()
        labels = torch.full((4,), 2)
        crowd = draw_samples(
            model,
            EPSILON,
            labels=labels,
            indices=torch.tensor([9, 5, 5, 0]),
            sampler=sampler,
        )
        alone = draw_samples(
            model, EPSILON, labels=labels[:1], indices=torch.tensor([5]), sampler=sampler
        )
        scale = crowd.abs().max().item()
        torch.testing.assert_close(crowd[1], alone[0], atol=1e-5 * scale, rtol=1e-5)
        torch.testing.assert_close(crowd[2], alone[0], atol=1e-5 * scale, rtol=1e-5)
        assert (crowd[0] - crowd[1]).abs().max() > 0.1
        other = draw_samples(
            model, EPSILON, labels=labels[:1], indices=torch.tensor([5]), seed=4, sampler=sampler
        )
        assert (other - alone).abs().max() > 0.1

    def test_scale_one_is_the_conditional_pass_alone(self) -> None:
        model = TinyModel()
        guided = draw_samples(model, VELOCITY, cfg=1.0, cfg_channels=2)
        assert model.batch_sizes == [8] * 4
        assert torch.equal(guided, draw_samples(model, VELOCITY))
        draw_samples(model, VELOCITY, cfg=1.5)
        assert model.batch_sizes[-4:] == [16] * 4

    def test_scale_zero_is_the_null_class(self) -> None:
        model = TinyModel()
        null = draw_samples(model, VELOCITY, labels=torch.full((8,), NUM_CLASSES))
        torch.testing.assert_close(draw_samples(model, VELOCITY, cfg=0.0), null)

    @pytest.mark.parametrize("cfg_channels", [None, 1, 2])
    def test_guidance_extrapolates_the_leading_channels(self, cfg_channels: int | None) -> None:
        conditional, unconditional = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 4.0, 3.5])

        class Constant(nn.Module):
            def forward(
                self,
                hidden_states: Tensor,
                timestep: Tensor,
                class_labels: Tensor,
                return_dict: bool,
            ) -> tuple[Tensor]:
                null = (class_labels == NUM_CLASSES)[:, None]
                value = torch.where(null, unconditional, conditional)[:, :, None, None]
                return (value.expand_as(hidden_states),)

        samples = draw_samples(
            Constant(), FLOW, sampler="euler-flow", cfg=3.0, cfg_channels=cfg_channels
        )
        # A constant velocity u moves pure noise to noise - u.
        noise = torch.stack(
            [torch.randn(SHAPE, generator=generator_for(3, index)) for index in range(8)]
        )
        velocity = unconditional + 3 * (conditional - unconditional)
        if cfg_channels is not None:
            velocity[cfg_channels:] = conditional[cfg_channels:]
        torch.testing.assert_close(samples, noise - velocity[:, None, None])

    def test_the_variance_under_guidance_is_conditional(self) -> None:
        class BothHalves(nn.Module):
            def forward(self, hidden_states: Tensor, **call: Any) -> tuple[Tensor]:
                null = (call["class_labels"] == NUM_CLASSES)[:, None, None, None]
                variance = torch.where(null, 5.0, 0.5).expand_as(hidden_states)
                return (torch.cat([hidden_states, variance], dim=1),)

        time, labels = torch.tensor(5), torch.tensor([1, 2])
        guidance = _Guidance(BothHalves(), HYBRID, NUM_CLASSES, 4.0, 3)
        _, variance = guidance.predict(torch.ones(2, *SHAPE), time, labels)
        assert torch.equal(variance, torch.full((2, *SHAPE), 0.5))

    def test_modes_are_restored(self) -> None:
        model = TinyModel()
        model.label.eval()
        first = draw_samples(model, VELOCITY)
        assert model.training and model.dropout.training and not model.label.training
        assert torch.equal(first, draw_samples(model.eval(), VELOCITY))
        assert not model.training
        model.train()
        with pytest.raises(ValueError, match="channels"):
            draw_samples(model, HYBRID)
        assert model.training

    def test_global_randomness_and_gradients_are_left_alone(self) -> None:
        model = TinyModel()
        before = torch.get_rng_state()
        samples = draw_samples(model, EPSILON, sampler="ddpm")
        assert torch.equal(before, torch.get_rng_state())
        assert not samples.requires_grad and samples.dtype == torch.float32

    def test_low_precision_models_run(self) -> None:
        samples = draw_samples(TinyModel().bfloat16(), VELOCITY)
        assert samples.dtype == torch.float32 and samples.isfinite().all()

    def test_no_images(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert draw_samples(TinyModel(), VELOCITY, 0, progress=True).shape == (0, *SHAPE)
        draw_samples(TinyModel(), VELOCITY, 2, progress=True)
        assert "sampling" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cfg": math.nan}, "finite"),
            ({"cfg": math.inf}, "finite"),
            ({"cfg_channels": 0}, r"1\.\.3"),
            ({"cfg_channels": 4}, r"1\.\.3"),
            ({"batch_size": 0}, "batch_size"),
            ({"labels": torch.full((8,), NUM_CLASSES + 1)}, r"0\.\.5 .*got 6"),
            ({"labels": torch.full((8,), -1)}, r"0\.\.5 .*got -1"),
            ({"labels": torch.zeros(8)}, "labels must be integers"),
            ({"indices": torch.arange(7)}, "both have shape"),
            ({"sampler": "euler-flow"}, "nearest is 'ddim'"),
        ],
    )
    def test_errors(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            draw_samples(TinyModel(), VELOCITY, **options)


class TestGenerators:
    def test_keys_decide(self) -> None:
        def first(*key: int) -> float:
            return torch.rand(1, generator=generator_for(*key)).item()

        assert first(1, 2) == first(1, 2)
        keys = [(), (0,), (0, 0), (1, 2), (2, 1), (12,), (-12,), (2**70,), (1, 2, 0)]
        assert len({first(*key) for key in keys}) == len(keys)

    def test_the_stream_is_pinned(self) -> None:
        # A changed hash would silently change every published sample.
        assert generator_for(0, 1).initial_seed() == 4001049575

    def test_only_integers(self) -> None:
        assert generator_for(True, torch.tensor(3)).initial_seed() == (
            generator_for(1, 3).initial_seed()
        )
        with pytest.raises(TypeError):
            generator_for(0.5)


def test_presets() -> None:
    assert DIFFUSION_PRESETS == {"tiny": VELOCITY, "dit": HYBRID, "flow": FLOW}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "eps"}, "nearest is 'epsilon'"),
        ({"prediction": "flow", "learn_sigma": True}, "needs prediction 'epsilon'"),
        ({"num_train_timesteps": 20}, "more than 20"),
    ],
)
def test_invalid_diffusion(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


def test_to_uint8() -> None:
    levels = torch.arange(256)
    images = torch.stack([levels / 127.5 - 1, levels * 0.0 + 9, levels * 0.0 - 9])
    result = to_uint8(images.view(1, 3, 16, 16))
    assert result.shape == (1, 16, 16, 3) and result.dtype == torch.uint8
    assert result.is_contiguous()
    assert torch.equal(result[0, :, :, 0].flatten(), levels.to(torch.uint8))
    assert result[..., 1].unique().tolist() == [255] and result[..., 2].unique().tolist() == [0]
    assert to_uint8(torch.full((1, 1, 1, 1), 0.003)).item() == 128
