"""Gradients that several processes add up while the backward still computes others."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.cast_once import CastWeights

# One for all trainings of a process, and as long as that of all processes: it takes memory.
_groups_of: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


class GradientBuckets:
    """Adds up a model's gradients over all processes, bucket by bucket, during the backward.

    A backward gives gradients in about the reverse order of the parameters, and so buckets are
    made of these. One is reduced, beside the backward, as soon as its gradients are there and the
    buckets before it are on their way: all processes reduce the same buckets in the same order,
    also where a parameter has a gradient in one of them only. A missing gradient counts as 0; its
    bucket and those behind it are reduced after the backward.

    Gradients are reduced where autograd has left them, a bucket by one call: a flat copy would
    read and write all of them once more, within the backward.

    Torch's DistributedDataParallel does likewise, but sorts its buckets anew after the first
    step, so that a resumed run would add up in another order than one that went on; it finds
    unused parameters by a wait for the GPU, which no CUDA graph can hold; and it has to be
    built on the stream of a recording, eleven steps before it.

    Args:
        model: On its device; which of its parameters are trained must not change any more.
        megabytes: Of a bucket, at least one parameter each; 0 reduces all after the backward.
        sums: The type in which float32 gradients are added up, if another one: bfloat16 halves
            what is sent, and costs no cast where a copy of ``follow`` has its gradient in it.
    """

    def __init__(
        self, model: nn.Module, megabytes: float, sums: torch.dtype = torch.float32
    ) -> None:
        self._buckets = _buckets(model, megabytes * 1e6 or math.inf)
        self._group = _group(next(model.parameters()).device.type)
        self._casts: CastWeights | None = None
        self._sums = sums
        self._is_beside = megabytes > 0
        self._works: list[tuple[Any, Sequence[Tensor]]] = []  # with what is on its way
        self._missing: list[int] = []
        self._next = 0
        self._is_open = False
        # The first backward may break off in one process alone, by its compiler.
        self._is_proven = False
        self._hook_on({id(parameter): parameter for parameter in model.parameters()})

    def follow(self, casts: CastWeights) -> None:
        """Takes gradients of copies that stand in parameters' places; to be called once.

        Args:
            casts: Of the model.
        """
        self._casts = casts
        self._hook_on(casts.copies)

    def _hook_on(self, getting: Mapping[int, nn.Parameter]) -> None:
        for index, bucket in enumerate(self._buckets if self._is_beside else ()):
            for parameter in bucket:
                if (owner := getting.get(id(parameter))) is not None:
                    owner.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))

    def begin(self) -> None:
        """To be called before the backward after which the gradients are complete."""
        for work, _ in self._works:  # of a backward that broke off
            with contextlib.suppress(RuntimeError):
                work.wait()
        self._works = []
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0
        self._is_open = self._is_proven

    def finish(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """To be called after that backward; leaves the sums as gradients.

        A stream waits for them, not the host.

        Args:
            numbers: (n,), to be summed in place.

        Returns:
            ``numbers``, and the norm of all sums, ().
        """
        self._is_open = False
        while self._next < len(self._buckets):
            self._reduce_next()
        self._reduce([numbers])
        norms: list[Tensor] = []
        *works, (last, _) = self._works
        for bucket, (work, sums) in zip(self._buckets, works, strict=True):
            work.wait()
            self._leave(bucket, sums)
            # While the last sums are on their way.
            norms += torch._foreach_norm([p.grad for p in bucket])  # type: ignore
        last.wait()
        self._works = []
        self._is_proven = True
        # In the order of the parameters, as one process adds them up.
        return numbers, torch.linalg.vector_norm(torch.stack(norms[::-1]))

    def _arrived(self, index: int) -> None:
        if not self._is_open:
            return
        if index < self._next:
            raise RuntimeError(
                "a parameter has got a gradient twice in one backward, the second time after the "
                "processes had begun to add it up: use --bucket-mb 0"
            )
        self._missing[index] -= 1
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        self._reduce(self._lowered(bucket) if self._lowers(bucket) else self._whole(bucket))

    def _lowers(self, bucket: Sequence[nn.Parameter]) -> bool:
        return bucket[0].dtype == torch.float32 != self._sums

    def _whole(self, bucket: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients in their own type, to be added up in place."""
        if self._casts is not None:
            self._casts.hand_over(bucket)
        for parameter in bucket:
            if parameter.grad is None:  # of options that leave it unused, perhaps here only
                parameter.grad = torch.zeros_like(parameter)
            elif _uses(parameter.grad) > _ALONE:  # the backward goes on with the same numbers
                parameter.grad = parameter.grad.clone()
        return [parameter.grad for parameter in bucket]  # type: ignore[misc]

    def _lowered(self, bucket: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients rounded, in place only where a copy has its own; the parameters have none."""
        copies = {} if self._casts is None else self._casts.copies
        found = []
        for parameter in bucket:
            sent = None
            for holder in (parameter, copies.get(id(parameter))):
                if holder is not None and holder.grad is not None:
                    sent = holder.grad if sent is None else sent + holder.grad
                    holder.grad = None
            if sent is None:
                sent = torch.zeros_like(parameter)
            elif sent.dtype == self._sums and _uses(sent) > _ALONE:
                sent = sent.clone()
            found.append(sent.to(self._sums))
        return found

    @torch.no_grad()
    def _leave(self, bucket: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        if self._lowers(bucket):
            whole = [torch.empty_like(parameter) for parameter in bucket]
            torch._foreach_copy_(whole, sums)  # type: ignore
            for parameter, gradient in zip(bucket, whole, strict=True):
                parameter.grad = gradient

    def _reduce(self, tensors: Sequence[Tensor]) -> None:
        with dist._coalescing_manager(self._group, async_ops=True) as work:  # type: ignore
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)
        self._works.append((work, tensors))


def _uses(tensor: Tensor) -> int:
    """How many tensors share the memory of this one, and as many more as for any."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ALONE = _uses(torch.empty(1))


def _buckets(model: nn.Module, most: float) -> list[list[nn.Parameter]]:
    """Trained parameters of one type and up to ``most`` bytes, the last ones first."""
    buckets: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        size = parameter.numel() * parameter.element_size()
        is_alike = buckets and buckets[-1][0].dtype == parameter.dtype
        if not is_alike or filled + size > most:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += size
    return buckets


def _group(device: str) -> dist.ProcessGroup:
    """All processes once more: a backward may have collectives of its own in between.

    Where gradients arrive differently, the processes disagree on the order of the two kinds.
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _groups_of:
        options: dict[str, Any] = {}
        if device == "cuda":  # otherwise a sum waits for a place behind the backward's kernels
            high = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options = {"backend": "nccl", "pg_options": high}
        group = dist.new_group(**options)
        assert isinstance(group, dist.ProcessGroup)
        _groups_of[world] = group
    return _groups_of[world]


def _hook(buckets: weakref.ref[GradientBuckets], index: int) -> Callable[[Tensor], None]:
    # A parameter keeps its hook, out of sight of the garbage collector.
    def arrived(_: Tensor) -> None:
        found = buckets()
        if found is not None:
            found._arrived(index)

    return arrived
