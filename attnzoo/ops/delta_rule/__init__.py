"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a memory that is corrected.

S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T and o_t = q_t S_t, with the decay
a_t = exp(log_decay_t) and the strength b_t per head.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.delta_rule.torch import gated_delta_block
from attnzoo.ops.dispatch import Impl, operator

__all__ = ["gated_delta_block", "gated_delta_rule", "gated_delta_rule_macs"]


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
            for any decays and never looks at the data. "fla" is flash-linear-attention's kernel,
            on a GPU. "auto" is "torch".

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
