"""How much memory a training step takes, told before it is taken.

What autograd keeps of one image is counted in a forward of one image and one of two, and scaled
to a micro-step. Weights, gradients, Adam's state and the average are counted exactly.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import attnzoo
from recipes.lab.console import UserError
from recipes.lab.training.ema import local
from recipes.lab.training.guard import uncompiled
from recipes.lab.training.settings import Settings

if TYPE_CHECKING:
    from recipes.lab.training.trainer import Trainer

# What a backward pass needs beside what the forward has kept, and what the allocator wastes. On a
# CPU the estimate was 7 to 11 % too high for steps of 2 to 4 GB (softmax, DyDiLA), and up to 25 %
# too low for steps of 200 MB, of seven mechanisms.
_OVERHEAD = 1.25
# Of what blocks keep as they are written, compiled ones kept 0.6 to 0.72 on an H100: softmax, Sana
# and DyDiLA of size L with 256 and 4,096 tokens.
_COMPILED = 0.75


def step_bytes(trainer: Trainer) -> int:
    """Bytes that training will take beside what the process holds now, on its device.

    Runs the model on one and on two images, so what a mechanism cannot do is raised here.

    Args:
        trainer: Before its first step.
    """
    settings, model = trainer.settings, trainer.model
    processes = trainer.accelerator.num_processes
    share = settings.batch_size // processes // settings.accumulate
    one, two = _saved_bytes(trainer, 1), _saved_bytes(trainer, 2)
    if settings.gradient_checkpointing:
        model.disable_gradient_checkpointing()
        try:
            block = _saved_bytes(trainer, 1) // max(1, len(model.blocks))
        finally:
            model.enable_gradient_checkpointing()
        one, two = one + block, two + 2 * block
    activations = (one + (two - one) * (share - 1)) * (_COMPILED if trainer.compiling.is_on else 1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Gradients and Adam's two moments.
    return int(_OVERHEAD * (activations + 3 * weights))


def _saved_bytes(trainer: Trainer, count: int) -> int:
    """What autograd keeps for the backward pass of ``count`` images, weights left out."""
    model, device = trainer.model, trainer.accelerator.device
    weights = [local(t) for t in [*model.parameters(), *model.buffers()]]
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []

    def note(tensor: Tensor) -> None:
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            # Else another tensor could get its address. The tensor itself, here or returned, would
            # hold the autograd graph that calls this, forever.
            alive.append(storage)

    side = trainer.dataset.resolution
    images = torch.zeros(count, trainer.dataset.channels, side, side, device=device)
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    modes = [module for module in model.modules() if module.training]
    model.eval()  # batch norm would note the statistics of these images
    try:
        with contextlib.ExitStack() as stack:
            if trainer.compiling.is_on:  # for other sizes
                stack.enter_context(uncompiled())
            stack.enter_context(trainer.accelerator.autocast())
            stack.enter_context(saved_tensors_hooks(note, lambda nothing: nothing))
            model(images, timestep=zeros, class_labels=zeros)
    finally:
        attnzoo.auxiliary_loss(model)  # clears them, and with them what they keep alive
        for module in modes:
            module.training = True
        if trainer.is_sharded:
            model.reshard()  # type: ignore[operator]
    return sum(kept.values())


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory that this process can still get on a device; None where the system does not say.

    Args:
        device: A GPU, or the CPU: then the limits of this process' control groups count too.
        root: Of the file system.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            found += _limits(root / "sys/fs/cgroup/memory", path, *names)
    return max(0, min(found)) if found else None


def _limits(top: Path, path: str, limit: str, usage: str) -> list[int]:
    # A container sees its own group at the top, whatever path it is told.
    groups = {top / part.lstrip("/") for part in (path, *map(str, Path(path).parents))} | {top}
    found = []
    for group in groups:
        most, used = _lines(group / limit), _lines(group / usage)
        if most and used and most[0].isdigit() and used[0].isdigit():
            pairs = [line.split() for line in _lines(group / "memory.stat")]
            # Of cached files the system makes room.
            cached = [int(p[1]) for p in pairs if p[0] in ("inactive_file", "total_inactive_file")]
            found.append(int(most[0]) - int(used[0]) + max(cached, default=0))
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeError):
        return []


def check_memory(needed: int, free: int | None, settings: Settings) -> None:
    """Refuses a step that will not fit.

    Args:
        needed: Of ``step_bytes``, for all processes that share the memory.
        free: Of ``free_bytes``.
        settings: What to change.

    Raises:
        UserError: It needs more than there is; the message says what would make it smaller.
    """
    if free is None or needed <= free:
        return
    ways = ["--batch-size", "more --accumulate"]
    if not settings.gradient_checkpointing:
        ways.append("--gradient-checkpointing")
    raise UserError(
        f"a step of {settings.batch_size} images in {settings.accumulate} micro-steps takes about "
        f"{needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: try a smaller "
        f"{', '.join(ways)}, or go on all the same with --ignore-memory"
    )
