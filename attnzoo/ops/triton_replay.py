"""What an operator launches, noted once and launched again without the Python that led there.

Before each kernel Python finds sizes, tiles and tensors, at a microsecond a frame: of several
kernels that takes a host longer than a GPU. All of it follows from the operands' types, shapes and
strides and from the numbers; who comes with the same again brings nothing new but addresses.
"""

# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from attnzoo.ops import triton_common

# Methods and functions of PyTorch that a noted call may use: those that look or give a view, those
# that allocate, and those that are called again, which write nowhere and are blind to autocast.
_LOOKING = frozenset({
    "__get__", "__getitem__", "__len__", "chunk", "data_ptr", "element_size", "expand", "flatten",
    "get_device", "numel", "split", "squeeze", "stride", "t", "unbind", "unflatten",
    "unsqueeze", "view",
})  # fmt: skip
_ALLOCATING = frozenset({"empty", "new_empty"})
_REPEATED = frozenset({"contiguous", "float", "reshape", "sum", "to"})
_KNOWN = _LOOKING | _ALLOCATING | _REPEATED
_ALIGNMENT = 256  # bytes, of the tensors that share an allocation
_MOST_REPLAYS = 1024  # of an operator: sizes that change with each call would add some without end

_knobs = triton.knobs.runtime
_noting = threading.Lock()  # one call at a time


class _Made:
    """A new tensor of a call: allocated, or what a repeated function returned."""

    def __init__(self, z: Tensor, is_allocated: bool) -> None:
        self.shape, self.dtype, self.is_allocated = z.shape, z.dtype, is_allocated
        self.size = z.numel() * z.element_size()
        self.address = -1, 0  # index of a tensor of the replay, and bytes from its start


class _Place(NamedTuple):
    """Where a tensor lies: an operand, by its index, or a new tensor, and bytes from its start."""

    origin: int | _Made
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    is_itself: bool  # and no view

    def address(self) -> tuple[int, int]:
        """Index of a tensor of the replay, and bytes from its start."""
        if isinstance(self.origin, int):
            return self.origin, self.offset
        return self.origin.address[0], self.origin.address[1] + self.offset


class _Notes(TorchFunctionMode):
    """Watches a call: where its tensors come from, and what it starts.

    Attributes:
        thread: Whose launches are noted.
        has_fault: Whether something was seen that cannot be done again.
        made: New tensors.
        steps: Launches, and functions to be repeated.
    """

    def __init__(self, operands: Sequence[Tensor]) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.has_fault = False
        self.made: list[_Made] = []
        self.steps: list[tuple[Any, ...]] = []
        self.kernels: list[Any] = []
        self.device = operands[0].device
        # By number, which no other tensor gets while these are held.
        self.seen: dict[int, tuple[Tensor, _Place]] = {}
        for index, z in enumerate(operands):
            self._see(z, index)

    def _see(self, z: Tensor, origin: int | _Made, offset: int = 0, itself: bool = True) -> None:
        self.seen[id(z)] = z, _Place(origin, offset, z.shape, z.stride(), itself)

    def place(self, z: Tensor) -> _Place | None:
        """Where a tensor lies; a fault if that was not seen."""
        found = self.seen.get(id(z))
        if found is None:
            self.has_fault = True
            return None
        return found[1]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _KNOWN or "out" in kwargs:
            self.has_fault = True
        for z in found if isinstance(found, tuple | list) else (found,):
            if isinstance(z, Tensor) and id(z) not in self.seen:
                self._follow(z, name, func, args, kwargs)
        return found

    def _follow(self, z: Tensor, name: str, func: Any, args: Any, kwargs: Any) -> None:
        storage = z.untyped_storage()._cdata
        for a in args:
            if isinstance(a, Tensor) and a.untyped_storage()._cdata == storage:  # a view of it
                place = self.place(a)
                if place is None or a.dtype is not z.dtype:
                    self.has_fault = True
                else:
                    offset = place.offset + z.data_ptr() - a.data_ptr()
                    self._see(z, place.origin, offset, False)
                return
        is_plain = type(z) is Tensor and z.is_contiguous() and z.device == self.device
        if not is_plain or name not in _ALLOCATING | _REPEATED:
            self.has_fault = True
            return
        made = _Made(z, name in _ALLOCATING)
        self.made.append(made)
        self._see(z, made)
        if not made.is_allocated:
            read = [self.place(a) if isinstance(a, Tensor) else a for a in args]
            self.steps.append((func, None, made, read, kwargs))

    def launch(
        self, started: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], numbers: Any
    ) -> None:
        """Notes the launch of what was compiled; a fault where Triton itself has to launch."""
        places = [self.place(z) for z in tensors]
        if started is None:
            self.has_fault = True
            return
        run, function, metadata, kernel = started
        self.kernels.append(kernel)
        middle = function, metadata, None, None, None
        self.steps.append((run, (*grid, 1, 1)[:3], middle, places, numbers))


