"""The one place that decides what runs: nothing else asks for devices, types or Triton.

Variables of the environment: ATTNZOO_TRITON=0 and ATTNZOO_NATIVE=0 keep "auto" from the kernels
in Triton and in C. ATTNZOO_TRITON=1 chooses on every device as on a GPU, which only Triton's
interpreter (TRITON_INTERPRET=1) can then run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as of_modules

from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops import optional
from attnzoo.ops.precision import autocast_operands, operand_dtype

Impl = Literal[
    "auto",
    "reference",
    "torch",
    "native",
    "triton",
    "flex",
    "fla",
    "flash",
    "mamba",
    "xformers",
    "natten",
]
Declaration = TypeVar("Declaration", bound=Callable[..., Any])

# Implementations of each operator. "auto" takes the first that fits, and none behind "torch".
TABLE: dict[str, tuple[Impl, ...]] = {
    "power_map": ("native", "triton", "torch", "reference"),
    "scaled_power_map": ("native", "triton", "torch", "reference"),
    "routed_linear": ("triton", "torch", "reference"),
    "routed_scalar": ("triton", "torch", "reference"),
    "token_difference": ("triton", "torch", "reference"),
    "map_difference": ("triton", "torch", "reference"),
    "focused_difference": ("native", "torch", "reference"),  # "native": of a few tokens
    "branch_conv": ("native", "torch", "reference"),  # likewise
    "linear_core": ("native", "torch", "reference"),  # likewise
    "linear_attention": ("torch", "reference"),
    "linear_tokens": ("triton", "torch", "reference"),
    "agent_core": ("triton", "torch", "reference"),
    "block_core": ("triton", "torch", "reference"),
    "few_keys": ("triton", "torch", "reference"),
    "rotary_core": ("triton", "torch", "reference"),
    "fixation_core": ("triton", "torch", "reference"),
    "downsample": ("triton", "torch", "reference"),
    "group_norm": ("triton", "torch", "reference"),
    "gated_norm": ("triton", "torch", "reference"),
    "normed_difference": ("triton", "torch", "reference"),
    "depthwise_conv": ("triton", "torch", "reference"),
    "gated_depthwise_conv": ("triton", "torch", "reference"),
    "gated_linear_attention": ("triton", "torch", "reference", "fla"),
    "causal_conv": ("triton", "torch", "reference"),
    "silu_gate": ("triton", "torch", "reference"),
    "to_windows": ("triton", "torch", "reference"),
    "from_windows": ("triton", "torch", "reference"),
    "group_means": ("triton", "torch", "reference"),
    "hourglass": ("triton", "torch", "reference"),
    "selective_scan": ("triton", "torch", "reference", "mamba"),
    "ssd_scan": ("torch", "reference", "fla"),
    "gated_delta_rule": ("triton", "torch", "reference", "fla"),
    "trained_unit": ("torch", "reference"),
    "trained_conv": ("torch", "reference"),
    "inner_tokens": ("triton", "torch", "reference"),
    "sparse_linear_attention": ("triton", "torch", "reference"),
    "sparse_linear_tokens": ("triton", "torch", "reference"),
    "softmax_attention": ("torch", "reference", "flash", "xformers"),
    "neighborhood_attention": ("triton", "torch", "reference", "flex", "natten"),
}
# Transforms of torch.func that the "torch" of an operator does not go through: it writes into
# tensors of its own, or has a gradient of its own.
_BARRED: dict[str, frozenset[str]] = {
    "power_map": frozenset({"grad", "jvp", "vmap"}),
    "scaled_power_map": frozenset({"grad", "jvp", "vmap"}),
    "routed_linear": frozenset({"grad", "jvp", "vmap"}),
    "selective_scan": frozenset({"grad", "jvp", "vmap"}),
    "neighborhood_attention": frozenset({"jvp", "vmap"}),
}
# Multiply-accumulates of custom operators, of their arguments; the packages state their own.
MACS: dict[str, Callable[..., int]] = {}
_IS_FORCED = os.environ.get("ATTNZOO_TRITON") == "1"
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# torch before 2.8 cannot sum half-precision operands into a float32 result.
_HAS_WIDE_PRODUCT = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None
_KNOWS_EXPORT = torch.__version__ >= "2.9"  # which compares numbers
# Those that need packages that may be missing.
_LIBRARIES = ("fla", "flash", "mamba", "xformers", "natten")
_LAZY = ("triton", "flex", *_LIBRARIES)
_LOADED: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {}  # by package and operator
_MANY = 1 << 20  # numbers, of which a sum takes a GPU longer than a host to start it from Python
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 overflows where float32 does not


def operator(declaration: Declaration) -> Declaration:
    """Makes a declaration call the function of its name in ``reference.py``, ``torch.py``, ...

    ``choose`` looks at the first operand. Where the module that declares has a function
    ``unserved`` of the operands, it says what the kernels do not serve of them.
    """
    name, package = declaration.__name__, declaration.__module__
    if name not in TABLE:
        raise InvalidValue(
            f"operator {name!r} of {package} has no row in attnzoo.ops.dispatch.TABLE: before it "
            f"is declared, name its files there, TABLE[{name!r}] = ('torch', 'reference')"
        )
    loaded = _LOADED[package, name] = {}
    for impl in TABLE[name]:
        if impl not in _LAZY:
            _load(package, impl, name)
    limits = declaration.__globals__.get("unserved")
    is_settled = TABLE[name][0] == "torch"
    on_cpu: dict[torch.dtype, Callable[..., Any]] = {}  # what "auto" is there
    elsewhere: dict[Any, Callable[..., Any]] = {}  # by what was asked of which kind of tensor

    @functools.wraps(declaration)
    def run(*operands: Any, impl: str = "auto", **options: Any) -> Any:
        x, kind = operands[0], None
        is_cached = not torch.compiler.is_dynamo_compiling()
        if is_cached and torch._C._are_functorch_transforms_active() and is_transformed():
            return loaded[choose(name, impl, x)](*operands, **options)
        if impl == "auto" and is_settled:
            return loaded["torch"](*operands, **options)
        on_this_cpu = is_cached and impl == "auto" and x.is_cpu and not _IS_FORCED
        if on_this_cpu and x.dtype in on_cpu:
            return on_cpu[x.dtype](*operands, **options)
        # No limit of the kernels counts where they never run.
        unserved = None if limits is None or on_this_cpu else limits(*operands)
        if is_cached and not on_this_cpu and unserved is None:
            kind = impl, kind_of(x)
            if kind in elsewhere:
                return elsewhere[kind](*operands, **options)
        chosen = choose(name, impl, x, None, lambda: unserved)
        if chosen in _LAZY:
            _load(package, chosen, name)
        implementation = loaded[chosen]
        if on_this_cpu:
            on_cpu[x.dtype] = implementation
        elif kind is not None:
            elsewhere[kind] = implementation
        return implementation(*operands, **options)

    return cast(Declaration, run)


def kind_of(x: Tensor) -> tuple[Any, ...]:
    """All that ``choose`` looks at of a tensor."""
    if x.is_cuda:
        is_lowered = torch.is_autocast_enabled("cuda")
        return "cuda", x.dtype, torch.get_autocast_dtype("cuda") if is_lowered else None
    return x.device.type, x.dtype, operand_dtype(x), _IS_FORCED


def choose_once(layer: Any, name: str, x: Tensor, unserved: Callable[[], str | None]) -> Impl:
    """``choose`` of "auto", asked once for a layer's ``config`` and a kind of tensor."""
    if torch.compiler.is_dynamo_compiling() or (
        torch._C._are_functorch_transforms_active() and is_transformed()
    ):
        return choose(name, "auto", x, None, unserved)
    # On a CPU nothing but the type decides.
    kind = x.dtype if x.is_cpu and not _IS_FORCED else kind_of(x)
    config, last = layer.config, layer.__dict__.get("_chosen")
    if last is None or last[0] is not config or last[1] != name or last[2] != kind:
        last = config, name, kind, choose(name, "auto", x, None, unserved)
        layer.__dict__["_chosen"] = last
    return last[3]


