"""Diffusion objectives, samplers and the stateless randomness they share.

Nothing here draws from a global random state: training noise and times come from a generator the
caller passes, and the noise of a sampled image depends on ``(seed, index)`` alone.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTIONS = ("epsilon", "v_prediction", "flow")

_SAMPLER_PREDICTIONS = {
    "dpm++": ("epsilon", "v_prediction"),
    "ddim": ("epsilon", "v_prediction"),
    "ddpm": ("epsilon", "v_prediction"),
    "euler-flow": ("flow",),
}
SAMPLERS = tuple(_SAMPLER_PREDICTIONS)

# 8-bit images scaled to [-1, 1] have levels 2 / 255 apart.
_HALF_BIN = 1.0 / 255.0
_SMALLEST_LIKELIHOOD = 1e-12


@dataclass(frozen=True)
class Diffusion:
    """What is predicted, on which schedule.

    ``epsilon`` and ``v_prediction`` use DDPM's linear schedule, beta from 1e-4 to 2e-2 over 1000
    steps; for another step count both ends are scaled by ``1000 / num_train_timesteps``, which
    keeps the final noise level. ``flow`` is rectified flow, ``x_t = (1 - t) x_0 + t noise`` with
    target ``noise - x_0`` and t in [0, 1).

    Attributes:
        prediction: One of ``PREDICTIONS``.
        learn_sigma: Whether the model's second half of channels interpolates the log variance.
            Only with ``epsilon``.
        num_train_timesteps: Steps of the discrete schedule, more than 20. For ``flow`` it only
            scales the time shown to the model.

    Raises:
        ValueError: If a field is not valid, or ``learn_sigma`` meets another prediction.

    Source: Ho et al. 2020 (2006.11239); Nichol and Dhariwal 2021 (2102.09672) for
    ``learn_sigma``; Salimans and Ho 2022 (2202.00512) for v; Liu et al. 2022 (2209.03003) and
    Ma et al. 2024 (SiT, 2401.08740) for flow.
    """

    prediction: str = "v_prediction"
    learn_sigma: bool = False
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}; "
                f"the nearest is {_nearest(self.prediction, PREDICTIONS)!r}"
            )
        if self.learn_sigma and self.prediction != "epsilon":
            raise ValueError(f"learn_sigma needs prediction 'epsilon', not {self.prediction!r}")
        if self.num_train_timesteps <= 20:
            raise ValueError(
                f"num_train_timesteps must be more than 20, or a beta reaches 1; "
                f"got {self.num_train_timesteps}"
            )

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw one training time per sample.

        Args:
            batch_size: Number of samples b.
            generator: Source of randomness; the result lies on its device.

        Returns:
            (b,) int64 uniform on 0..T-1, or for ``flow`` (b,) float32 uniform on [0, 1), as SiT
            draws it for the linear path with velocity prediction.
        """
        device = generator.device
        if self.prediction == "flow":
            return torch.rand(batch_size, generator=generator, device=device)
        return torch.randint(
            self.num_train_timesteps, (batch_size,), generator=generator, device=device
        )

    def training_losses(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Evaluate the training objective for given times and noise.

        With ``learn_sigma`` this is IDDPM's hybrid loss: the noise error plus one term of the
        variational bound, in bits per dimension, whose mean gets no gradient. The term enters with
        weight 1, which in expectation over t is ``L_simple + 0.001 L_vlb`` at T = 1000.

        Args:
            model: Called as ``model(hidden_states=(b, c, h, w), timestep=(b,),
                class_labels=(b,), return_dict=False)[0]``; the loss is float32 whatever precision
                the model or an enclosing autocast computes in.
            images: (b, c, h, w) in [-1, 1], or latents of about unit scale.
            labels: (b,) int64; the null class has index ``num_classes``.
            timesteps: (b,) as from ``sample_timesteps``: int64, or floats in [0, 1] for ``flow``,
                which the model sees multiplied by ``num_train_timesteps``, still as floats.
            noise: (b, c, h, w), standard normal.

        Returns:
            Float32 tensors (b,), means over c, h, w: ``loss``, ``mse``, and with ``learn_sigma``
            ``vb`` in bits per dimension.

        Raises:
            ValueError: If the kind of timesteps, the shape of the noise or the shape of the
                model's output does not fit.
        """
        if noise.shape != images.shape:
            raise ValueError(
                f"noise {tuple(noise.shape)} must have the shape of images {tuple(images.shape)}"
            )
        if timesteps.is_floating_point() != (self.prediction == "flow"):
            kind = "floats in [0, 1]" if self.prediction == "flow" else "integers"
            raise ValueError(f"{self.prediction} takes timesteps as {kind}, not {timesteps.dtype}")
        images, noise = images.float(), noise.float()
        timesteps = timesteps.to(images.device)
        if self.prediction == "flow":
            time = timesteps.float().view(-1, 1, 1, 1)
            noisy, target = (1 - time) * images + time * noise, noise - images
            shown_time = timesteps.float() * self.num_train_timesteps
        else:
            forward_process = _forward_process(self.num_train_timesteps)
            noisy = forward_process.add_noise(images, noise, timesteps)
            target = noise
            if self.prediction == "v_prediction":
                target = forward_process.get_velocity(images, noise, timesteps)
            shown_time = timesteps

        output = model(
            hidden_states=noisy, timestep=shown_time, class_labels=labels, return_dict=False
        )[0].float()
        prediction, variance = _split_output(output, images.shape[1], self.learn_sigma)
        mse = (prediction - target).square().mean(dim=(1, 2, 3))
        if variance is None:
            return {"loss": mse, "mse": mse}
        vb = _variational_bound_bits(
            prediction.detach(), variance, images, noisy, timesteps, self.num_train_timesteps
        )
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def scheduler(self, sampler: str, steps: int) -> Any:
        """Build a fresh diffusers scheduler with its timesteps set.

        Solvers keep state between steps, so a scheduler serves one batch. ``ddim`` is DPM-Solver++
        of order 1, the same update (Lu et al. 2022, 2211.01095): diffusers' ``DDIMScheduler``
        steps by ``T // steps`` whatever its grid, which skews every step off an even grid.

        Args:
            sampler: One of ``SAMPLERS``. Only ``ddpm`` uses the learned variance, expects the
                2c-channel output and draws noise; the others take the c predicted channels.
            steps: Number of model evaluations.

        Returns:
            A diffusers scheduler. Timesteps are int64, or for ``euler-flow`` floats from
            ``num_train_timesteps`` down, the scale the model was trained on.

        Raises:
            ValueError: If the sampler does not exist or does not fit the prediction, or the
                number of steps is out of the sampler's range.
        """
        self._check_sampler(sampler, steps)
        if sampler == "euler-flow":
            from diffusers import FlowMatchEulerDiscreteScheduler

            scheduler = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=self.num_train_timesteps
            )
            # The default grid spends its last evaluation on the stretch from 1 / T to 0.
            scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
            return scheduler

        options = {
            **_beta_options(self.num_train_timesteps),
            "prediction_type": self.prediction,
            "timestep_spacing": "linspace",
        }
        if sampler == "ddpm":
            from diffusers import DDPMScheduler

            variance_type = "learned_range" if self.learn_sigma else "fixed_small"
            scheduler = DDPMScheduler(**options, variance_type=variance_type, clip_sample=False)
        else:
            from diffusers import DPMSolverMultistepScheduler

            scheduler = DPMSolverMultistepScheduler(
                **options,
                algorithm_type="dpmsolver++",
                solver_order=2 if sampler == "dpm++" else 1,
            )
        scheduler.set_timesteps(steps)
        return scheduler

    def _check_sampler(self, sampler: str, steps: int) -> None:
        valid = [name for name, fits in _SAMPLER_PREDICTIONS.items() if self.prediction in fits]
        if sampler not in valid:
            # Both are first-order deterministic integrators, closer kin than their spelling.
            nearest = "ddim" if sampler == "euler-flow" else _nearest(sampler, valid)
            raise ValueError(
                f"sampler {sampler!r} does not fit prediction {self.prediction!r}; "
                f"valid: {', '.join(valid)}; the nearest is {nearest!r}"
            )
        smallest, largest = 1, self.num_train_timesteps
        if sampler == "ddpm":
            # An even grid of one point is t = 0, where pure noise was never seen.
            smallest = 2
        elif sampler != "euler-flow":
            # These grids leave out t = 0, so one more step would repeat a time.
            largest -= 1
        if not smallest <= steps <= largest:
            raise ValueError(
                f"sampler {sampler!r} takes {smallest} to {largest} steps, got {steps}"
            )


DIFFUSION_PRESETS = {
    "tiny": Diffusion(prediction="v_prediction"),
    "dit": Diffusion(prediction="epsilon", learn_sigma=True),
    "flow": Diffusion(prediction="flow"),
}


def generator_for(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the key alone.

    The key is hashed by BLAKE2b, so neighbouring keys give unrelated streams on every platform and
    Python version. PyTorch's CPU generator keeps 32 bits of a seed: two of 50,000 keys coincide
    with a chance of about one in four, which matters to no statistic but rules out uniqueness.

    Args:
        key: Integers of any size and sign, such as ``(seed, step, rank)``; order counts.

    Raises:
        TypeError: If a part of the key is not an integer.
    """
    text = ",".join(str(operator.index(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def sample(
    model: nn.Module,
    diffusion: Diffusion,
    *,
    labels: Tensor,
    indices: Tensor,
    seed: int,
    num_classes: int,
    shape: tuple[int, int, int],
    cfg: float = 1.0,
    cfg_channels: int | None = None,
    sampler: str = "dpm++",
    steps: int = 20,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Tensor:
    """Generate one image per label.

    All noise of image i comes from ``generator_for(seed, indices[i])``, so an image depends
    neither on the batch size nor on its neighbours, up to rounding in the model. With guidance,
    ``uncond + cfg * (cond - uncond)`` replaces the prediction; a learned variance is always the
    conditional one.

    Args:
        model: As for ``Diffusion.training_losses``, already on ``device``. It runs in eval mode;
            the mode of each submodule is restored afterwards.
        diffusion: What the model predicts.
        labels: (n,) integers in 0..num_classes; ``num_classes`` is the null class.
        indices: (n,) integers, the global number of each image.
        seed: Seed of the whole sample.
        num_classes: Number of classes, and index of the null class.
        shape: (c, h, w) of an image.
        cfg: Guidance scale; 1 runs the conditional pass only, 0 gives the unconditional model.
        cfg_channels: Guide only that many leading channels and leave the rest conditional. DiT's
            published figures guide 3 of 4 latent channels; None guides all.
        sampler: One of ``SAMPLERS`` that fits the prediction.
        steps: Number of solver steps; guidance doubles the work of each.
        batch_size: Images per model call, twice that under guidance.
        device: Where to compute.
        progress: Whether to show a bar over solver steps.

    Returns:
        (n, c, h, w) float32 on ``device``, in the model's space and not clamped.

    Raises:
        ValueError: If cfg is not finite, a label is out of range, labels and indices are not
            integers of one length, cfg_channels or batch_size is out of range, or the sampler or
            its number of steps does not fit.

    Source: Ho and Salimans 2022 (2207.12598) for guidance.
    """
    if not math.isfinite(cfg):
        raise ValueError(f"cfg must be finite, got {cfg}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    guided_channels = shape[0] if cfg_channels is None else cfg_channels
    if not 1 <= guided_channels <= shape[0]:
        raise ValueError(f"cfg_channels must lie in 1..{shape[0]}, got {cfg_channels}")
    _check_labels(labels, indices, num_classes)
    diffusion._check_sampler(sampler, steps)

    num_images = len(labels)
    if num_images == 0:
        return torch.empty(0, *shape, device=device)
    num_batches = math.ceil(num_images / batch_size)
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=num_batches * steps, desc="sampling", unit="step")

    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        batches = []
        for start in range(0, num_images, batch_size):
            chosen = slice(start, start + batch_size)
            batches.append(
                _sample_batch(
                    _Guidance(model, diffusion, num_classes, cfg, guided_channels),
                    labels[chosen].to(device=device, dtype=torch.int64),
                    [generator_for(seed, index) for index in indices[chosen].tolist()],
                    shape,
                    diffusion.scheduler(sampler, steps),
                    keeps_variance=sampler == "ddpm",
                    bar=bar,
                )
            )
    finally:
        for module in was_training:
            module.training = True
        if bar is not None:
            bar.close()
    return torch.cat(batches)


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images as DiT's evaluation does, clamp(127.5 x + 128, 0, 255) rounded down.

    Args:
        images: (n, c, h, w), nominally in [-1, 1].

    Returns:
        (n, h, w, c) uint8, contiguous, on the same device.
    """
    levels = (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()  # (n, c, h, w) -> (n, h, w, c)


class _Guidance(NamedTuple):
    """A model with classifier-free guidance, called as (noisy, timestep, labels)."""

    model: nn.Module
    diffusion: Diffusion
    num_classes: int
    scale: float
    channels: int

    def predict(self, noisy: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        guided = self.scale != 1.0
        num_images, num_channels = noisy.shape[:2]
        if guided:
            noisy = torch.cat([noisy, noisy])  # (2b, c, h, w), conditional half first
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        parameter = next(self.model.parameters(), noisy)
        output = self.model(
            hidden_states=noisy.to(parameter.dtype),
            timestep=time.to(noisy.device).expand(len(noisy)),
            class_labels=labels,
            return_dict=False,
        )[0].float()
        prediction, variance = _split_output(output, num_channels, self.diffusion.learn_sigma)
        if guided:
            prediction, unconditional = prediction.chunk(2)
            variance = None if variance is None else variance[:num_images]
            conditional, rest = prediction.tensor_split([self.channels], dim=1)
            unconditional = unconditional[:, : self.channels]
            prediction = torch.cat(
                [unconditional + self.scale * (conditional - unconditional), rest], dim=1
            )
        return prediction, variance


def _sample_batch(
    guidance: _Guidance,
    labels: Tensor,
    generators: list[torch.Generator],
    shape: tuple[int, int, int],
    scheduler: Any,
    *,
    keeps_variance: bool,
    bar: Any,
) -> Tensor:
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    noisy = torch.stack(noise).to(labels.device)  # (b, c, h, w)
    for time in scheduler.timesteps:
        prediction, variance = guidance.predict(noisy, time, labels)
        if not keeps_variance:
            noisy = scheduler.step(prediction, time, noisy, return_dict=False)[0]
        else:
            if variance is not None:
                prediction = torch.cat([prediction, variance], dim=1)  # (b, 2c, h, w)
            noisy = scheduler.step(
                prediction, time, noisy, generator=generators, return_dict=False
            )[0]
        if bar is not None:
            bar.update()
    return noisy


def _check_labels(labels: Tensor, indices: Tensor, num_classes: int) -> None:
    if labels.ndim != 1 or labels.shape != indices.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and indices {tuple(indices.shape)} "
            "must both have shape (n,)"
        )
    for name, values in (("labels", labels), ("indices", indices)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, not {values.dtype}")
    outside = labels[(labels < 0) | (labels > num_classes)]
    if len(outside):
        raise ValueError(
            f"labels must lie in 0..{num_classes} ({num_classes} is the null class), "
            f"got {outside[0].item()}"
        )


def _split_output(
    output: Tensor, num_channels: int, learn_sigma: bool
) -> tuple[Tensor, Tensor | None]:
    expected = 2 * num_channels if learn_sigma else num_channels
    if output.shape[1] != expected:
        raise ValueError(
            f"the model returned {output.shape[1]} channels, expected {expected} "
            f"for {num_channels}-channel images with learn_sigma={learn_sigma}"
        )
    if not learn_sigma:
        return output, None
    prediction, variance = output.chunk(2, dim=1)
    return prediction, variance


def _beta_options(num_train_timesteps: int) -> dict[str, Any]:
    scale = 1000 / num_train_timesteps
    return {
        "num_train_timesteps": num_train_timesteps,
        "beta_schedule": "linear",
        "beta_start": scale * 1e-4,
        "beta_end": scale * 2e-2,
    }


@lru_cache(maxsize=8)
def _forward_process(num_train_timesteps: int) -> DDPMScheduler:
    # Lazy, because diffusers takes longer to import than torch does.
    from diffusers import DDPMScheduler

    return DDPMScheduler(**_beta_options(num_train_timesteps))


class _PosteriorTables(NamedTuple):
    """Constants of q(x_{t-1} | x_t, x_0) and of x_0 from epsilon, each (T,) float32."""

    signal_scale: Tensor
    noise_scale: Tensor
    mean_of_clean: Tensor
    mean_of_noisy: Tensor
    log_smallest_variance: Tensor
    log_beta: Tensor


@lru_cache(maxsize=8)
def _posterior_tables(num_train_timesteps: int, device: torch.device) -> _PosteriorTables:
    options = _beta_options(num_train_timesteps)
    # 1 - alpha_bar loses most of its digits in float32 at small t, so round only at the end.
    beta = torch.linspace(
        options["beta_start"], options["beta_end"], num_train_timesteps, dtype=torch.float64
    )
    alpha_bar = (1 - beta).cumprod(dim=0)
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    # The posterior at t = 0 is a point, whose log is not finite; IDDPM reuses the next one.
    posterior_variance[0] = posterior_variance[1]
    tables = (
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        previous.sqrt() * beta / (1 - alpha_bar),
        (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar),
        posterior_variance.log(),
        beta.log(),
    )
    return _PosteriorTables(*(table.float().to(device) for table in tables))


def _variational_bound_bits(
    epsilon: Tensor,
    variance: Tensor,
    images: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    num_train_timesteps: int,
) -> Tensor:
    """Term t of the variational bound in bits per dimension, (b,); t = 0 is the decoder's.

    Source: IDDPM (2102.09672), equations 4, 7 and 15.
    """
    at_time = _PosteriorTables(
        *(
            table[timesteps].view(-1, 1, 1, 1)
            for table in _posterior_tables(num_train_timesteps, timesteps.device)
        )
    )
    fraction = (variance + 1) / 2
    log_variance = fraction * at_time.log_beta + (1 - fraction) * at_time.log_smallest_variance
    clean = (noisy - at_time.noise_scale * epsilon) / at_time.signal_scale
    mean = at_time.mean_of_clean * clean + at_time.mean_of_noisy * noisy
    true_mean = at_time.mean_of_clean * images + at_time.mean_of_noisy * noisy

    divergence = _gaussian_kl(true_mean, at_time.log_smallest_variance, mean, log_variance)
    decoder = _decoder_nll(images, mean, log_variance)
    nats = torch.where((timesteps == 0).view(-1, 1, 1, 1), decoder, divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, .) || N(other_mean, .)) in nats, elementwise."""
    log_ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance)


def _decoder_nll(images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass on the bin of each 8-bit level in [-1, 1], in nats.

    The outermost bins are open, so the masses sum to 1. Source: DDPM (2006.11239), equation 13.
    """
    precision = torch.exp(-0.5 * log_variance)
    offset = images - mean
    # A bin and its mirror image have equal mass; in the lower tail the difference of two
    # cumulative values keeps its digits, in the upper one both round to 1.
    mirrored = -offset.abs()
    inner = _normal_cdf((mirrored + _HALF_BIN) * precision) - _normal_cdf(
        (mirrored - _HALF_BIN) * precision
    )
    lowest = _normal_cdf((offset + _HALF_BIN) * precision)
    highest = _normal_cdf(-(offset - _HALF_BIN) * precision)
    # Half a bin of slack, since the levels themselves are rounded.
    mass = torch.where(
        images < -1 + _HALF_BIN, lowest, torch.where(images > 1 - _HALF_BIN, highest, inner)
    )
    return -mass.clamp(min=_SMALLEST_LIKELIHOOD).log()


def _normal_cdf(value: Tensor) -> Tensor:
    # torch.special.ndtr computes 1 + erf, which in float32 is wrong by 4 % at -5 and 0 at -6.
    return 0.5 * torch.erfc(-math.sqrt(0.5) * value)


def _nearest(name: str, valid: tuple[str, ...] | list[str]) -> str:
    return difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)[0]
