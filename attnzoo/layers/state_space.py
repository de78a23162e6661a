"""Parts of state-space mechanisms: Mamba's scan, and the layers of Mamba and Mamba-2 around one.

Initialized as there: steps between 0.001 and 0.1 at the start, rates of -1 to -s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.ops.causal_conv import causal_conv
from attnzoo.ops.dispatch import TABLE, Impl, choose, is_bare
from attnzoo.ops.precision import in_float32, in_wide_range
from attnzoo.ops.selective_scan import selective_block, selective_scan, selective_scan_macs
from attnzoo.ops.silu_gate import silu_gate
from attnzoo.ops.ssd_scan import ssd_block, ssd_scan, ssd_scan_macs

STATE = 16  # of each channel in Mamba
SSD_STATE = 128  # of each channel in Mamba-2
EXPAND = 2  # inner width over the tokens'
KERNEL = 4  # of the causal convolutions
_STEPS = (1e-3, 0.1)  # at the start, and none below 1e-4

# What a scan leaves for the tokens after it: the convolution's last tokens, and the state.
Carried = tuple[Tensor | None, Tensor]


class CausalConv(nn.Module):
    """SiLU of a depthwise convolution over each token and the three before it."""

    conv: Any

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, KERNEL, groups=width)

    def forward(
        self,
        x: Tensor,
        before: Tensor | None = None,
        impl: Impl = "auto",
        reverse: bool = False,
    ) -> Tensor:
        """Convolves tokens.

        Args:
            x: (b, n, width).
            before: The three tokens before, (b, 3, width), else zeros.
            impl: Of a scan, see ``attnzoo.ops.selective_scan`` and ``attnzoo.ops.ssd_scan``.
            reverse: Whether it goes over each token and the three after it.

        Returns:
            (b, n, width).
        """
        is_adapted = type(self.conv) is not nn.Conv1d
        if is_adapted:  # an adapter around it has its own idea of its weight
            x = x.flip(1) if reverse else x
            is_first = before is None
            x = F.pad(x, (0, 0, KERNEL - 1, 0)) if is_first else torch.cat([before, x], dim=1)
            out = F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2))
            return out.flip(1) if reverse else out
        x = x if before is None else torch.cat([before, x], dim=1)
        weight, bias = self.conv.weight, self.conv.bias
        out = causal_conv(x, weight, bias, reverse, impl=_beside(impl, "causal_conv"))
        return out if before is None else out[:, KERNEL - 1 :]

    def last(self, x: Tensor, before: Tensor | None) -> Tensor:
        """What the tokens after ``x`` need as ``before``."""
        if before is None:
            before = x.new_zeros(x.shape[0], KERNEL - 1, x.shape[2])
        return torch.cat([before, x], dim=1)[:, 1 - KERNEL :]

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates per sample."""
        return tokens * self.conv.weight.numel()