def choose(
    name: str,
    impl: str,
    x: Any,
    dtype: torch.dtype | None = None,
    unserved: Callable[[], str | None] | None = None,
) -> Impl:
    """The implementation of an operator for a tensor.

    Args:
        name: One of ``TABLE``.
        impl: What was asked for; "auto" asks for whatever fits best.
        x: The tensor.
        dtype: What it will be cast to; by default what autocast makes of it.
        unserved: Says what the kernels do not serve of the operands or options, or None.

    Raises:
        InvalidValue: There is no such implementation.
        Unavailable: It cannot run here; the message says why, and what can.
    """
    offered = TABLE[name]
    if is_transformed() and (impl == "auto" or impl in offered):
        return _choose_transformed(name, impl)
    if impl == "auto":
        for candidate in offered:
            if candidate == "torch" or not _why_not(candidate, x, dtype, unserved, False):
                return candidate
    if impl not in offered:
        raise InvalidValue(f"impl={impl!r} of {name} is not one of {('auto', *offered)}")
    if reason := _why_not(impl, x, dtype, unserved, True):
        others = [o for o in offered if o not in _LIBRARIES]  # which may not be installed
        fitting = [repr(o) for o in others if not _why_not(o, x, dtype, unserved, True)]
        raise Unavailable(
            f"impl={impl!r} {reason}; leave impl='auto', or choose {' or '.join(fitting)}"
        )
    return cast(Impl, impl)


