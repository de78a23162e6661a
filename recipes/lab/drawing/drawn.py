"""A run as the figures want it: its model, real images in noise, what its layers get."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.contract import Attention
from backbones.pattern import dotted
from recipes.lab.console import UserError
from recipes.lab.data.datasets import ImageDataset
from recipes.lab.data.latents import EncodedDataset
from recipes.lab.diffusion import generator_for
from recipes.lab.drawing.canvas import plain
from recipes.lab.drawing.palette import color_of
from recipes.lab.evaluation.real import RealImages, real_images
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run

_NOISE_TIME = 300  # of 1000: objects are visible, the model still has work to do


class NotWithoutRun(Exception):
    """The runs that were given do not have what a figure shows."""


class Drawn:
    """A run, with what several figures want of it."""

    def __init__(
        self,
        run: Run,
        cfg: float,
        per_class: int,
        *,
        vae: str | None = None,
        real: str | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        self.run, self.cfg, self.per_class = run, cfg, per_class
        self.config = run.config()
        self.draw = RunSampler(run, device="cpu", vae=vae, imports=imports)
        self.draw.check(cfg=cfg)
        self.model = self.draw.model.eval()
        self.attn = self.model.config["attn"]
        self.class_names = self.config["data"]["class_names"]
        self.options = self.config["settings"].get("attn_options") or {}
        self._real = real

    @cached_property
    def real(self) -> tuple[RealImages, ImageDataset, ImageDataset]:
        """Which real images the run is measured with, those to learn from, and the others.

        Raises:
            UserError: There are none.
        """
        found, reason = real_images(self.run, self.config, self._real)
        if found is None:
            raise UserError(f"{reason}: pass --real FOLDER with real images by class")
        return found, *found.open()

    @property
    def label(self) -> str:
        """Mechanism and options, as a picture may show them."""
        options = ", ".join(f"{name}={value}" for name, value in dotted(self.options).items())
        return plain(f"{self.attn}{f' ({options})' if options else ''}")

    @property
    def color(self) -> str:
        """The mechanism's own."""
        is_increasing = self.options.get("lambda_init") == "increasing"
        return color_of("increasing factors" if is_increasing else self.attn)

    @property
    def layers(self) -> list[Attention]:
        """The attention of every block."""
        return [block.attention for block in self.model.blocks]  # pyright: ignore

    def blocks_with(self, attribute: str) -> list[int]:
        """The blocks whose attention has an attribute: of a mixture not all."""
        return [index for index, layer in enumerate(self.layers) if hasattr(layer, attribute)]

    @property
    def middle_blocks(self) -> list[int]:
        """The block of each mechanism that lies nearest to the middle, in their order."""
        middle = len(self.layers) // 2
        nearest: dict[str, int] = {}
        for index in sorted(range(len(self.layers)), key=lambda index: abs(index - middle)):
            nearest.setdefault(self.layers[index].name, index)
        return sorted(nearest.values())

    def noisy_images(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Real images, the same in noise as the model sees them, and their labels.

        There are fewer where the data has fewer; a model of latents sees encoded images.
        """
        _, _, test = self.real
        indices = torch.arange(min(count, len(test)))
        images, labels = test.batch(indices)
        seen = images
        if self.draw.vae is not None:
            seen = EncodedDataset(test, self.draw.vae).batch(indices)[0]
        noise = torch.randn(seen.shape, generator=generator_for(0, 0))
        is_flow = self.draw.diffusion.prediction == "flow"
        time = _NOISE_TIME / 1000 if is_flow else _NOISE_TIME
        times = torch.full((len(seen),), time)
        return images, self.draw.diffusion.noised(seen, noise, times)[0], labels

    @torch.no_grad()
    def inputs_of_layers(
        self, noisy: Tensor, labels: Tensor
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        """(tokens, grid) that every attention layer gets for these images."""
        found: list[tuple[Tensor, tuple[int, int]]] = []
        with hooked(self.layers, lambda _, layer, x, grid: found.append((x, grid))):
            self.model(
                hidden_states=noisy,
                timestep=torch.full((len(noisy),), _NOISE_TIME),
                class_labels=labels,
            )
        return found


@contextlib.contextmanager
def hooked(
    layers: Sequence[Attention],
    see: Callable[[int, Attention, Tensor, tuple[int, int]], Any],
) -> Iterator[None]:
    """Shows the index, layer, tokens and grid of every call while it lasts."""

    def hook(index: int, layer: Any, arguments: tuple[Any, ...]) -> None:
        see(index, layer, *arguments)

    handles = [
        layer.register_forward_pre_hook(partial(hook, index)) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wrapped(text: str, width: int = 26) -> str:
    """A title that does not run into its neighbor."""
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))