class SelectiveScan(nn.Module):
    """Mamba's scan in one direction, with all that a direction owns.

    Args:
        width: Channels.
        rank: Of the projection to step sizes.
        has_conv: Whether a causal convolution comes first, as in Mamba.
    """

    def __init__(self, width: int, rank: int, has_conv: bool = True) -> None:
        super().__init__()
        self.rank = rank
        self.conv = CausalConv(width) if has_conv else None
        self.input_proj = nn.Linear(width, rank + 2 * STATE, bias=False)
        self.step_proj = nn.Linear(rank, width)
        nn.init.uniform_(self.step_proj.weight, -(rank**-0.5), rank**-0.5)
        self.step_proj.bias = nn.Parameter(_start_of_steps(width))
        rates = torch.arange(1.0, STATE + 1).expand(width, -1)
        self.log_rates = nn.Parameter(rates.log())
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, impl: Impl = "auto", reverse: bool = False) -> Tensor:
        """(b, n, width) -> (b, n, width), each token's output of it and those before.

        float16 comes out in float32: outputs grow with the third power of the tokens.

        Args:
            x: The tokens.
            impl: See ``attnzoo.ops.selective_scan``.
            reverse: Whether the last token is the first.
        """
        is_by_kernels = choose("selective_scan", impl, x) == "triton"
        if reverse and not is_by_kernels:
            return self.forward(x.flip(1), impl).flip(1)
        x = x if self.conv is None else self.conv(x, None, impl, reverse)
        if is_by_kernels:
            from attnzoo.ops.selective_scan.triton import scan_by_kernels

            step, bias, b, c = self._projected(x)
            operands = step, _rates(self.log_rates), b, c, bias, self.skip
            return scan_by_kernels(in_wide_range(x), *operands, reverse)
        operands, x = self._operands(x), in_wide_range(x)
        return _add_skip(selective_scan(x, *operands, impl=impl), x, self.skip)

    def advance(self, x: Tensor, carried: Carried | None) -> tuple[Tensor, Carried]:
        """``forward`` of tokens that follow others, without a gradient."""
        before, state = carried or (None, None)
        if self.conv is not None:
            x, before = self.conv(x, before), self.conv.last(x, before)
        step, rates, b, c = self._operands(x)
        out, state = selective_block(x, step, rates, b, c, state)
        x = in_wide_range(x)
        return _add_skip(out.to(x.dtype), x, self.skip), (before, state)

    def _operands(self, x: Tensor) -> tuple[Tensor, ...]:
        step, bias, b, c = self._projected(x)
        return _steps(step, bias), _rates(self.log_rates), b, c

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """What steps are before their bias, the bias, and what states take in and give out."""
        step, b, c = self.input_proj(x).split([self.rank, STATE, STATE], dim=-1)
        if is_bare(self.step_proj, of_all=False):
            # The bias in float32: half precision does not have differences of 0.001.
            return F.linear(step, self.step_proj.weight), self.step_proj.bias, b, c
        # An adapter or a hook has its own idea of its weight.
        return self.step_proj(step), torch.zeros_like(self.skip), b, c

    def macs_parts(self, tokens: int) -> dict[str, int]:
        """Multiply-accumulates per sample; the core as the recurrence does it."""
        weights = self.input_proj.weight.numel() + self.step_proj.weight.numel()
        return {
            "projections": tokens * weights,
            "core": selective_scan_macs(tokens, *self.log_rates.shape),
            "conv": 0 if self.conv is None else self.conv.macs(tokens),
        }


