"""Gradients that several processes add up while the backward still computes others."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Numbers at which a gradient may begin: kernels over many tensors read several numbers at once.
_ALIGNED = 32

# One for all trainings of a process, and as long as that of all processes: it takes memory.
_groups_of: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


class _Bucket(NamedTuple):
    flat: Tensor
    parameters: list[nn.Parameter]
    views: list[Tensor]  # of ``flat``, one for each parameter


class GradientBuckets:
    """Adds up a model's gradients over all processes, bucket by bucket, during the backward.

    A backward gives gradients in about the reverse order of the parameters, and so they lie in
    buckets. One is reduced, beside the backward, as soon as its gradients are there and the
    buckets before it are on their way: all processes reduce the same buckets in the same order,
    also where a parameter has a gradient in one of them only. A missing gradient counts as 0; its
    bucket and those behind it are reduced after the backward.

    Torch's DistributedDataParallel does likewise, but sorts its buckets anew after the first
    step, so that a resumed run would add up in another order than one that went on; it finds
    unused parameters by a wait for the GPU, which no CUDA graph can hold; and it has to be
    built on the stream of a recording, eleven steps before it.

    Args:
        model: On its device; which of its parameters are trained must not change any more.
        megabytes: Of a bucket, at least one parameter each; 0 reduces all after the backward.
    """

    def __init__(self, model: nn.Module, megabytes: float) -> None:
        self._buckets = [_bucket(group) for group in _groups(model, megabytes * 1e6 or math.inf)]
        self._group = _group(next(model.parameters()).device.type)
        self._copies: dict[int, nn.Parameter] = {}  # by identity of a parameter
        self._is_beside = megabytes > 0
        self._works: list[dist.Work] = []
        self._missing: list[int] = []
        self._next = 0
        self._is_open = False
        # The first backward may break off in one process alone, by its compiler.
        self._is_proven = False
        self._hook_on({id(parameter): parameter for parameter in model.parameters()})

    def follow(self, pairs: Iterable[tuple[Tensor, nn.Parameter]]) -> None:
        """Tells of copies that stand in parameters' places and get their gradients; once.

        Args:
            pairs: Of ``CastWeights``.
        """
        self._copies = {id(parameter): copy for parameter, copy in pairs}
        self._hook_on(self._copies)

    def _hook_on(self, getting: dict[int, nn.Parameter]) -> None:
        for index, bucket in enumerate(self._buckets if self._is_beside else ()):
            for parameter in bucket.parameters:
                if (owner := getting.get(id(parameter))) is not None:
                    owner.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))

    def begin(self) -> None:
        """To be called before the backward after which the gradients are complete."""
        for work in self._works:  # of a backward that broke off
            with contextlib.suppress(RuntimeError):
                work.wait()
        self._works = []
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._next = 0
        self._is_open = self._is_proven

    def finish(self, numbers: Tensor) -> Tensor:
        """To be called after that backward; leaves the sums as gradients, views of the buckets.

        A stream waits for them, not the host. They are valid until the next ``begin``.

        Args:
            numbers: (n,), to be summed in place.

        Returns:
            ``numbers``.
        """
        self._is_open = False
        while self._next < len(self._buckets):
            self._reduce_next()
        self._reduce(numbers)
        for work in self._works:
            work.wait()
        self._works = []
        self._is_proven = True
        return numbers

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
        flat, parameters, views = self._buckets[self._next]
        self._next += 1
        # Copied, because a backward that adds into views would read and write more than this.
        own, cast = [], []
        for parameter, view in zip(parameters, views, strict=True):
            copy = self._copies.get(id(parameter))
            last = None if copy is None else copy.grad
            if parameter.grad is not None:
                own.append((view, parameter.grad))
                if last is not None:  # after micro-steps
                    parameter.grad += last
            elif last is not None:
                cast.append((view, last))
            else:  # of options that leave it unused, perhaps here only
                view.zero_()
            if copy is not None:
                copy.grad = None
        for pairs in (own, cast):
            if pairs:
                torch._foreach_copy_(*zip(*pairs, strict=True))  # type: ignore
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view
        self._reduce(flat)

    def _reduce(self, tensor: Tensor) -> None:
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None
        self._works.append(work)


def _groups(model: nn.Module, most: float) -> list[list[nn.Parameter]]:
    """Trained parameters of one type and up to ``most`` bytes, the last ones first."""
    groups: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        size = parameter.numel() * parameter.element_size()
        is_alike = groups and groups[-1][0].dtype == parameter.dtype
        if not is_alike or filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return groups


def _bucket(parameters: list[nn.Parameter]) -> _Bucket:
    starts = [0]
    for parameter in parameters:
        starts.append(starts[-1] + math.ceil(parameter.numel() / _ALIGNED) * _ALIGNED)
    flat = parameters[0].new_zeros(starts.pop())
    views = [
        # Laid out as autograd lays out a gradient.
        flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), start)
        for p, start in zip(parameters, starts, strict=True)
    ]
    return _Bucket(flat, parameters, views)


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
