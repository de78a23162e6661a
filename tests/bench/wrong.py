"""A user's mechanism whose fast path is wrong, one that needs much memory, one that hangs."""

import dataclasses
import time
from typing import Literal

import torch

import attnzoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attnzoo.AttentionConfig):
    impl: Literal["auto", "reference"] = "auto"


class Scaled(attnzoo.Attention):
    """Projects every token; a base for what goes wrong."""

    Config = Config

    def __init__(self, context, config):
        super().__init__(context, config)
        self.proj = torch.nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return self.proj(x)

    def macs_parts(self, grid):
        return {"projections": self.dim**2 * grid[0] * grid[1]}


@attnzoo.register_attention("wrong")
class Wrong(Scaled):
    """The twin disagrees by a thousandth."""

    def forward(self, x, grid):
        return super().forward(x, grid) * (1.0 if self.config.impl == "reference" else 1.001)


@attnzoo.register_attention("greedy")
class Greedy(Scaled):
    """Takes 16 GiB beyond 256 tokens."""

    def forward(self, x, grid):
        out = super().forward(x, grid)
        if x.shape[1] > 200 and not x.is_meta:
            out = out + torch.zeros(2**32)[0]
        return out


@attnzoo.register_attention("slow")
class Slow(Scaled):
    """Never comes back from a training step on a real device."""

    def forward(self, x, grid):
        if x.shape[1] > 200 and not x.is_meta:
            time.sleep(3600)
        return super().forward(x, grid)


@attnzoo.register_attention("unavailable")
class Unavailable(Scaled):
    """Needs a package that is not there."""

    def forward(self, x, grid):
        import no_such_package_anywhere  # noqa: F401

        return super().forward(x, grid)