class _Replay:
    """What a call starts, for whatever operands of its kind; holds none of its tensors."""

    def __init__(
        self, notes: _Notes, count: int, results: Sequence[_Place | None], is_one: bool
    ) -> None:
        places = [z for step in notes.steps if step[1] is None for z in step[3]]
        # What PyTorch reads or the caller gets is a tensor; what only kernels see, an address.
        origins = [z.origin for z in (*places, *results) if isinstance(z, _Place)]
        results = [z and _as_made(z, origins) for z in results]
        alone = set(origins)
        self.alone: list[tuple[torch.Size, torch.dtype]] = []
        self.shared = 0
        for made in notes.made:
            if made.is_allocated and made in alone:
                made.address = count + len(self.alone), 0
                self.alone.append((made.shape, made.dtype))
        count += len(self.alone)
        for made in notes.made:
            if made.is_allocated and made not in alone:
                made.address = count, self.shared
                self.shared += -(-made.size // _ALIGNMENT) * _ALIGNMENT
        count += self.shared > 0
        self.steps: list[tuple[Any, ...]] = []
        for run, grid, middle, read, rest in notes.steps:
            if grid is None:
                middle.address, count = (count, 0), count + 1
                self.steps.append((run, None, None, [_geometry(z) for z in read], rest))
            else:
                self.steps.append((run, grid, middle, [z.address() for z in read], rest))
        self.kernels = notes.kernels  # hold what was compiled
        self.results = [_geometry(z) for z in results]
        self.is_one = is_one  # and no tuple

    def __call__(self, tensors: list[Tensor], pointers: list[int], device: int) -> Any:
        """Results of operands, to which new tensors are added, and their addresses."""
        where = tensors[0].device
        for shape, dtype in self.alone:
            z = torch.empty(shape, dtype=dtype, device=where)
            tensors.append(z)
            pointers.append(z.data_ptr())
        if self.shared:
            z = torch.empty(self.shared, dtype=torch.uint8, device=where)
            tensors.append(z)
            pointers.append(z.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(device)
        for run, grid, middle, read, rest in self.steps:
            if grid is not None:
                run(*grid, stream, *middle, *[pointers[i] + more for i, more in read], *rest)
                continue
            z = run(*[_tensor(tensors, a) for a in read], **rest)
            tensors.append(z)
            pointers.append(z.data_ptr())
        if self.is_one:
            return _tensor(tensors, self.results[0])
        return tuple([_tensor(tensors, a) for a in self.results])


def _as_made(z: _Place, origins: list[Any]) -> _Place:
    """A result; one that only reshapes a new tensor is allocated in its shape."""
    made = z.origin
    if isinstance(made, int) or not made.is_allocated or origins.count(made) > 1:
        return z
    is_dense = torch.empty(z.shape, device="meta").stride() == z.stride
    if is_dense and z.shape.numel() == made.shape.numel():
        made.shape = z.shape
        return z._replace(is_itself=True)
    return z


def _geometry(z: Any) -> tuple[int, Any]:
    """A tensor of the replay by its index, and what part of it; or -1 and what is no tensor."""
    if not isinstance(z, _Place):
        return -1, z
    index, offset = z.address()
    return index, None if z.is_itself else (z.shape, z.stride, offset)


def _tensor(tensors: Sequence[Tensor], geometry: tuple[int, Any]) -> Any:
    index, part = geometry
    if index < 0 or part is None:
        return part if index < 0 else tensors[index]
    shape, stride, offset = part
    z = tensors[index]
    return z.as_strided(shape, stride, z.storage_offset() + offset // z.element_size())


def replayed(function: Callable[..., Any], count: int | None = None) -> Callable[..., Any]:
    """Calls a function twice for operands of a kind, then launches what it launched.

    Args:
        function: Of tensors, numbers and None, the first a tensor; it launches by
            ``launch_kernel`` alone, writes into no operand, and returns tensors and None. Whatever
            else it asks, but for the TF32 switch and the device, has to be the same always.
        count: Of its results, how many are wanted; by default it returns what it returns.

    Returns:
        The same function, to be called where no gradient is wanted.
    """
    # False of a kind that was seen once, None of one that cannot be replayed.
    replays: dict[tuple[Any, ...], _Replay | Literal[False] | None] = {}
    if count is not None:
        return replayed(functools.wraps(function)(lambda *operands: function(*operands)[:count]))

    @functools.wraps(function)
    def call(*operands: Any) -> Any:
        if not triton_common._CAN_SKIP or not operands[0].is_cuda or _noting.locked():
            return function(*operands)
        device = torch._C._cuda_getDevice()
        tensors: list[Tensor] = []
        pointers: list[int] = []
        kind = [device, torch._C._get_cublas_allow_tf32()]
        all_bits = 0
        for z in operands:
            kind_of = type(z)
            if kind_of is Tensor or kind_of is Parameter:
                pointer = z.data_ptr()
                if z.get_device() != device:
                    return function(*operands)
                all_bits |= pointer
                tensors.append(z)
                pointers.append(pointer)
                kind += z.dtype, z.shape, z.stride()
            elif isinstance(z, Tensor):
                return function(*operands)
            else:
                kind += kind_of, z
        # Triton compiles apart for addresses that 16 does not divide.
        hook = _knobs.launch_enter_hook  # a profiler's
        if all_bits & 15 or getattr(hook, "calls", hook):
            return function(*operands)
        key = tuple(kind)
        replay = replays.get(key, True)
        if replay is False:
            return _note(function, operands, tensors, replays, key)
        if replay is True:
            if len(replays) >= _MOST_REPLAYS:
                replays.clear()
            replays[key] = False
            return function(*operands)
        return function(*operands) if replay is None else replay(tensors, pointers, device)

    return call


def _note(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    tensors: list[Tensor],
    replays: dict[tuple[Any, ...], Any],
    key: tuple[Any, ...],
) -> Any:
    if not _noting.acquire(blocking=False):
        return function(*operands)
    try:
        notes = _Notes(tensors)
        triton_common.notes = notes
        with notes:
            results = function(*operands)
    finally:
        triton_common.notes = None
        _noting.release()
    is_one = isinstance(results, Tensor)
    places = [None if z is None else notes.place(z) for z in ((results,) if is_one else results)]
    replays[key] = None if notes.has_fault else _Replay(notes, len(tensors), places, is_one)
    return results
