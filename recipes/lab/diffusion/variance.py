"""The variational bound that a learned variance is trained by (IDDPM, 2102.09672)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.lab.diffusion.schedule import beta_options

# 8-bit images scaled to [-1, 1] have levels 2 / 255 apart.
_HALF_BIN = 1.0 / 255.0
_SMALLEST_LIKELIHOOD = 1e-12


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
    options = beta_options(num_train_timesteps)
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


def variational_bound_bits(
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
