"""An hourglass over the sequence, but for its product: means of groups, and what comes back."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def group_means(x: Tensor, size: int, *, impl: Impl = "auto") -> Tensor:
    """Means of groups of neighboring tokens, the last of which may be smaller.

    Args:
        x: (b, n, c).
        size: Tokens of a group, at least 2.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, ceil(n / size), c).
    """
    ...


@operator
def hourglass(
    x: Tensor, means: Tensor, rows: Tensor, size: int, is_active: bool = False,
    factor: Tensor | None = None, *, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Each group's row plus what its tokens differ by from its mean, SiLU of it, times another.

    Args:
        x: (b, n, d), or (b, n, 2 d), whose halves are added.
        means: ``group_means(x, size)``, which kernels compute anew.
        rows: (b, groups, d).
        size: Tokens of a group.
        is_active: Whether SiLU is taken of the sum.
        factor: (b, n, d), what that is multiplied by, or None.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, d), in the dtype of ``rows``.
    """
    ...
