"""The contract every attention mechanism keeps: one base class, one context, typed options."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import operator
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.errors import InvalidType, InvalidValue


def nearest(name: object, choices: Iterable[object]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest of ``choices``, or ``"."`` if none is."""
    close = difflib.get_close_matches(str(name), list(map(str, choices)), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """Where a mechanism stands in its network; the same for every mechanism.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads; None takes the mechanism's own default.
        layer_index: Position of the block in the network, counted from 0.
        depth: Number of blocks in the network.

    Raises:
        InvalidType: A number is no integer.
        InvalidValue: A number is out of range.
    """

    dim: int
    num_heads: int | None = None
    layer_index: int = 0
    depth: int = 1

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(AttentionContext)
        for name, hint in hints.items():
            check_option(name, getattr(self, name), hint)
        if self.dim < 1:
            raise InvalidValue(f"dim must be at least 1, got {self.dim}")
        if self.num_heads is not None and (self.num_heads < 1 or self.dim % self.num_heads):
            divisors = [h for h in range(1, min(self.dim, 64) + 1) if self.dim % h == 0]
            raise InvalidValue(
                f"num_heads={self.num_heads} does not divide dim={self.dim}; "
                f"choose one of {divisors}"
            )
        if not 0 <= self.layer_index < self.depth:
            raise InvalidValue(
                f"layer_index={self.layer_index} must lie in [0, depth) with depth={self.depth}"
            )


class Removed(NamedTuple):
    """An option, or some values of one, that saved configurations may still name.

    Attributes:
        version: The first that lacks it.
        default: What the option was by default, which is all that is left.
        values: Where the option itself is still there, the values that are gone.
    """

    version: str
    default: Any = None
    values: tuple[Any, ...] = ()


def removed_in(
    version: str, *, values: Mapping[str, tuple[Any, ...]] | None = None, **defaults: Any
) -> dict[str, Removed]:
    """What ``AttentionConfig.removed`` holds: options with their former defaults, and values."""
    gone = {name: Removed(version, default) for name, default in defaults.items()}
    return gone | {name: Removed(version, values=z) for name, z in (values or {}).items()}


LEAST_DIVISOR = 1e-15  # Sana's smallest eps; what float32 takes for 0 would leave 0 / 0
# What ``impl`` was called before version 0.2.0.
_FORMER_IMPL = {"naive": "reference", "sdpa": "torch", "safe": "torch", "folded": "torch"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of a mechanism: subclass it as a frozen dataclass, one field per option.

    Values are checked against the fields' annotations, so that ``Literal`` fields list their
    valid values and suggest the nearest. What neither ``--set`` nor a config file can hold is
    made of what they can: a tuple of a list, an enum's member of its value or name, a ``Path``
    of a string.

    Attributes:
        removed: Options that an earlier version had, by name.

    Raises:
        InvalidType: A value does not have the type of its field.
        InvalidValue: A value is not among those its ``Literal`` or enum lists.
    """

    removed: ClassVar[Mapping[str, Removed]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = as_tuples(value)
            value = check_option(field.name, value, hints[field.name])
            object.__setattr__(self, field.name, value)

    def at_least(self, minimum: float, *names: str) -> None:
        """Raises InvalidValue for each named option below ``minimum``."""
        for name in names:
            if getattr(self, name) < minimum:
                raise InvalidValue(f"{name} must be at least {minimum}, got {getattr(self, name)}")

    @classmethod
    def from_options(cls, mechanism: str, options: Mapping[str, Any]) -> AttentionConfig:
        """Builds the config, also from what an earlier version saved.

        Raises:
            InvalidType: The mechanism has no such option.
            InvalidValue: A value is out of range, or a version removed it.
        """
        if not isinstance(options, Mapping):
            raise InvalidType(f"options of {mechanism!r} must be a dict, got {options!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        current: dict[str, Any] = {}
        for name, value in options.items():
            if (gone := cls.removed.get(name)) is not None:
                # Of an option that is there some values are gone, else all but the default.
                is_listed = any(_is_same(value, z) for z in gone.values or (gone.default,))
                if is_listed == (name in known):
                    remedy = "" if name in known else f"; only {name}={gone.default!r} is left"
                    raise InvalidValue(
                        f"{name}={value!r} of {mechanism!r} was removed in version "
                        f"{gone.version}{remedy}"
                    )
                if name not in known:
                    continue
            if name not in known:
                if name in ("dim", "num_heads", "depth"):
                    raise InvalidType(
                        f"{name}={value!r} stands among the options of {mechanism!r}: "
                        f"give it beside them, as {name}=..."
                    )
                raise InvalidType(
                    f"{mechanism!r} has no option {name!r}{nearest(name, known)} "
                    f"It takes: {', '.join(known) or 'none'}"
                )
            is_word = name == "impl" and isinstance(value, str)
            current[name] = _FORMER_IMPL.get(value, value) if is_word else value
        for field in dataclasses.fields(cls):
            defaults = field.default, field.default_factory
            if field.name not in current and defaults == (dataclasses.MISSING,) * 2:
                raise InvalidType(
                    f"{mechanism!r} has no default of its option {field.name!r}: give it a value"
                )
        return cls(**current)


def as_tuples(value: Any, *, in_words: bool = False) -> Any:
    """The same value with a tuple for every list, of which JSON makes no difference.

    Args:
        value: Of an option, or options by name.
        in_words: Whether enums' members and paths become what a file holds of them.
    """
    if isinstance(value, Mapping):
        return {key: as_tuples(item, in_words=in_words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(as_tuples(item, in_words=in_words) for item in value)
    if in_words and isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, str | int | float) else value.name
    return str(value) if in_words and isinstance(value, Path) else value


def _is_same(value: Any, other: Any) -> bool:
    """Whether a value is another, which 2.0 is not of 2, nor True of 1."""
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    return isinstance(value, type(other)) and value == other


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of an annotation."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def words_of(kind: Any) -> list[Any]:
    """The values that a ``Literal`` or an enum lists, of members without a word their names."""
    members: Any = kind
    listed = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return [
        z if not isinstance(z, enum.Enum) else z.value if isinstance(z.value, str) else z.name
        for z in (members if isinstance(kind, enum.EnumMeta) else listed)
    ]


def _members_of(kind: Any) -> Mapping[str, Any]:
    """By name, the members that an enum has or a ``Literal`` lists."""
    if isinstance(kind, enum.EnumMeta):
        return kind.__members__
    return {z.name: z for z in typing.get_args(kind) if isinstance(z, enum.Enum)}


def check_option(name: str, value: Any, hint: Any) -> Any:
    """Checks a value against an annotation.

    Returns:
        The value; of an enum's value or name the member, of a string that stands for it a path.

    Raises:
        InvalidType: The value is of another type.
        InvalidValue: It is not finite, or not among those that a ``Literal`` or an enum lists.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValue(f"{name} must be finite, got {value}")
    kinds = alternatives(hint)
    words = [word for kind in kinds for word in words_of(kind)]
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if any(_is_same(value, z) for z in typing.get_args(kind)):
                return value
            continue
        if typing.get_origin(kind) is tuple and isinstance(value, tuple):
            return _checked_items(name, value, typing.get_args(kind))
        kind = typing.get_origin(kind) or kind
        if kind is Any:
            return value
        if kind is list:
            raise InvalidType(f"annotate {name} as a tuple: every list becomes one")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (kind is float and is_number) or (
            kind is not float
            and isinstance(value, kind)
            and (kind is bool or not isinstance(value, bool))
        ):
            return value
    for kind in kinds:
        members = _members_of(kind).items()
        found = [z for _, z in members if _is_same(value, z.value)]
        if found := found or [z for name_of, z in members if _is_same(value, name_of)]:
            return found[0]
        if kind is Path and isinstance(value, str):
            return Path(value)
    if words and isinstance(value, str):
        raise InvalidValue(
            f"{name}={value!r} is not valid{nearest(value, words)} Choose one of {words}"
        )
    expected = " or ".join(
        f"one of {of_kind}"
        if (of_kind := words_of(kind))
        else getattr(kind, "__name__", str(kind))
        for kind in kinds
    )
    message = f"{name} must be {expected}, got {value!r} ({type(value).__name__})"
    if any(map(dataclasses.is_dataclass, kinds)):
        message += "; --set and config files hold none: make its fields options of their own"
    raise InvalidType(message)


def _checked_items(name: str, value: tuple[Any, ...], hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if hints[-1:] == (Ellipsis,):
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise InvalidType(f"{name} must hold {len(hints)} values, got {value!r}")
    pairs = enumerate(zip(value, hints, strict=True))
    return tuple(check_option(f"{name}[{index}]", item, hint) for index, (item, hint) in pairs)


class WithAuxiliaryLoss(nn.Module):
    """A module whose training forward may want a scalar added to the loss.

    Attributes:
        auxiliary_loss: A scalar that the last training forward wants added to the loss, or None.
            A module sets it in ``forward``, always or in training only: what is no training
            forward (eval mode, no gradients, the recomputation of a checkpointed backward)
            leaves it as it is. A second forward replaces the first's; copies have none.
    """

    _auxiliary_loss: Tensor | None = None

    @property
    def auxiliary_loss(self) -> Tensor | None:
        return self._auxiliary_loss

    @auxiliary_loss.setter
    def auxiliary_loss(self, loss: Tensor | None) -> None:
        if loss is None or (self.training and torch.is_grad_enabled() and not _in_backward()):
            self._auxiliary_loss = loss

    def __getstate__(self) -> dict[str, Any]:
        # A loss in the middle of a graph cannot be copied, and belongs to one step of one model.
        return {k: v for k, v in vars(self).items() if k != "_auxiliary_loss"}


class Attention(WithAuxiliaryLoss, ABC):
    """Base class of every mechanism: tokens on a grid in, tokens of the same shape out.

    A subclass defines ``forward``, may define ``Config`` (its options), ``default_num_heads``,
    ``macs_parts`` (its closed-form cost) and ``attention_map``, and initializes its own
    parameters.

    Args:
        context: Where the mechanism stands in the network.
        config: The mechanism's options.

    Attributes:
        name: What it is registered as.
        paper: Title and arXiv number, for the table of ``python -m attnzoo``.
        complexity: Growth of its core with the number of tokens n, likewise.
        plot_style: Color ("#RRGGBB") and filled matplotlib marker in every picture; a mechanism
            without, also a subclass of a registered one, gets one that depends on its name.
        tensors_crossed: Tensors of height * width tokens of width ``dim`` that a forward moves
            through memory if every product is a kernel of its own and all else is joined to it.
        auxiliary_loss: See ``WithAuxiliaryLoss``.
    """

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    complexity: ClassVar[str] = ""
    plot_style: ClassVar[tuple[str, str] | None] = None
    tensors_crossed: ClassVar[float] = 6.0  # tokens, queries, keys, values, attended, result

    def __init__(self, context: AttentionContext, config: AttentionConfig) -> None:
        super().__init__()
        self.context = context
        self.config = config
        self.dim = context.dim
        self.num_heads = context.num_heads or self.default_num_heads(context.dim)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Number of heads when the caller names none."""
        return 1

    @abstractmethod
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mixes tokens.

        Args:
            x: Tokens, (batch, height * width, dim), row by row.
            grid: (height, width) in tokens.

        Returns:
            Tokens, (batch, height * width, dim).

        Raises:
            InvalidValue: ``x`` does not hold height * width tokens of width dim.
        """

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """Multiply-accumulates of one forward per sample, by part.

        Parts are named projections, core, routing or conv.

        Raises:
            InvalidType: The mechanism gives no closed form.
        """
        raise InvalidType(f"{type(self).__name__} has no closed form: define macs_parts(grid)")

    def macs(self, grid: tuple[int, int]) -> int:
        """Every multiply-accumulate of one forward, per sample.

        Raises:
            InvalidType: The mechanism gives no closed form, or a linear layer is quantized.
        """
        check_weights(self)
        return sum(stated_parts(self, sides_of("grid", grid)).values())

    def bytes_crossed(self, grid: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes that a forward of one image moves through memory, each tensor once.

        With ``macs`` it makes the floor that a layer's time is measured against.

        Raises:
            InvalidType: A linear layer is quantized.
        """
        check_weights(self)
        tokens = self.tensors_crossed * math.prod(sides_of("grid", grid)) * self.dim
        return round((tokens + sum(p.numel() for p in self.parameters())) * dtype.itemsize)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The weight of every token in every token's output, materialized.

        Returns:
            (batch, heads, height * width, height * width), rows are queries. Convolutional
            branches and projections are not part of it.

        Raises:
            InvalidType: The mechanism has no such map.
        """
        raise InvalidType(f"{type(self).__name__} gives no attention_map")

    def after_block(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the mechanism does to the residual stream at the end of its block; nothing here.

        Its cost belongs to ``macs_parts``.

        Args:
            x: Tokens, (batch, height * width, dim).
            grid: (height, width) in tokens.

        Returns:
            Tokens, (batch, height * width, dim).
        """
        return x

    def fuse(self) -> dict[str, Any]:
        """Folds what only training needs; the eval-mode output stays the same.

        Returns:
            The options that describe the folded layer, where they differ from ``config``.
        """
        return {}

    def check_tokens(self, x: Tensor, grid: tuple[int, int]) -> None:
        """Raises InvalidValue unless ``x`` is (batch, height * width, dim); InvalidType for a
        ``grid`` that is no pair of integers.
        """
        is_pair = isinstance(grid, (tuple, list)) and len(grid) == 2
        if not (is_pair and (type(grid[0]) is type(grid[1]) is int or all(map(_is_count, grid)))):
            raise InvalidType(f"grid must be (height, width) in tokens, two ints, got {grid!r}")
        height, width = grid
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise InvalidValue(
                f"expected tokens of shape (batch, height * width, {self.dim}), "
                f"got {tuple(x.shape)}"
            )
        if height < 1 or width < 1 or height * width != x.shape[1]:
            raise InvalidValue(
                f"grid={height}x{width} does not hold the {x.shape[1]} tokens of x; "
                f"pass the (height, width) of the token grid"
            )

    def extra_repr(self) -> str:
        options = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.name}: dim={self.dim}, num_heads={self.num_heads}, {shown}"


def check_weights(model: nn.Module) -> None:
    """Raises InvalidType if a linear layer's weight is packed, whose numbers cannot be counted."""
    for name, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if weight is None or not hasattr(layer, "in_features"):
            continue
        numbers = weight.dtype if isinstance(weight, Tensor) else None
        if numbers is None or not (numbers.is_floating_point or numbers.is_complex):
            raise InvalidType(
                f"cannot count {name or 'a layer'}, a quantized {type(layer).__name__}: count the "
                f"model before it is quantized"
            )


def stated_parts(layer: Attention, grid: tuple[int, int]) -> dict[str, int]:
    """What ``macs_parts`` states; InvalidType unless these are integers from 0 on, by part."""
    parts: Any = layer.macs_parts(grid)
    if not isinstance(parts, Mapping) or not all(_is_count(z) and z >= 0 for z in parts.values()):
        raise InvalidType(
            f"macs_parts of {layer.name or type(layer).__name__!r} must be a dict of integers "
            f"from 0 on, such as {{'projections': 4096}}, got {parts!r}"
        )
    return dict(parts)


def sides_of(name: str, value: Any) -> tuple[int, int]:
    """(height, width); raises InvalidValue unless they are two positive integers."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_pair or not all(_is_count(side) and side > 0 for side in value):
        raise InvalidValue(f"{name} must be (height, width), both positive, got {value!r}")
    return int(value[0]), int(value[1])


def _is_count(number: Any) -> bool:
    """Whether it is an integer, or a compiler's symbol of one."""
    if isinstance(number, torch.SymInt):  # of which operator.index would make a constant
        return True
    if isinstance(number, bool) or getattr(number, "dtype", None) is torch.bool:
        return False
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def _in_backward() -> bool:
    """Whether autograd runs this forward, to have again what a checkpoint did not store."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def heads_of_width(dim: int, head_dim: int) -> int:
    """Smallest number of heads that divides ``dim`` into heads of at most ``head_dim``.

    Raises:
        InvalidType: A width is no integer.
        InvalidValue: A width is below 1.
    """
    for name, width in (("dim", dim), ("head_dim", head_dim)):
        check_option(name, width, int)
        if width < 1:
            raise InvalidValue(f"{name} must be at least 1, got {width}")
    return next(h for h in range(max(1, -(-dim // head_dim)), dim + 1) if dim % h == 0)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Sums and clears what the parts of ``model`` want added to the training loss.

    Call it once after each training forward.

    Returns:
        A scalar, or None if nothing has an auxiliary loss.
    """
    losses = []
    for module in model.modules():
        if isinstance(module, WithAuxiliaryLoss) and module.auxiliary_loss is not None:
            losses.append(module.auxiliary_loss)
            module.auxiliary_loss = None
    return torch.stack(losses).sum() if losses else None