def is_transformed() -> bool:
    """Whether torch.func (grad, jvp, vmap, ...) looks into what is computed."""
    # The compiler is not asked the second question.
    return (
        not torch.compiler.is_dynamo_compiling()
        and torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
    )


def transforms() -> set[str]:
    """The transforms of torch.func that are at work: "grad", "jvp", "vmap"."""
    if not is_transformed():
        return set()
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return {z.key().name.lower() for z in functorch.get_interpreter_stack() or ()}


def _choose_transformed(name: str, impl: str) -> Impl:
    """``choose`` within torch.func, which sees through PyTorch's own operators only."""
    barred = transforms() & _BARRED.get(name, frozenset())
    if impl == "reference" or (barred and impl == "auto"):
        return "reference"
    if impl in ("auto", "torch") and not barred:
        return "torch"
    what = ", ".join(sorted(barred or transforms()))
    raise Unavailable(
        f"impl={impl!r} of {name} does not go through torch.func's {what}; leave impl='auto', "
        f"which takes what does, or choose impl='reference'"
    )


def _why_not(
    impl: str,
    x: Tensor,
    dtype: torch.dtype | None,
    unserved: Callable[[], str | None] | None,
    is_asked: bool,
) -> str | None:
    """Why an implementation does not fit, or, unless it was asked for, should not be taken.

    Libraries say themselves, when they are called, what they lack.
    """
    if impl == "native":
        if _IS_FORCED and not is_asked:
            return "is for CPUs"
        if x.device.type != "cpu":
            return f"runs on a CPU, not on {x.device.type!r}"
        if x.dtype not in _KERNEL_DTYPES:
            return f"takes float32 or bfloat16, not {x.dtype}"
        return None if _native_works() else "has no C compiler, or ATTNZOO_NATIVE=0 is set"
    if impl == "flex" and not x.is_cuda:
        return f"runs on a GPU, not on {x.device.type!r}"
    if impl not in ("triton", "flex"):
        return None
    if not (x.is_cuda or _IS_FORCED or (is_asked and _IS_INTERPRETED)):
        if is_asked and not _is_installed():
            return _MISSING
        return f"runs on a GPU, not on {x.device.type!r}"
    if unserved is not None and (limit := unserved()):
        return f"does not serve {limit}"
    dtype = dtype or operand_dtype(x)
    if dtype not in _KERNEL_DTYPES and not (is_asked and dtype == torch.float16):
        return f"takes float32 or bfloat16, not {dtype}"
    if is_asked or _IS_FORCED:
        return None if _is_installed() else _MISSING
    return None if _triton_works() else "cannot run here"


_MISSING = "needs Triton, which is not installed (pip install 'attnzoo[triton]')"


OPERATORS: list[CustomOp] = []


