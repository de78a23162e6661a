"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a memory that is corrected.

S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T and o_t = q_t S_t, with the decay
a_t = exp(log_decay_t) and the strength b_t per head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.delta_rule.torch import gated_delta_block
from attnzoo.ops.dispatch import MACS, Impl, operator

__all__ = ["gated_delta_block", "gated_delta_rule", "gated_delta_rule_macs", "unserved_heads"]

MOST_CHANNELS = 64  # of a head, in the kernels


def unserved(query: Tensor, _: Tensor, value: Tensor, *__: Tensor) -> str | None:
    """What the Triton kernels do not serve of operands, (b, h, n, d)."""
    return unserved_heads(query.shape[1] * query.shape[2], query.shape[-1], value.shape[-1])


def unserved_heads(head_tokens: int, key_dim: int, value_dim: int) -> str | None:
    """The same of an image's tokens times heads, asked before there are operands."""
    for name, channels in (("keys", key_dim), ("values", value_dim)):
        if channels > MOST_CHANNELS:
            return f"{name} of {channels} channels a head, more than {MOST_CHANNELS}"
    if head_tokens * (2 * key_dim + value_dim) >= 2**31:
        return "images of 2^31 numbers"
    return None


@operator
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Causal linear attention whose keys replace what the state holds under them.

    Time and memory are linear in n.

    Args:
        query: (b, h, n, dk), scaled by the caller.
        key: (b, h, n, dk), of norm 1 at most: longer keys make the recurrence grow.
        value: (b, h, n, dv).
        log_decay: (b, h, n), not positive.
        strength: (b, h, n), from 0 (nothing is written) to 1 (what was there is replaced).
        impl: "torch" works by chunks of 64 tokens, with one triangular system each; it is exact
            for any decays and never looks at the data. "triton" is this package's kernels, as
            exact, on a GPU, for up to 64 channels a head; "fla" is flash-linear-attention's.

    Returns:
        (b, h, n, dv), in the dtype of ``query``; the state stays in float32 or better.

    Raises:
        Unavailable: The library cannot be imported, or not run on these tensors.
    """
    ...


def gated_delta_rule_macs(tokens: int, key_dim: int, value_dim: int) -> int:
    """Multiply-accumulates of one head of one scan, as the recurrence does them.

    S^T k, the update and q S take key_dim * value_dim each. The chunks of "torch" do more: 64
    times (2 key_dim + value_dim) per token for products, and up to half of 64 times
    (key_dim + value_dim) for the triangular system.
    """
    return 3 * tokens * key_dim * value_dim


def _macs(query: Tensor, key: Any, value: Any, log_decay: Tensor, *_: Any, **__: Any) -> int:
    """Of ``delta_scans``: without keys and values, queries stand for the three of them."""
    images, n, scans, heads = log_decay.shape
    key_dim = query.shape[-1] if key is not None else query.shape[-1] // (3 * heads)
    value_dim = key_dim if value is None else value.shape[-1]
    return images * scans * heads * gated_delta_rule_macs(n, key_dim, value_dim)


MACS |= {
    "delta_scans": _macs,
    # After the gradient and what was kept of the forward.
    "delta_scans_backward": lambda *operands, **_: 2 * _macs(*operands[6:]),
}
