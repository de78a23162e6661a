"""LinFusion's linear attention (arXiv 2409.02097).

Q = W_Q (X + f_Q(X)) and K = W_K (X + f_K(X)) see a token twice, through a small network
f(x) = W_2 LeakyReLU(LN(W_1 x)); with phi = ELU + 1, O = phi(Q) (phi(K)^T V / n) /
(phi(Q) mean_j phi(K_j)^T + eps) per head. Cost per sample, m = width of f:
4 d^2 n + 4 n d m + 2 n d d_head + n d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.ops.dispatch import linear
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of LinFusion's attention."""

    middle_dim: int | None = None  # m; None is d, as LinFusion trains
    eps: float = 1e-4  # LinFusion; added to the mean over the keys, not to their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.middle_dim is not None:
            self.at_least(1, "middle_dim")


class TokenNetwork(nn.Module):
    """x + f(x), which the projection of queries or keys reads."""

    def __init__(self, dim: int, middle_dim: int) -> None:
        super().__init__()
        # torch's own start values, as LinFusion's.
        self.first = nn.Linear(dim, middle_dim)
        self.norm = nn.LayerNorm(middle_dim)
        self.activation = nn.LeakyReLU(0.01)
        self.second = nn.Linear(middle_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        return x + linear(self.second, self.activation(self.norm(linear(self.first, x))))


@register_attention("linfusion")
class LinFusionAttention(LinearAttention):
    """ELU linear attention whose queries and keys come from a small network's residual."""

    Config = Config
    config: Config
    paper = "LinFusion, 2409.02097"
    activation = "elu"
    divides_by_mean = True  # q . mean_j k_j + eps is (q . sum_j k_j + n eps) / n
    plot_style = ("#8C564B", "s")
    tensors_crossed = 12.0  # twice x, f's two layers and their sum

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.query_network = TokenNetwork(dim, config.middle_dim or dim)
        self.key_network = TokenNetwork(dim, config.middle_dim or dim)
        # Without bias, as Stable Diffusion's, which LinFusion takes over.
        self.query = xavier_linear(dim, dim, bias=False)
        self.key = xavier_linear(dim, dim, bias=False)
        self.value = xavier_linear(dim, dim, bias=False)
        self.proj = xavier_linear(dim, dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, DiT's; LinFusion keeps the heads of the model it is put into."""
        return heads_of_width(dim, 64)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor]:
        """Q, K and V, (b, n, dim) each."""
        return self.project_query(x), *self.project_key_value(x)

    def project_query(self, x: Tensor) -> Tensor:
        """Q of some tokens."""
        return self.query(self.query_network(x))

    def project_key_value(self, x: Tensor) -> Sequence[Tensor]:
        """K and V of some tokens."""
        return self.key(self.key_network(x)), self.value(x)

    def query_kernel(self, query: Tensor) -> Tensor:
        """Q, before its ELU + 1."""
        return query

    def key_kernel(self, key: Tensor) -> Tensor:
        """K, before its ELU + 1."""
        return key

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        middle = self.config.middle_dim or self.dim
        projections = 4 * self.dim * (self.dim + middle) * grid[0] * grid[1]
        return super().macs_parts(grid) | {"projections": projections}
