"""What an older checkout takes for sampling and for a step of its model.

    python bench/whole_models/before.py FOLDER '{"what": "sampling", "mechanism": "sana", ...}'

``older.py`` runs this file, which then imports what FOLDER has, and nothing of the tree that it
lies in. ``Step`` is what is timed of this tree, too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANSWER = "answer "  # begins a line that is one


class Step:
    """A forward under autocast without gradients, or a training step; ``step`` takes one.

    Args:
        model: A DiT on the device, with four channels.
        mode: "forward" or "train".
        batch: Images of a step.
        side: Latent pixels along one side.
        auxiliary: Gives what the model's mechanisms want added to the loss, or None.
        cast: Makes the ``CastWeights`` that train.py steps with; None where it has none.
    """

    def __init__(
        self, model: nn.Module, mode: str, batch: int, side: int,
        auxiliary: Callable[[nn.Module], Tensor | None], cast: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.auxiliary = model, auxiliary
        self.parameters = list(model.parameters())
        device = self.parameters[0].device
        self.is_gpu = device.type == "cuda"
        generator = torch.Generator().manual_seed(1)
        self.images, self.noise = (
            torch.randn(batch, 4, side, side, generator=generator).to(device) for _ in range(2)
        )
        self.times = torch.linspace(1, 999, batch).to(device)
        self.labels = (torch.arange(batch) % 1000).to(device)
        self.step: Callable[[], Tensor] = self._forward
        if mode == "train":
            # A rate that moves no weight visibly: every round sees the same model.
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=1e-9, weight_decay=0.0, fused=True, capturable=self.is_gpu
            )
            self.average = [parameter.detach().clone() for parameter in self.parameters]
            self.step = self._train
            self.casts = None if cast is None else cast(model, self._predicted)
            self.auxiliary(model)  # of that forward

    def _predicted(self) -> Tensor:
        device = "cuda" if self.is_gpu else "cpu"
        with torch.autocast(device, torch.bfloat16, self.is_gpu, cache_enabled=False):
            return self.model(self.images, self.times, self.labels, return_dict=False)[0]

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self._predicted()

    def _train(self) -> Tensor:
        self.optimizer.zero_grad()
        if self.casts is None:
            loss = self._gradients()
        else:
            self.casts.refresh()
            with self.casts.in_place():
                loss = self._gradients()
            self.casts.hand_over()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        lerp: Any = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        with torch.no_grad():  # else the averages hold every step's graph
            lerp(self.average, self.parameters, 1e-4)
        return loss

    def _gradients(self) -> Tensor:
        loss = F.mse_loss(self._predicted().chunk(2, dim=1)[0].float(), self.noise)
        auxiliary = self.auxiliary(self.model)
        (loss if auxiliary is None else loss + auxiliary).backward()
        return loss.detach()


def open_gates(model: nn.Module) -> None:
    """Draws what is zero: zeroed gates would make every block the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def seconds_of(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Wall time of one call, of so many in a row after one that is not timed."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def _built(mechanism: str, size: str, resolution: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    backbones = importlib.import_module("backbones")
    model = backbones.build_backbone(mechanism, size, "controlled", resolution).to(device)
    open_gates(model)
    return model


def _answer(found: Any) -> None:
    print(f"\n{ANSWER}{json.dumps(found)}", flush=True)


def step(mechanism: str, size: str, resolution: int, mode: str, batch: int, device: str) -> None:
    """Prepares a step, on a GPU as a CUDA graph, and answers every number with seconds of one.

    Args:
        mechanism: The attention.
        size: Of the backbone.
        resolution: Pixels along one side, of a latent model.
        mode: "forward" or "train".
        batch: Images of a step.
        device: "cuda" or "cpu".
    """
    model = _built(mechanism, size, resolution, device).train(mode == "train")
    auxiliary = importlib.import_module("attnzoo").auxiliary_loss
    call = Step(model, mode, batch, resolution // 8, auxiliary).step
    if device == "cpu":
        out = call()
    else:  # on one stream, to which the weights' nodes of the backward keep
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside):
            out = call()
        call = graph.replay
        call()
    if not out.isfinite().all():
        raise SystemExit("its step is not finite")
    _answer("ready")
    for line in sys.stdin:
        _answer(seconds_of(call, int(line), device))


def sampling(
    mechanism: str, size: str, resolution: int, images: int, steps: int, rounds: int, device: str
) -> None:
    """Answers with images per second with guidance, under autocast to bfloat16 and in float32.

    Args:
        mechanism: The attention.
        size: Of the backbone.
        resolution: Pixels along one side, of a latent model.
        images: Of a batch.
        steps: Of the sampler.
        rounds: Whose median counts, in bfloat16; in float32 one is taken.
        device: "cuda" or "cpu".
    """
    try:
        diffusion: Any = importlib.import_module("recipes.lab.diffusion")
    except ModuleNotFoundError:  # where it was before
        diffusion = importlib.import_module("recipes.diffusion")
    model = _built(mechanism, size, resolution, device).eval()
    labels, side = torch.arange(images), resolution // 8

    def draw(steps: int) -> float:
        start = time.perf_counter()
        drawn = diffusion.sample(
            model, diffusion.DIFFUSION_PRESETS["dit"], labels=labels, indices=labels, seed=0,
            num_classes=1000, shape=(4, side, side), device=device, cfg=4.0, sampler="dpm++",
            steps=steps, batch_size=images,
        )  # fmt: skip
        if not drawn.cpu().isfinite().all():  # waits for the device, too
            raise SystemExit("its images are not finite")
        return time.perf_counter() - start

    found = {}
    autocast = torch.autocast(device, torch.bfloat16)
    ways = {"bfloat16": (autocast, rounds), "float32": (contextlib.nullcontext(), 1)}
    for name, (casts, count) in ways.items():
        with casts:
            draw(steps=3)  # compiles, picks kernels
            found[name] = images / statistics.median(draw(steps) for _ in range(count))
    _answer(found)


def main(folder: str, asked: str) -> None:
    """Answers what was asked for."""
    sys.path[0] = folder  # instead of the folder that this file lies in
    own = importlib.import_module("backbones").__file__
    if not own or not Path(own).is_relative_to(Path(folder).resolve()):
        raise SystemExit(f"Python imports {own} instead of what {folder} has")
    given = json.loads(asked)
    {"step": step, "sampling": sampling}[given.pop("what")](**given)


if __name__ == "__main__":
    main(*sys.argv[1:])
