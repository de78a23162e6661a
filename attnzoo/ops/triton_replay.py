"""What an operator launches, noted once and launched again without the Python that led there.

Before each kernel Python finds sizes, tiles and tensors, at a microsecond a frame: of several
kernels that takes a host longer than a GPU. All of it follows from the operands' types, shapes and
strides and from the numbers; who comes with the same again brings nothing new but addresses.
"""

# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import operator
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
# that allocate, and those that are called again, which write nowhere.
_LOOKING = frozenset({
    "__get__", "__getitem__", "__len__", "chunk", "data_ptr", "dim", "element_size", "expand",
    "get_device", "numel", "split", "squeeze", "stride", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view",
})  # fmt: skip
_ALLOCATING = frozenset({"empty", "new_empty"})
_REPEATED = frozenset({"bmm", "contiguous", "flatten", "float", "reshape", "sum", "to"})
_KNOWN = _LOOKING | _ALLOCATING | _REPEATED
_ALIGNMENT = 256  # bytes, of the tensors that share an allocation
_MOST_REPLAYS = 1024  # of an operator: sizes that change with each call would add some without end

_knobs = triton.knobs.runtime
_noting = threading.Lock()  # one call at a time
_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")


def _autocast() -> torch.dtype | None:
    """What autocast makes of operands now; functions that are called again heed it."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


class _Made:
    """A new tensor of a call: allocated, or what a repeated function returned."""

    def __init__(self, z: Tensor, is_allocated: bool) -> None:
        self.shape, self.dtype, self.is_allocated = z.shape, z.dtype, is_allocated
        self.size = z.numel() * z.element_size()
        self.is_shared = False  # with others, what it lies in
        self.number, self.start = -1, 0  # of the replay's value that it lies in, and bytes


class _Place(NamedTuple):
    """Where a tensor lies: an operand, by its index, or a new tensor, and bytes from its start."""

    origin: int | _Made
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    itemsize: int
    is_itself: bool  # and no view

    def spot(self) -> tuple[int, int]:
        """Number of the replay's value that it lies in, and bytes from its start."""
        if isinstance(self.origin, int):
            return self.origin, self.offset
        return self.origin.number, self.origin.start + self.offset


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
        self.device, self.autocast = operands[0].device, _autocast()
        self.has_fault = False
        self.made: list[_Made] = []
        self.steps: list[tuple[Any, ...]] = []
        self.kernels: list[Any] = []
        # By number, which no other tensor gets while these are held.
        self.seen: dict[int, tuple[Tensor, _Place]] = {}
        for index, z in enumerate(operands):
            self._see(z, index)

    def _see(self, z: Tensor, origin: int | _Made, offset: int = 0, itself: bool = True) -> None:
        place = _Place(origin, offset, z.shape, z.stride(), z.element_size(), itself)
        self.seen[id(z)] = z, place

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
        if name not in _KNOWN or any(isinstance(z, Tensor) for z in kwargs.values()):
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
        if not is_plain or name not in _ALLOCATING | _REPEATED or _autocast() != self.autocast:
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
        run, middle, is_flat, kernel = started
        self.kernels.append(kernel)
        self.steps.append((run, (*grid, 1, 1)[:3], (middle, is_flat), places, numbers))