class CustomOp:
    """A function with a gradient of its own that compilers and counters see as one operator.

    Otherwise the function itself is called: torch's operators cost ten times a small product.

    Args:
        name: Of the operator ``attnzoo::NAME``.
        function: What it computes.
        schema: Its arguments and results, unless the annotations say.
        device_types: Where it can run; by default anywhere.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        schema: str | None = None,
        device_types: str | None = None,
    ) -> None:
        self.name = name
        self.function = self.inference = function
        # Gradients that a kernel computes would pass for constants in a second differentiation.
        self._make_differentiable(self._refuse, _keep_nothing)
        self.operator = torch.library.custom_op(
            f"attnzoo::{name}", function, mutates_args=(), device_types=device_types, schema=schema
        )
        self.register_fake = self.operator.register_fake
        OPERATORS.append(self)
        if "torch.utils.flop_counter" in sys.modules:
            self.register_flops()

    def register_flops(self) -> None:
        """Tells torch's counter, whose import needs a sound Triton, if there is one."""
        from torch.utils.flop_counter import flop_registry, register_flop_formula

        packet = getattr(torch.ops.attnzoo, self.name)
        if packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(self._flops)

    def _flops(self, *args: Any, **kwargs: Any) -> int:
        return 2 * MACS[self.name](*args, **kwargs) if self.name in MACS else 0

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """As of torch's custom operators."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        self._make_differentiable(backward, setup_context)

    def _make_differentiable(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        methods = {
            "forward": self.function, "setup_context": setup_context, "backward": backward,
        }  # fmt: skip
        methods = {name: staticmethod(method) for name, method in methods.items()}
        function = type(f"attnzoo::{self.name}", (torch.autograd.Function,), methods)
        self.differentiable = function.apply  # type: ignore[attr-defined]

    def _refuse(self, *_: Any) -> Any:
        raise Unavailable(
            f"{self.name} cannot be differentiated, as second derivatives need; "
            f"choose impl='reference'"
        )

    def register_inference(self, function: Callable[..., Any]) -> None:
        """What runs in place of the function where nothing is differentiated or watched."""
        self.inference = function

    def __call__(self, *operands: Any) -> Any:
        # The compiler knows neither of the other questions, and is not asked them.
        if (
            torch.compiler.is_dynamo_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._get_tracing_state()
            or operands[0].is_meta
        ):
            return self.operator(*operands)
        return (self.differentiable if torch.is_grad_enabled() else self.inference)(*operands)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """What an operator without a gradient saves for its backward."""


def custom_op(
    name: str, *, schema: str | None = None, device_types: str | None = None
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorates the function of a ``CustomOp``."""
    return lambda function: CustomOp(name, function, schema, device_types)


def is_watched() -> bool:
    """Whether a tracer or a mode, such as a counter's, looks at torch's operators."""
    # The compiler knows neither question, and is not asked them.
    return not torch.compiler.is_compiling() and bool(
        torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state()
    )


