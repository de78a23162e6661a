"""A DiT as one launch: forwards recorded as CUDA graphs, and blocks compiled one by one.

Eagerly a small model is bound by its launches: DiT-S of 256 tokens takes 17 ms a forward, of which
the device works 2. A recorded forward is replayed by one launch; compiled blocks join the passes
of normalization, modulation, activation and gate. They compose: compile first, then record.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from attnzoo import InvalidValue
from attnzoo.contract import check_option
from attnzoo.errors import Unavailable
from backbones.cast_once import cast_once
from backbones.dit import DiT, as_times

# Twelve blocks with a constant of their own each, in training and inference, for a few sizes.
_RECOMPILE_LIMIT = 64

Result = TypeVar("Result")


def why_not_recorded(model: nn.Module, device: torch.device | str | None = None) -> str | None:
    """Why no CUDA graph can hold a forward, or in training a step, of a model; None if one can.

    Looks at the model only. What a mechanism does on the way is found by running it: see
    ``refuse_waits``.

    Args:
        model: The model.
        device: Where it will run; by default where its weights are.
    """
    devices = {p.device for p in model.parameters()} if device is None else {torch.device(device)}
    for found in devices:
        if found.type != "cuda":
            return f"a CUDA graph needs a GPU, and the model is on {found.type!r}"
    if len(devices) > 1:
        places = ", ".join(sorted(map(str, devices)))
        return f"a CUDA graph holds the work of one GPU, and the model is on {places}"
    if model.training and getattr(model, "gradient_checkpointing", False):
        return "gradient checkpointing asks the host for the random state"
    return None


@contextlib.contextmanager
def refuse_waits() -> Iterator[None]:
    """Lets whatever waits for the GPU raise a RuntimeError, inside the with-statement.

    A recording of it fails too, but leaves PyTorch's random numbers unusable. Run once without,
    because what a library does on its first call may wait.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(
    call: Callable[[], Result],
    *,
    warm_up: Callable[[], object] | None = None,
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Records a call as a CUDA graph on the current GPU, after three calls that are not recorded.

    Whatever still holds the autograd graph of an earlier call on the default stream makes the
    recording of a backward fail: drop losses and outputs first. Garbage is collected here.

    Args:
        call: Without arguments. It reads and writes the same tensors in every replay.
        warm_up: What to call before, if not the call itself.

    Returns:
        The graph, and what the call gave: valid after a replay, and until the next.

    Raises:
        RuntimeError: The call waits for the GPU, or does what else cannot be recorded. Others can
            be recorded afterwards; graphs of before go on, but with random numbers of their own
            that no later seed reaches.
    """
    # Memory of its own: PyTorch cannot record again into what an ended or failed graph has used.
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    aside, before = recording_stream(), torch.cuda.current_stream()
    is_collecting = gc.isenabled()
    gc.collect()
    aside.wait_stream(before)
    with torch.cuda.stream(aside):
        try:
            # Libraries allocate and compilers compile on the first calls, which a graph may not.
            (warm_up or call)()
            (warm_up or call)()
            with refuse_waits():
                (warm_up or call)()
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            gc.disable()  # it might free what a recording must not
            result = _capture(graph, call, pool)
        finally:
            if is_collecting:
                gc.enable()
            before.wait_stream(aside)
    return graph, result


def recording_stream() -> torch.cuda.Stream:
    """On which everything is recorded on the current GPU.

    One stream for all: a weight's node in an autograd graph keeps to the stream that it was made
    on, and a library's workspace to the stream that it was first used on.
    """
    return _stream(torch.cuda.current_device())


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _capture(graph: torch.cuda.CUDAGraph, call: Callable[[], Result], pool: Any) -> Result:
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    state = generator.clone_state()
    try:
        # Other threads may go on, as those that pin memory for batches.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        result = call()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error says more
            _end(graph, device, pool, state)
        raise
    _end(graph, device, pool, state)
    return result


def _end(graph: torch.cuda.CUDAGraph, device: int, pool: Any, state: torch.Generator) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        # PyTorch leaves generator and allocator believing that the recording goes on.
        torch.cuda.default_generators[device].graphsafe_set_state(state)
        with contextlib.suppress(RuntimeError):  # it got so far after all
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise


def record(
    model: DiT,
    batch: int,
    size: int | tuple[int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> RecordedForward:
    """Records the forward of a model for a batch and a size, to be replayed by one launch.

    For guidance, which calls the model on every image twice, record twice the batch.

    Args:
        model: In eval mode, on a GPU; compiled or not.
        batch: Images of a call.
        size: Side of the input, or (height, width), in pixels of the model's input; None is the
            size that the model was made for.
        dtype: Computes under autocast in this type; None computes in the weights' own.
        frozen: Casts the weights once, here, and not in every replay: the same numbers, sooner.

    Returns:
        What takes the arguments of the model itself. It sees every change of the weights that is
        made in place, as by an optimizer or ``load_state_dict``; frozen, not of those it has cast.

    Raises:
        InvalidType: The batch or size is of another type.
        InvalidValue: The batch or size is none, or the model is in training mode.
        Unavailable: It cannot be recorded; the message says why.
    """
    side: Any = model.config.sample_size if size is None else size
    check_option("batch", batch, int)
    check_option("size", side, int | tuple[int, int])
    if batch < 1:
        raise InvalidValue(f"batch must be at least 1, got {batch}")
    height, width = (side, side) if isinstance(side, int) else side
    model.token_grid(height, width)
    _require_eval(model)
    if reason := why_not_recorded(model):
        raise Unavailable(f"{reason}; move it to one with model.to('cuda'), or call it directly")
    return RecordedForward(model, batch, (height, width), dtype, frozen)


class RecordedForward:
    """A forward of a DiT as a CUDA graph; ``record`` makes it.

    Args:
        model: In eval mode, on a GPU.
        batch: Images of a call.
        size: (height, width) of the input.
        dtype: Of autocast, or None.
        frozen: Whether weights are cast once.
    """

    def __init__(
        self,
        model: DiT,
        batch: int,
        size: tuple[int, int],
        dtype: torch.dtype | None,
        frozen: bool = False,
    ) -> None:
        self.model = model
        weight = model.class_embedding.weight
        self._images = torch.zeros(
            batch, model.config.in_channels, *size, device=weight.device, dtype=weight.dtype
        )
        self._times = torch.zeros(batch, device=weight.device)
        self._labels = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self._placement = Placement(model)

        def forward() -> Tensor:
            # Each weight is cast once anyway, and a cache would outlive the recording.
            with torch.no_grad(), torch.autocast(
                "cuda", dtype or torch.bfloat16, dtype is not None, cache_enabled=False
            ):  # fmt: skip
                return model(self._images, self._times, self._labels, return_dict=False)[0]

        casts = cast_once(model, forward) if frozen else contextlib.nullcontext()
        with torch.cuda.device(weight.device):
            try:
                with casts as self._weights:
                    self._graph, self._sample = captured(forward)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise Unavailable(
                    f"the forward of attention {model.config.attn!r} cannot be recorded: "
                    f"{reason}; call the model directly"
                ) from error
        # What modules cache for the last size or type is read at its address from now on.
        self._held = [dict(vars(module)) for module in model.modules()]

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """See ``DiT.forward``.

        Raises:
            InvalidValue: The batch or size is not the recorded one, or the model has changed
                since: it is in training mode, or its weights lie elsewhere.
        """
        if hidden_states.shape != self._images.shape:
            raise InvalidValue(
                f"this forward is recorded for an input of {tuple(self._images.shape)}, got "
                f"{tuple(hidden_states.shape)}; record another, or call the model itself"
            )
        _require_eval(self.model)
        if self._placement.has_changed():
            raise InvalidValue(
                "the weights of the recorded model have been moved or replaced since; record it "
                "again"
            )
        timestep = as_times(timestep)
        self.model._check_labels(class_labels)
        self.model._check_condition(hidden_states, timestep, class_labels)
        with torch.no_grad():
            self._images.copy_(hidden_states)
            self._times.copy_(timestep)
            self._labels.copy_(class_labels)
            self._graph.replay()
            sample = self._sample.clone()  # the next replay writes into the same memory
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _require_eval(model: DiT) -> None:
    if model.training:
        raise InvalidValue("a recorded forward is one of eval mode; call model.eval() first")


class Placement:
    """Where a model's weights lie, as whoever reads them at their addresses has to know.

    Walking through the modules anew takes a host as long as the launches of some blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = self._found()
        self._places = [
            (places, name, value)
            for module in model.modules()
            for places in (module._parameters, module._buffers, module._modules)
            for name, value in places.items()
        ]
        self._counts = [(module._modules, len(module._modules)) for module in model.modules()]

    def has_changed(self) -> bool:
        """Whether a weight has been moved or replaced, or a module replaced or added."""
        for places, name, value in self._places:
            if places.get(name) is not value:
                return True
        is_added = any(len(children) != count for children, count in self._counts)
        return is_added or self._found() != self._addresses

    def _found(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]


def compile_blocks(model: DiT, **options: Any) -> DiT:
    """Compiles each block with torch.compile, in place: equal blocks share what is compiled.

    Training and inference, with and without autocast, and every size are compiled apart, each at
    its first call. Nothing falls back to eager silently: a graph break is an error, and
    PyTorch's limit of eight compilations per function is raised to 64 in this process, because
    a block counts once for each of these, and in some mechanisms for its place in the model. A
    model gets a function of its own, so that it does not use up another's limit. Copies of
    the model are not compiled.

    Args:
        model: The model.
        **options: Of ``torch.compile``; by default ``fullgraph=True, dynamic=False``.

    Returns:
        The model itself.
    """
    compile_modules(model.blocks, **options)
    return model


def compile_modules(modules: Iterable[nn.Module], **options: Any) -> None:
    """Compiles modules of one kind as ``compile_blocks`` does the blocks of a model.

    Args:
        modules: They share what is compiled.
        **options: Of ``torch.compile``; by default ``fullgraph=True, dynamic=False``.
    """
    from torch._dynamo import config  # slow to import, and needs a sound Triton

    config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    call = torch.compile(_own_copy(_call), **{"fullgraph": True, "dynamic": False, **options})
    for module in modules:
        # Where Module.compile puts it, so that hooks run, and copies and files are without.
        module._compiled_call_impl = functools.partial(call, module)  # type: ignore[assignment]


def uncompile_blocks(model: DiT) -> DiT:
    """Undoes ``compile_blocks``."""
    for block in model.blocks:
        block._compiled_call_impl = None
    return model


def _call(block: nn.Module, *args: Any) -> Any:
    return block._call_impl(*args)


def _own_copy(function: Any) -> Any:
    """The same function with a code object of its own, by which the compiler counts."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)