class _Replay:
    """What a call starts, for whatever operands of its kind; holds none of its tensors.

    Steps work on two lists, and pick what they take by numbers. Values are operands, allocations,
    what functions of PyTorch return, constants, and views. Addresses are those of operands and
    allocations, of parts of these, and of what functions return.
    """

    def __init__(
        self, notes: _Notes, count: int, results: Sequence[_Place | None], is_one: bool
    ) -> None:
        self.device, self.count, self.is_one = notes.device, count, is_one  # and no tuple
        self.kernels = notes.kernels  # hold what was compiled
        self.steps: list[tuple[Any, ...]] = []
        read = [z for step in notes.steps if step[1] is None for z in step[3]]
        origins = [z.origin for z in (*read, *results) if isinstance(z, _Place)]
        results = [z and _as_made(z, origins) for z in results]
        releases = self._allocate(notes, origins, [z.origin for z in results if z])
        first = count + len(self.allocated)
        functions = [step[2] for step in notes.steps if step[1] is None]
        for i, made in enumerate(functions):
            made.number = first + i
        self.blank: list[Any] = [None] * len(functions)
        self.views: dict[_Place, int] = {}

        launched = dict.fromkeys(z.spot() for step in notes.steps if step[1] for z in step[3])
        parts = [z for z in launched if z[0] < first and z[1]]
        later = [z for z in launched if z[0] >= first]
        self.starts, self.offsets = _picker([z[0] for z in parts]), [z[1] for z in parts]
        self.unknown = [0] * len(later)  # addresses
        slots = {z: first + i for i, z in enumerate((*parts, *later))}
        for run, grid, middle, places, rest in notes.steps:
            if grid is not None:
                spots = [z.spot() for z in places]
                picked = [slots[z] if z in slots else z[0] for z in spots]
                self.steps.append((run, grid, middle[0], _picker(picked), rest, middle[1]))
                continue
            picked = [self._value(z) for z in places]
            for number in releases.get(middle.number - first, ()):
                self.steps.append((None, None, number, None, None, ()))
            found = [(slots[z], z[1]) for z in later if z[0] == middle.number]
            self.steps.append((run, None, middle.number, _picker(picked), rest, found))
        self.results = _picker([self._value(z) for z in results])

    def _allocate(
        self, notes: _Notes, read: list[Any], returned: list[Any]
    ) -> dict[int, list[int]]:
        """Plans the allocations, in ``allocated``, and where new tensors lie in them.

        What the caller gets is a tensor of its own. What PyTorch reads shares one for each type,
        and so does what only kernels see, until it is PyTorch's turn again.

        Returns:
            Numbers of values that nothing needs after so many functions of PyTorch.
        """
        turn, last = 0, {}
        for _, grid, _, places, _ in notes.steps:
            turn += grid is None
            last |= {z.origin: turn for z in places if grid is not None}
        self.allocated: list[tuple[Any, torch.dtype]] = []
        shared: dict[tuple[torch.dtype, int], list[_Made]] = {}
        for made in notes.made:
            if made.is_allocated and made in returned:
                made.number = self.count + len(self.allocated)
                self.allocated.append((made.shape, made.dtype))
            elif made.is_allocated:
                kind = (made.dtype, turn) if made in read else (torch.uint8, last.get(made, 0))
                shared.setdefault(kind, []).append(made)
        releases: dict[int, list[int]] = {}
        for (dtype, turn), together in shared.items():
            number, size = self.count + len(self.allocated), 0
            for made in together:
                made.number, made.start, made.is_shared = number, size, True
                size += -(-made.size // _ALIGNMENT) * _ALIGNMENT
            self.allocated.append((size // dtype.itemsize, dtype))
            releases.setdefault(turn, []).append(number)
        return releases

    def _value(self, z: Any) -> int:
        """Number of a constant, of a tensor or of a view, which becomes a step."""
        if isinstance(z, _Place):
            number, offset = z.spot()
            is_operand = isinstance(z.origin, int)
            if z.is_itself and (is_operand or not z.origin.is_shared):
                return number
            if z not in self.views:
                geometry = z.shape, z.stride, offset // z.itemsize
                picked = _picker([number, *map(self._value, geometry)])
                self.views[z] = self._value(None)
                run = _part if is_operand else torch.as_strided
                self.steps.append((run, None, self.views[z], picked, {}, ()))
            return self.views[z]
        self.blank.append(z)
        return self.count + len(self.allocated) + len(self.blank) - 1

    def __call__(self, values: list[Any], addresses: list[int], device: int) -> Any:
        """Results of operands, to which all other values are added, and of their addresses."""
        for shape, dtype in self.allocated:
            values.append(torch.empty(shape, dtype=dtype, device=self.device))
            addresses.append(values[-1].data_ptr())
        values += self.blank
        addresses += [*map(operator.add, self.starts(addresses), self.offsets), *self.unknown]
        stream = torch._C._cuda_getCurrentRawStream(device)
        for run, grid, middle, picked, rest, found in self.steps:
            if grid is not None and found:
                run(*grid, stream, *middle, *picked(addresses), *rest)
            elif grid is not None:
                run(*grid, stream, *middle, (*picked(addresses), *rest))
            elif run is None:
                values[middle] = None
            else:
                values[middle] = z = run(*picked(values), **rest)
                for place, offset in found:
                    addresses[place] = z.data_ptr() + offset
        results = self.results(values)
        return results[0] if self.is_one else tuple(results)


def _picker(numbers: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Gives the items with these numbers, in fewer calls than a loop."""
    if len(numbers) > 1:
        return operator.itemgetter(*numbers)
    return operator.itemgetter(slice(numbers[0], numbers[0] + 1) if numbers else slice(0))


def _part(z: Tensor, shape: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    """A part of an operand, which may lie anywhere in its storage."""
    return z.as_strided(shape, stride, z.storage_offset() + offset)


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


def replayed(function: Callable[..., Any], count: int | None = None) -> Callable[..., Any]:
    """Calls a function twice for operands of a kind, then launches what it launched.

    Args:
        function: Of tensors, numbers and None, the first a tensor; it launches by
            ``launch_kernel`` alone, writes into no operand, and returns tensors and None. Whatever
            else it asks, but for autocast, the TF32 switch and the device, has to be the same
            always.
        count: Of its results, how many are wanted; by default it returns what it returns.

    Returns:
        The same function, to be called where no gradient is wanted.
    """
    # False of a kind that was seen once, None of one that cannot be replayed.
    replays: dict[tuple[Any, ...], _Replay | Literal[False] | None] = {}
    pickers: dict[tuple[type, ...], tuple[Any, Any]] = {}  # of tensors, and of the rest
    if count is not None:
        return replayed(functools.wraps(function)(lambda *operands: function(*operands)[:count]))

    @functools.wraps(function)
    def call(*operands: Any) -> Any:
        if not triton_common._CAN_SKIP or not operands[0].is_cuda or _noting.locked():
            return function(*operands)
        types = (*map(type, operands),)
        tensors, others = pickers.get(types) or pickers.setdefault(types, _pickers(types))
        if tensors is None:
            return function(*operands)
        # In C: of a dozen operands, a loop takes longer than the launches.
        values = [*tensors(operands)]
        addresses = [*map(Tensor.data_ptr, values)]
        # Triton compiles apart for addresses that 16 does not divide.
        hook = _knobs.launch_enter_hook  # a profiler's
        if functools.reduce(operator.or_, addresses) & 15 or getattr(hook, "calls", hook):
            return function(*operands)
        device = torch._C._cuda_getDevice()
        if {*map(Tensor.get_device, values)} != {device}:
            return function(*operands)
        key = (
            types, device, torch._C._get_cublas_allow_tf32(), _autocast(), *others(operands),
            *map(_dtype, values), *map(_shape, values), *map(Tensor.stride, values),
        )  # fmt: skip
        replay = replays.get(key, True)
        if replay is False:
            return _note(function, operands, values, replays, key)
        if replay is True:
            if len(replays) >= _MOST_REPLAYS:
                replays.clear()
            replays[key] = False
            return function(*operands)
        return function(*operands) if replay is None else replay(values, addresses, device)

    return call


def _pickers(types: tuple[type, ...]) -> tuple[Any, Any]:
    """Of operands of these types, what gives the tensors and the rest; None for unknown ones."""
    tensors = [i for i, z in enumerate(types) if issubclass(z, Tensor)]
    if any(types[i] not in (Tensor, Parameter) for i in tensors):
        return None, None
    return _picker(tensors), _picker([i for i in range(len(types)) if i not in tensors])


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