def is_inference() -> bool:
    """Whether nothing is differentiated, compiled or watched."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
    )


def is_plain(*operands: Tensor) -> bool:
    """Whether products of these need no guard: no autocast, and nothing in half precision."""
    for z in operands:
        if z.dtype is not torch.float32 and z.dtype is not torch.float64:
            return False
    device_type = operands[0].device.type
    # Without autocast; asking torch for its breaks a graph in torch 2.11.
    return device_type == "meta" or not torch.is_autocast_enabled(device_type)


def is_few(name: str, impl: str, *operands: Tensor) -> bool:
    """Whether an operator runs in C because its tokens are few: calls cost more than numbers.

    Few, in float32, on a CPU, with nothing differentiated, compiled or watched.
    """
    x = operands[0]
    if torch.is_grad_enabled() or not x.is_cpu:
        return False
    if torch.compiler.is_compiling() or is_watched() or torch.is_autocast_enabled("cpu"):
        return False
    # Beyond, one thread and a plain product lose against many and a tuned one. Asked after the
    # compiler, as an export would fix the batch by the answer.
    if x.numel() > 1 << 15:
        return False
    for z in operands:  # a subclass may keep its numbers elsewhere
        if z.dtype is not torch.float32 or type(z) not in (Tensor, torch.nn.Parameter):
            return False
    return choose(name, impl, x) == "native"


def is_seen_through() -> bool:
    """Whether what is computed now is part of a trace or a transform."""
    return torch.compiler.is_compiling() or is_watched() or is_transformed()


def is_passing(device: torch.device) -> bool:
    """Whether a tensor made now is part of a trace, a transform or a recording, and no number."""
    if is_seen_through():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_wide_product(x: Tensor) -> bool:
    """Whether torch sums products of half-precision matrices into a float32 result here."""
    return x.is_cuda and _HAS_WIDE_PRODUCT


def has_half_sums(*operands: Tensor) -> bool:
    """Whether to multiply in bfloat16 with float32 sums; float16 would overflow on rounding.

    Not while compiling: a compiler joins the float32 copies with what comes before them.
    """
    for z in operands:
        if z.dtype is not torch.bfloat16:
            return False
    return (has_wide_product(operands[0]) or _IS_FORCED) and not torch.compiler.is_compiling()


def is_without_kernels(x: Tensor) -> bool:
    """Whether "auto" takes no Triton for a tensor, whatever the operator."""
    return x.is_cpu and not _IS_FORCED


def is_bare(
    layer: torch.nn.Module,
    kinds: tuple[type, ...] = (torch.nn.Linear, torch.nn.Conv2d),
    of_all: bool = True,
) -> bool:
    """Whether a call of a layer is what its class computes of its parameters, and no more.

    That is, it is of one of these classes, with no hook, adapter or other forward.

    Args:
        layer: The layer.
        kinds: The classes.
        of_all: Whether hooks of all modules count, which a counter of operations has.
    """
    if type(layer) not in kinds:
        return False
    own = layer.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or (of_all and of_modules._global_forward_hooks)
        or (of_all and of_modules._global_forward_pre_hooks)
        or (of_all and of_modules._global_backward_hooks)
        or (of_all and of_modules._global_backward_pre_hooks)
    )


def has_numbers_elsewhere(weight: Tensor) -> bool:
    """Whether a weight is a quantized or sharded one, which may not be cut or joined."""
    return hasattr(weight, "__tensor_flatten__")


def owns_gradient(x: Tensor, layer: torch.nn.Linear | torch.nn.Conv2d) -> bool:
    """Whether a linear layer of many tokens may have a backward of ours.

    In the eager loop; a compiler makes one of its own, and a counter is to see PyTorch's product.
    """
    if torch.compiler.is_dynamo_compiling() or not (
        _IS_FORCED or (x.is_cuda and max(x.numel(), _results(x, layer)) >= _MANY)
    ):
        return False
    if not torch.is_grad_enabled():
        return False
    if is_watched() or is_transformed() or forward_ad._current_level >= 0:
        return False
    if operand_dtype(x) not in _KERNEL_DTYPES:
        return False
    for z in (x, layer.weight, layer.bias):  # it may keep its numbers elsewhere
        if z is not None and type(z) not in (Tensor, torch.nn.Parameter):
            return False
    return _IS_FORCED or _triton_works()


def _results(x: Tensor, layer: torch.nn.Linear | torch.nn.Conv2d) -> int:
    """Numbers that a layer makes of tokens."""
    return x.numel() // x.shape[-1] * len(layer.weight) if x.shape[-1] else 0


def sums_bias(x: Tensor, layer: torch.nn.Linear | torch.nn.Conv2d) -> bool:
    """Whether a kernel of ours adds up the gradient of the bias of such a layer."""
    bias = layer.bias
    return bias is not None and bias.requires_grad and owns_gradient(x, layer)


def linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """layer(x), (..., in) -> (..., out), by which every mechanism calls its projections.

    Without gradients it spares the module's call, which takes a host as long as the product does.
    With them, of many tokens on a GPU, the bias's are added up by a kernel of ours. It is the
    call where a compiler, a hook, an adapter or another forward is at work.
    """
    if torch.compiler.is_dynamo_compiling():
        return layer(x)
    if not torch.is_grad_enabled():
        if is_bare(layer):
            own = layer.__dict__["_parameters"]
            if "weight" in own:  # DataParallel's replicas have it among their attributes
                return torch.nn.functional.linear(x, own["weight"], own["bias"])
    elif type(layer) is torch.nn.Linear and sums_bias(x, layer) and is_bare(layer):
        return _biased_linear().apply(*autocast_operands(x, layer.weight, layer.bias))[0]
    return layer(x)


@functools.cache
def _biased_linear() -> Any:
    """The class of it, whose kernel asks this file where it may run."""
    return importlib.import_module("attnzoo.ops.biased_linear").BiasedLinear


def has_fused_gelu(x: Tensor, layer: torch.nn.Linear) -> bool:
    """Whether PyTorch projects, adds the bias and applies GELU's tanh form in one kernel here.

    That call is in half precision and has no gradient, tangent or batching rule; an exporter or a
    counter knows none, and on other devices it is GELU's exact form.
    """
    if not x.is_cuda or layer.bias is None or forward_ad._current_level >= 0:
        return False
    dtype, is_recorded = operand_dtype(x), torch.is_grad_enabled()
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    for z in (x, layer.weight, layer.bias):
        if not z.is_cuda or operand_dtype(z) is not dtype or (is_recorded and z.requires_grad):
            return False
        if type(z) not in (Tensor, torch.nn.Parameter):  # it may keep its numbers elsewhere
            return False
    if is_watched() or is_transformed() or _may_export():
        return False
    return _fused_gelu_pays()


def loses_gradients() -> bool:
    """Whether a gradient of our own would be lost: in an exported program, or by torch.func."""
    return is_transformed() or _may_export()


def _may_export() -> bool:
    # Not is_exporting(), which is True in every compilation by torch before 2.13 (pytorch issue
    # 176347); before 2.9 the flag is not set in every export.
    return torch.compiler.is_compiling() and (
        not _KNOWS_EXPORT or torch.compiler._is_exporting_flag
    )


def can_look(x: Tensor) -> bool:
    """Whether looking at numbers costs no waiting for a device and breaks no graph."""
    is_seen = torch.compiler.is_compiling() or is_transformed()
    return x.device.type == "cpu" and not _IS_FORCED and not is_seen


def _is_installed(package: str = "triton") -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # an import that was blocked on purpose
        return False


def require_triton() -> None:
    """Raises Unavailable, naming the extra, where Triton cannot be imported."""
    if not _is_installed():
        raise Unavailable(f"impl='triton' {_MISSING}; or leave impl='auto'")


@functools.cache
def _try_triton() -> bool:
    is_old = torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0)
    if os.environ.get("ATTNZOO_TRITON") == "0" or is_old or not _is_installed():
        return False
    try:  # being installed is not enough: Triton needs a C compiler and a driver that it knows
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton is installed but cannot run ({reason}), so that torch's operators take over; "
            "set ATTNZOO_TRITON=0 to be spared this warning",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _try_flash() -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0):
        return False
    if not _is_installed("flash_attn"):
        return False
    try:  # it compiles its kernels on the first call
        if importlib.util.find_spec("flash_attn.cute") is None:
            return False
        call = optional.load("flash_attn.cute", "flash_attn_func")
        call(*torch.zeros(3, 1, 128, 1, 64, device="cuda", dtype=torch.bfloat16))
    except optional.ANYTHING as error:
        warnings.warn(
            f"flash_attn is installed, but flash-attn 4 cannot run ({optional.reason(error)}), so "
            "that softmax attention stays with PyTorch's kernels",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _try_fused_gelu() -> bool:
    # On Ada and on Blackwell for desktops others have measured it slower than the two kernels.
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] in (9, 10)


@functools.cache
def _try_native() -> bool:
    if os.environ.get("ATTNZOO_NATIVE") == "0":
        return False
    from attnzoo.ops.native_build import library

    return library() is not None


def _triton_works() -> bool:
    return _try_triton()


def flash_works() -> bool:
    """Whether flash-attn 4 is installed and runs on this GPU; asked once."""
    return _try_flash()


def _fused_gelu_pays() -> bool:
    return _try_fused_gelu()


def _native_works() -> bool:
    return _try_native()


def _load(package: str, impl: str, name: str) -> None:
    """Imports an implementation into ``_LOADED``, where a compiler finds a plain function."""
    loaded = _LOADED[package, name]
    if impl not in loaded:
        loaded[impl] = getattr(importlib.import_module(f"{package}.{impl}"), name)


# As torch.compiler.assume_constant_result does, but that imports the compiler and so Triton, and
# with a broken Triton nothing of the package would be importable.
for _constant in (
    _triton_works, _native_works, flash_works, _fused_gelu_pays, _load, _is_installed,
):  # fmt: skip
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
