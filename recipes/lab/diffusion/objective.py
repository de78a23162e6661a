"""What is predicted on which schedule, and the loss."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.lab.console import UserError
from recipes.lab.diffusion.schedule import beta_options, forward_process
from recipes.lab.diffusion.variance import variational_bound_bits

PREDICTIONS = ("epsilon", "v_prediction", "flow")

_SAMPLER_PREDICTIONS = {
    "dpm++": ("epsilon", "v_prediction"),
    "ddim": ("epsilon", "v_prediction"),
    "ddpm": ("epsilon", "v_prediction"),
    "euler-flow": ("flow",),
}
SAMPLERS = tuple(_SAMPLER_PREDICTIONS)


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

    @property
    def default_sampler(self) -> str:
        """The sampler that suits what is predicted."""
        return "euler-flow" if self.prediction == "flow" else "dpm++"

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

    def timesteps_at(self, places: Tensor) -> Tensor:
        """Training times at places of the time axis.

        Args:
            places: (b,) float32 in [0, 1).

        Returns:
            (b,) as from ``sample_timesteps``.
        """
        if self.prediction == "flow":
            return places
        last = self.num_train_timesteps - 1  # a place just below 1 may round up
        return (places * self.num_train_timesteps).long().clamp(max=last)

    def noised(
        self, images: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The forward process: what the model sees, what it should answer, and the time it sees.

        Args:
            images: (b, c, h, w).
            noise: (b, c, h, w), standard normal.
            timesteps: (b,) as from ``sample_timesteps``.

        Raises:
            ValueError: If the kind of timesteps or the shape of the noise does not fit.
        """
        if noise.shape != images.shape:
            raise ValueError(
                f"noise {tuple(noise.shape)} must have the shape of images {tuple(images.shape)}"
            )
        if timesteps.is_floating_point() != (self.prediction == "flow"):
            kind = "floats in [0, 1]" if self.prediction == "flow" else "integers"
            raise ValueError(f"{self.prediction} takes timesteps as {kind}, not {timesteps.dtype}")
        if self.prediction == "flow":
            time = timesteps.float().view(-1, 1, 1, 1)
            noisy, target = (1 - time) * images + time * noise, noise - images
            return noisy, target, timesteps.float() * self.num_train_timesteps
        process: Any = forward_process(self.num_train_timesteps)
        noisy, target = process.add_noise(images, noise, timesteps), noise
        if self.prediction == "v_prediction":
            target = process.get_velocity(images, noise, timesteps)
        return noisy, target, timesteps

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
        images, timesteps = images.float(), timesteps.to(images.device)
        noisy, target, shown_time = self.noised(images, noise.float(), timesteps)
        output = model(
            hidden_states=noisy, timestep=shown_time, class_labels=labels, return_dict=False
        )[0].float()
        prediction, variance = split_output(output, images.shape[1], self.learn_sigma)
        mse = (prediction - target).square().mean(dim=(1, 2, 3))
        if variance is None:
            return {"loss": mse, "mse": mse}
        vb = variational_bound_bits(
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
        self.check_sampler(sampler, steps)
        if sampler == "euler-flow":
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteScheduler,
            )

            scheduler = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=self.num_train_timesteps
            )
            # The default grid spends its last evaluation on the stretch from 1 / T to 0.
            scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
            return scheduler

        options = {
            **beta_options(self.num_train_timesteps),
            "prediction_type": self.prediction,
            "timestep_spacing": "linspace",
        }
        if sampler == "ddpm":
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

            variance_type = "learned_range" if self.learn_sigma else "fixed_small"
            scheduler = DDPMScheduler(**options, variance_type=variance_type, clip_sample=False)
        else:
            from diffusers.schedulers.scheduling_dpmsolver_multistep import (
                DPMSolverMultistepScheduler,
            )

            scheduler = DPMSolverMultistepScheduler(
                **options,
                algorithm_type="dpmsolver++",
                solver_order=2 if sampler == "dpm++" else 1,
            )
        scheduler.set_timesteps(steps)
        return scheduler

    def check_sampler(self, sampler: str, steps: int) -> None:
        """Raises UserError where a sampler or its number of steps does not fit the prediction."""
        valid = [name for name, fits in _SAMPLER_PREDICTIONS.items() if self.prediction in fits]
        if sampler not in valid:
            # Both are first-order deterministic integrators, closer kin than their spelling.
            nearest = "ddim" if sampler == "euler-flow" else _nearest(sampler, valid)
            raise UserError(
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
            raise UserError(
                f"sampler {sampler!r} takes {smallest} to {largest} steps, got {steps}"
            )


DIFFUSION_PRESETS = {
    "tiny": Diffusion(prediction="v_prediction"),
    "dit": Diffusion(prediction="epsilon", learn_sigma=True),
    "flow": Diffusion(prediction="flow"),
}


def split_output(
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


def _nearest(name: str, valid: tuple[str, ...] | list[str]) -> str:
    return difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)[0]
