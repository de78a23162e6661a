"""A mechanism of your own in one file: each token sees the mean of its row and of its column.

    python examples/own_mechanism.py
    python recipes/train.py --attn cross-mean --import examples/own_mechanism.py

O = W (act(G) * (row mean of V + column mean of V)); cost per sample 3 d^2 n. The first command
checks the contract that every mechanism keeps, and that cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import attnzoo
from attnzoo.counting import count_macs
from attnzoo.testing import CHECKS


@dataclass(frozen=True, kw_only=True)
class Config(attnzoo.AttentionConfig):
    """Options: ``--set gate=sigmoid``, or ``build_attention(..., gate="sigmoid")``."""

    gate: Literal["silu", "sigmoid"] = "silu"  # silu lets a token take more than the mean


@attnzoo.register_attention("cross-mean")
class CrossMeanAttention(attnzoo.Attention):
    Config = Config
    config: Config
    complexity = "O(n d)"  # for the table of python -m attnzoo

    def __init__(self, context: attnzoo.AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.value_gate = nn.Linear(self.dim, 2 * self.dim)
        self.proj = nn.Linear(self.dim, self.dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self.check_tokens(x, grid)
        value, gate = rearrange(self.value_gate(x), "b (h w) c -> b h w c", h=grid[0]).chunk(2, -1)
        mean = value.mean(1, keepdim=True) + value.mean(2, keepdim=True)  # (b, h, w, c)
        gate = F.silu(gate) if self.config.gate == "silu" else gate.sigmoid()
        return self.proj(rearrange(gate * mean, "b h w c -> b (h w) c"))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        return {"projections": 3 * self.dim**2 * grid[0] * grid[1]}


if __name__ == "__main__":
    for check in CHECKS:
        check("cross-mean")
        print(f"{check.__name__}: passed")
    cost = count_macs(attnzoo.build_attention("cross-mean", dim=384), grid=(16, 16))
    print(f"{cost.total:,} multiply-accumulates at 16 x 16 tokens, stated and measured")
