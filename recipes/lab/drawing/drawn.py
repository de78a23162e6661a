"""A run as the figures want it: its model, real images in noise, what its layers get."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.contract import Attention
from backbones import DiT
from recipes.lab.diffusion import generator_for
from recipes.lab.drawing.canvas import plain
from recipes.lab.drawing.palette import color_of
from recipes.lab.evaluation.features import real_sets
from recipes.lab.training.checkpoint import Run
from recipes.sample import RunSampler

_NOISE_TIME = 300  # of 1000: objects are visible, the model still has work to do


class NotWithoutRun(Exception):
    """The runs that were given do not have what a figure shows."""


class Drawn:
    """A run, with what several figures want of it."""

    def __init__(self, run: Run, cfg: float, per_class: int) -> None:
        self.run, self.cfg, self.per_class = run, cfg, per_class
        self.config = run.config()
        self.draw = RunSampler(run, device="cpu")
        self.model: DiT = self.draw.model.eval()
        settings = self.config["settings"]
        self.attn = self.model.config.attn
        self.data, self.level = settings["data"], settings["level"]
        self.class_names = self.config["data"]["class_names"]
        self.options = settings["attn_options"]

    @property
    def label(self) -> str:
        """Mechanism and options, as a picture may show them."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return plain(f"{self.attn}{f' ({options})' if options else ''}")

    @property
    def color(self) -> str:
        """The mechanism's own."""
        is_increasing = self.options.get("lambda_init") == "increasing"
        return color_of("increasing factors" if is_increasing else self.attn)

    @property
    def layers(self) -> list[Attention]:
        """The attention of every block."""
        return [block.attention for block in self.model.blocks]

    def noisy_images(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Real images, the same in noise, and their labels: what a model works on."""
        _, test = real_sets(
            self.data, resolution=self.config["data"]["resolution"], level=self.level
        )
        images, labels = test.batch(torch.arange(count))
        noise = torch.randn(images.shape, generator=generator_for(0, 0))
        diffusion = self.draw.diffusion
        if diffusion.prediction == "flow":
            share = _NOISE_TIME / 1000
            return images, (1 - share) * images + share * noise, labels
        times = torch.full((count,), _NOISE_TIME)
        return images, diffusion.scheduler("ddpm", 50).add_noise(images, noise, times), labels

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

    def hook_of(index: int) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            see(index, module, *arguments)

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_with(runs: Sequence[Drawn], needs: str, description: str) -> Drawn:
    """The first run whose attention has an attribute; NotWithoutRun where there is none."""
    for drawn in runs:
        if hasattr(drawn.layers[0], needs):
            return drawn
    raise NotWithoutRun(f"it needs {description}")


def wrapped(text: str, width: int = 26) -> str:
    """A title that does not run into its neighbour."""
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))
