"""What several processes have to agree on, and weights that they share out."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from recipes.lab.console import UserError, is_users_mistake

Result = TypeVar("Result")


_PATIENCE = timedelta(days=1)
# The types in which gradients of several processes are added up, by name of the setting.
SUMS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What these plug into training is not what a run's settings say, or not tested.
_FOREIGN = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def make_accelerator(
    precision: str = "fp32", is_patient: bool = False, **options: Any
) -> Accelerator:
    """An Accelerator that knows every process that was started, on GPUs or CPUs.

    Args:
        precision: Of products of matrices.
        is_patient: Whether processes wait for one another for a day, because they may
            be apart by a whole shard: torch gives up after 10 minutes on GPUs and 30 on CPUs.
        **options: Of the Accelerator.

    Raises:
        UserError: A variable of the environment asks Accelerate for what training does not do, or
            for what it cannot read; or it sees another number of processes than were started.
    """
    _refuse_foreign()
    # The precision of a process' first Accelerator would stay that of all later ones.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            # Under torchrun without a GPU, Accelerate otherwise makes every process a world of
            # one.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)] if is_patient else None,
            **options,
        )
        started = int(os.environ.get("WORLD_SIZE", 1))
    except Exception as error:
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        named = [
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith("ACCELERATE_") or name in launched
        ]
        if not named:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"Accelerate cannot start with {', '.join(named)} in the environment ({reason}); "
            f"unset what you did not mean, or start with torchrun"
        ) from error
    if accelerator.num_processes != started:
        raise UserError(
            f"the launcher started {started} processes, Accelerate sees "
            f"{accelerator.num_processes}; start with torchrun --standalone --nproc_per_node N"
        )
    return accelerator


def _refuse_foreign() -> None:
    no = ("", "0", "no", "false", "off", "n", "f")
    asked = [f"ACCELERATE_USE_{name}" for name in _FOREIGN] + ["ACCELERATE_DYNAMO_BACKEND"]
    for name in asked:
        value = os.environ.get(name, "")
        if value.lower() not in no:
            instead = {
                "ACCELERATE_USE_FSDP": "--sharded",
                "ACCELERATE_DYNAMO_BACKEND": "--compile",
            }.get(name, "DDP or --sharded")
            raise UserError(
                f"{name}={value} in the environment asks Accelerate for what is not supported "
                f"here: unset it, and use {instead}"
            )


def neighbors() -> int:
    """Training processes of this launch on this machine, which share its memory."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(local) if local.isdigit() else 1


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Runs ``action`` on the main process and gives every process its result.

    Raises:
        UserError: ``action`` raised what the caller can put right; every process does.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except Exception as error:
            if not is_users_mistake(error):
                raise
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        error = UserError(outcome[1])
        error.is_shared = True
        raise error
    return outcome[0]


def of_all(accelerator: Accelerator, action: Callable[[], list[Result]]) -> list[Result]:
    """What ``action`` finds in each process, one after the other, in every process.

    Raises:
        UserError: In some process it raised what the caller can put right; every process does.
    """
    if accelerator.num_processes == 1:
        return action()
    found: list[Result] = []
    problem = None
    try:
        found = action()
    except Exception as error:
        if not is_users_mistake(error):
            raise
        problem = str(error)
    outcomes: Any = gather_object([(found, problem)])
    if problems := [text for _, text in outcomes if text is not None]:
        error = UserError(problems[0])
        error.is_shared = True
        raise error
    return [one for part, _ in outcomes for one in part]


def differing_buffers(model: nn.Module) -> list[str]:
    """Buffers of a model's state that are not alike in all processes; each has to call it.

    The zoo's own, such as batch norms, move by what all processes have seen.
    """
    state = model.state_dict().keys()
    names, differ = [], []
    for name, buffer in model.named_buffers():
        if name in state and not buffer.is_complex():
            first = buffer.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(first, 0)
            names.append(name)
            # Far above what two compilers may round otherwise.
            differ.append((buffer.double() - first).norm() > 1e-4 * first.double().norm())
    if not names:
        return []
    found = torch.stack(differ).int()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [name for name, is_other in zip(names, found.tolist(), strict=True) if is_other]


def shard(model: nn.Module, accelerator: Accelerator, sums: torch.dtype = torch.float32) -> None:
    """Spreads weights, gradients and optimizer state over the processes (FSDP2), block by block.

    Torch's own call, because Accelerate ignores its FSDP2 plugin on a CPU without a word.

    Args:
        model: On its device.
        accelerator: Of all processes.
        sums: The type in which gradients are added up.

    Raises:
        UserError: It has a parameter that FSDP2 does not hold, which some mechanism brings.
    """
    check_parts(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=None if sums == torch.float32 else sums)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh, mp_policy=policy)


def check_parts(model: nn.Module) -> None:
    """Refuses by name what FSDP2 fails on in words of its own, or at the first step."""
    found: dict[int, tuple[str, str]] = {}
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        root, _, rest = name.partition(".")
        part = rest.partition(".")[0] if root == "blocks" else ""
        place, other = found.setdefault(id(parameter), (part, name))
        one, kind = own = name, parameter.dtype
        if parameter.requires_grad:  # FSDP2 asks nothing of others
            one, kind = first.setdefault(part, own)
        if not parameter.ndim:
            reason = f"{name!r} has no dimension to split: make it one of shape (1,)"
        elif place != part:
            reason = f"{other!r} and {name!r} are one tensor, and blocks are split one by one"
        elif kind != parameter.dtype:
            reason = f"{one!r} is {kind} and {name!r} {parameter.dtype} in one block"
        else:
            continue
        raise UserError(f"--sharded cannot split the model: {reason}, or drop --sharded")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the CPU; for a shard every process has to call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def placed_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, on the device of ``like`` and sharded as it is."""
    whole = whole.to(like.device)
    if isinstance(like, DTensor) and whole.ndim:
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole
