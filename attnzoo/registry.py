"""Name -> mechanism: a plain dict behind three functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from attnzoo.contract import Attention, AttentionContext, nearest

_REGISTRY: dict[str, type[Attention]] = {}
Mechanism = TypeVar("Mechanism", bound=type[Attention])


def register_attention(name: str) -> Callable[[Mechanism], Mechanism]:
    """Class decorator that puts a mechanism into the zoo under ``name``.

    Raises:
        ValueError: The name is taken.
        TypeError: The class is not an ``Attention``.
    """

    def register(cls: Mechanism) -> Mechanism:
        if name in _REGISTRY:
            raise ValueError(f"attention {name!r} is already registered by {_REGISTRY[name]}")
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            raise TypeError(f"{cls!r} must subclass attnzoo.Attention to be registered")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def list_attention() -> list[str]:
    """Sorted names of all registered mechanisms."""
    return sorted(_REGISTRY)


def get_attention(name: str) -> type[Attention]:
    """The class registered under ``name``; an unknown name is a ValueError that lists all."""
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown attention {name!r}{nearest(name, _REGISTRY)} "
            f"Registered: {', '.join(list_attention())}"
        )
    return _REGISTRY[name]


def build_attention(
    name: str,
    dim: int,
    num_heads: int | None = None,
    layer_index: int = 0,
    depth: int = 1,
    **options: Any,
) -> Attention:
    """Builds one attention layer.

    Args:
        name: A name of ``list_attention()``.
        dim: Width of the tokens.
        num_heads: Number of heads; None takes the mechanism's own default.
        layer_index: Position of the block in its network, from 0.
        depth: Number of blocks of the network.
        **options: Fields of the mechanism's ``Config``.

    Returns:
        A module called as ``layer(x, grid)``: (b, h * w, dim) -> (b, h * w, dim).

    Raises:
        ValueError: Unknown name, or a value that is out of range.
        TypeError: Unknown option (the nearest is suggested), or a value of the wrong type.
    """
    cls = get_attention(name)
    context = AttentionContext(dim=dim, num_heads=num_heads, layer_index=layer_index, depth=depth)
    return cls(context, cls.Config.from_options(name, options))