class Mamba(nn.Module):
    """Mamba's layer; with two directions, DiS's: the second scans the tokens in reverse.

    (sum of scans(x) * SiLU(z)) W_out with x, z = tokens W_in; the directions share both weights.

    Args:
        dim: Width of the tokens.
        directions: 1 or 2.
    """

    scans: Any

    def __init__(self, dim: int, directions: int = 1) -> None:
        super().__init__()
        width = EXPAND * dim
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        rank = math.ceil(dim / 16)
        self.scans = nn.ModuleList(SelectiveScan(width, rank) for _ in range(directions))
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, impl: Impl = "auto") -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        out = self.scans[0](x, impl)
        back = self.scans[1](x, impl, reverse=True) if len(self.scans) > 1 else None
        return self.out_proj(silu_gate(out, z, back, impl=_beside(impl, "silu_gate")))

    def advance(
        self, x: Tensor, carried: Carried | None, direction: int = 0
    ) -> tuple[Tensor, Carried]:
        """One direction's part of ``forward``, of tokens that follow others in its order."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        out, after = self.scans[direction].advance(x, carried)
        return self.out_proj(_gated(out, z).to(z.dtype)), after

    def macs_parts(self, tokens: int) -> dict[str, int]:
        """Multiply-accumulates per sample; the core as the recurrence does it."""
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        scans = [scan.macs_parts(tokens) for scan in self.scans]
        return sum_of({"projections": tokens * weights}, *scans)


class Mamba2(nn.Module):
    """Mamba-2's layer: one decay per head and token, and a norm before the last projection.

    Args:
        dim: Width of the tokens.
        num_heads: Heads, which divide twice that width.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.width = EXPAND * dim
        self.in_proj = nn.Linear(dim, 2 * self.width + 2 * SSD_STATE + num_heads, bias=False)
        self.conv = CausalConv(self.width + 2 * SSD_STATE)
        self.step_bias = nn.Parameter(_start_of_steps(num_heads))
        self.log_rates = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(num_heads, 1))
        self.norm_weight = nn.Parameter(torch.ones(self.width))
        self.out_proj = nn.Linear(self.width, dim, bias=False)

    def forward(self, x: Tensor, impl: Impl = "auto") -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        z, x, step = self._split(x)
        x, *operands = self._operands(self.conv(x), step)
        return self._finish(ssd_scan(*operands, impl=impl), x, z)

    def advance(self, x: Tensor, carried: Carried | None) -> tuple[Tensor, Carried]:
        """``forward`` of tokens that follow others."""
        before, state = carried or (None, None)
        z, x, step = self._split(x)
        after = self.conv.last(x, before)
        x, taken, log_decay, b, c = self._operands(self.conv(x, before), step)
        out, state = ssd_block(taken, log_decay, b, c, state)
        return self._finish(out, x, z), (after, state)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        widths = [self.width, self.width + 2 * SSD_STATE, self.num_heads]
        return self.in_proj(x).split(widths, dim=-1)

    def _operands(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """The tokens, (b, n, heads, d), and what ``ssd_scan`` takes of them."""
        x, b, c = x.split([self.width, SSD_STATE, SSD_STATE], dim=-1)
        x = in_wide_range(rearrange(x, "b n (h d) -> b n h d", h=self.num_heads))
        step = _steps(step, self.step_bias)
        taken = (step.unsqueeze(-1) * x).to(x.dtype)
        return x, taken, step * _rates(self.log_rates), b, c

    def _finish(self, out: Tensor, x: Tensor, z: Tensor) -> Tensor:
        out = _add_skip(out.to(x.dtype), x, self.skip).flatten(2)
        return self.out_proj(rms_norm(_gated(out, z), self.norm_weight).to(z.dtype))

    def macs_parts(self, tokens: int) -> dict[str, int]:
        """Multiply-accumulates per sample; the core as the recurrence does it."""
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return {
            "projections": tokens * weights,
            "core": ssd_scan_macs(tokens, self.width, SSD_STATE),
            "conv": self.conv.macs(tokens),
        }


def sum_of(*parts: dict[str, int]) -> dict[str, int]:
    """Multiply-accumulates of several modules, by part."""
    names = dict.fromkeys(name for counts in parts for name in counts)
    return {name: sum(counts.get(name, 0) for counts in parts) for name in names}


def _beside(impl: Impl, name: str) -> Impl:
    """How an operator beside a scan is computed: as the scan is, but for libraries' scans."""
    return impl if impl in TABLE[name] else "auto"


def _steps(step: Tensor, bias: Tensor | float) -> Tensor:
    return F.softplus(_wide(step) + bias)


def _rates(log_rates: Tensor) -> Tensor:
    return -_wide(log_rates).exp()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@in_float32
def _add_skip(out: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    return torch.addcmul(out, x, skip)


@in_float32
def _gated(out: Tensor, z: Tensor) -> Tensor:
    return out * F.silu(z)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of what scans give, computed in float32, with Mamba-2's eps."""
    # PyTorch's has float32 inside, and takes a GPU one kernel where both dtypes are the same.
    return (_rms_norm if x.dtype == weight.dtype else _wide_rms_norm)(x, weight)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


_wide_rms_norm = in_float32(_rms_norm)


def _start_of_steps(count: int) -> Tensor:
    """What softplus turns into steps whose logarithms are uniform."""
    low, high = map(math.log, _STEPS)
    steps = torch.empty(count).uniform_(low, high).exp().clamp_min(1e-4)
    return steps + torch.log(-torch.expm1(-steps))
