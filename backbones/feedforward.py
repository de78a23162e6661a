"""Feed-forward networks of the backbone, all called as ``feedforward(x, grid, time)``."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import WithAuxiliaryLoss, nearest
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import linear_gelu, xavier_linear
from attnzoo.ops.depthwise_conv import depthwise_conv
from attnzoo.ops.dispatch import linear
from attnzoo.ops.gated_scan import is_counted
from attnzoo.ops.routed_linear import routed_linear, router_logits


class FeedForward(WithAuxiliaryLoss):
    """What a block does to each token, or to its surroundings, after the attention.

    ``forward`` takes tokens (b, h * w, dim), the grid (h, w), and the time of each sample, (b,)
    from 0 to 1000, which a caller may leave out where nothing depends on it.
    """

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample: every token meets every weight once."""
        weights = (p.numel() for name, p in self.named_parameters() if name.endswith("weight"))
        return sum(weights) * grid[0] * grid[1]


class MLP(FeedForward):
    """Two linear layers around a tanh-approximated GELU (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.expand = xavier_linear(dim, int(dim * ratio), bias=True)
        self.contract = xavier_linear(int(dim * ratio), dim, bias=True)

    def forward(self, x: Tensor, grid: tuple[int, int], time: Tensor | None = None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        return linear(self.contract, linear_gelu(self.expand, x))


class MixFFN(FeedForward):
    """Sana's Mix-FFN (GLUMBConv, arXiv 2410.10629): a gated 3x3 depthwise inverted bottleneck."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.expand = xavier_linear(dim, 2 * hidden, bias=True)
        self.conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.contract = xavier_linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int], time: Tensor | None = None) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        hidden = F.silu(linear(self.expand, x))
        hidden = depthwise_conv(hidden, grid, self.conv.weight, self.conv.bias)
        value, gate = hidden.chunk(2, dim=-1)
        return self.contract(value * F.silu(gate))


class SwiGLU(FeedForward):
    """DiG's gated linear unit (arXiv 2405.18428): no biases, hidden width a multiple of 256."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = 256 * math.ceil(int(dim * ratio * 2 / 3) / 256)
        self.expand = xavier_linear(dim, 2 * hidden, bias=False)
        self.contract = xavier_linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int], time: Tensor | None = None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


class DiffMoE(FeedForward):
    """Experts that choose their tokens from the whole batch (DiffMoE, arXiv 2503.14487).

    In training each expert takes the tokens that score highest at it, a fixed number, so that
    noisier images and harder places may have more than their share. At inference a predictor of
    that choice decides token by token: expert e takes those whose prediction is above a threshold,
    the running average of what the last token taken was predicted. Samples are independent then.

    Attributes:
        threshold: Of every expert, a buffer.
        inactive_parameters: Of the experts that do not act on a token, on average.
    """

    EXPERTS = 16  # DiffMoE's largest number
    CAPACITY = 1  # experts of a token, on average; 1 costs what an MLP costs
    MOMENTUM = 0.05  # of the thresholds
    PREDICTOR_WEIGHT = 0.01  # of the predictor's loss, the mean over the layers that have one

    threshold: Tensor

    def __init__(self, dim: int, ratio: float, layers: int = 1) -> None:
        super().__init__()
        hidden, experts = int(dim * ratio), self.EXPERTS
        self.layers = layers
        self.router = nn.Parameter(torch.empty(experts, dim).normal_(std=0.006))
        self.predictor = nn.Sequential(
            xavier_linear(dim, dim, bias=True),
            nn.SiLU(),
            xavier_linear(dim, experts, bias=True),
        )
        self.expand, self.expand_bias = _expert_weights(experts, dim, hidden)
        self.contract, self.contract_bias = _expert_weights(experts, hidden, dim)
        self.register_buffer("threshold", torch.zeros(experts))

    @property
    def inactive_parameters(self) -> int:
        parts = self.expand, self.expand_bias, self.contract, self.contract_bias
        return sum(z[self.CAPACITY :].numel() for z in parts)

    def forward(self, x: Tensor, grid: tuple[int, int], time: Tensor | None = None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        tokens = x.flatten(0, 1)
        gates = router_logits(tokens, self.router).softmax(-1)
        # The predictor learns of the choice and has no part in it.
        predicted = self.predictor(tokens.detach()).to(gates.dtype)
        if self.training or is_counted():
            return self._by_capacity(tokens, gates, predicted).view_as(x)
        return self._by_threshold(tokens, gates, predicted).view_as(x)

    def _by_capacity(self, tokens: Tensor, gates: Tensor, predicted: Tensor) -> Tensor:
        taken = self._taken(len(tokens))
        # Inference chooses by prediction, and a counter that is shown no data counts that.
        chosen_by = gates if self.training else predicted
        index = chosen_by.T.topk(taken, dim=-1).indices  # (experts, taken)
        gate = gates.T.gather(-1, index)
        out = self._experts(_rows(tokens, index.flatten()).view(*index.shape, -1))
        out = (out * gate.unsqueeze(-1).to(out.dtype)).flatten(0, 1)
        if self.training:
            is_taken = torch.zeros_like(predicted).scatter(0, index.T, 1)
            loss = F.binary_cross_entropy_with_logits(predicted, is_taken)
            self.auxiliary_loss = self.PREDICTOR_WEIGHT * loss / self.layers
            self._move_threshold(predicted.detach(), taken)
        return _add_rows(tokens.new_zeros(tokens.shape, dtype=out.dtype), index.flatten(), out)

    def _by_threshold(self, tokens: Tensor, gates: Tensor, predicted: Tensor) -> Tensor:
        takes = predicted.sigmoid() > self.threshold
        total = torch.zeros_like(tokens)
        for expert in range(self.EXPERTS):
            part = slice(expert, expert + 1)
            if torch.compiler.is_compiling():  # which takes no number of tokens from the data
                gate = (gates[:, part] * takes[:, part]).to(tokens.dtype)
                total = total + gate * self._experts(tokens[None], part)[0].to(tokens.dtype)
                continue
            [index] = takes[:, expert].nonzero(as_tuple=True)
            out = gates[index, part] * self._experts(tokens[index][None], part)[0]
            total = total.index_add(0, index, out.to(tokens.dtype))
        return total

    def _experts(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """An MLP for each of the experts' tokens, (experts, t, dim) -> (experts, t, dim)."""
        hidden = torch.baddbmm(self.expand_bias[part].unsqueeze(1), x, self.expand[part])
        hidden = F.gelu(hidden, approximate="tanh")
        return torch.baddbmm(self.contract_bias[part].unsqueeze(1), hidden, self.contract[part])

    def _taken(self, tokens: int) -> int:
        return max(1, tokens * self.CAPACITY // self.EXPERTS)

    @torch.no_grad()
    def _move_threshold(self, predicted: Tensor, taken: int) -> None:
        last = predicted.T.topk(taken, dim=-1).values[:, -1].sigmoid().to(self.threshold.dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(last)
            last = last / dist.get_world_size()
        self.threshold.lerp_(last, self.MOMENTUM)

    def macs(self, grid: tuple[int, int]) -> int:
        """See ``FeedForward.macs``; every expert takes its number of the sample's own tokens."""
        n, dim = grid[0] * grid[1], self.router.shape[1]
        for_all = self.router.numel() + dim**2 + self.EXPERTS * dim
        of_expert = self.expand[0].numel() + self.contract[0].numel()
        return n * for_all + self.EXPERTS * self._taken(n) * of_expert


class TimeExperts(FeedForward):
    """An MLP for each interval of the diffusion time (ERNIE-ViLG 2.0, 2210.15257; RAPHAEL).

    A sample meets one of them, so that it costs what one costs.
    """

    EXPERTS = 10  # ERNIE-ViLG 2.0
    LAST_TIME = 1000  # the model's times, whatever the steps of the schedule

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.expand, self.expand_bias = _expert_weights(self.EXPERTS, dim, hidden)
        self.contract, self.contract_bias = _expert_weights(self.EXPERTS, hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], time: Tensor | None = None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        if time is None:
            raise InvalidValue("feedforward='time-experts' needs the time of each sample")
        expert = (time * self.EXPERTS // self.LAST_TIME).long().clamp(0, self.EXPERTS - 1)
        index = expert.unsqueeze(-1).expand(x.shape[:2])
        hidden = routed_linear(x, self.expand, index)
        hidden = hidden + self.expand_bias[expert].unsqueeze(1).to(hidden.dtype)
        out = routed_linear(F.gelu(hidden, approximate="tanh"), self.contract, index)
        return out + self.contract_bias[expert].unsqueeze(1).to(out.dtype)

    def macs(self, grid: tuple[int, int]) -> int:
        """See ``FeedForward.macs``."""
        return grid[0] * grid[1] * (self.expand[0].numel() + self.contract[0].numel())


def _expert_weights(experts: int, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Matrices (experts, width, out), each Xavier-uniform, and biases of 0."""
    weight = torch.empty(experts, width, out)
    for matrix in weight:
        nn.init.xavier_uniform_(matrix)
    return nn.Parameter(weight), nn.Parameter(torch.zeros(experts, out))


# Rows by number, and their sum back into place, in the form whose sums have one order: a CPU's
# threads add up what advanced indices share in any, and a GPU's what ``index_add`` shares.
def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


def _add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.index_add(0, index, rows)
    return x.index_put((index,), rows, accumulate=True)


FEEDFORWARDS: dict[str, type[FeedForward]] = {
    "mlp": MLP,
    "mix-ffn": MixFFN,
    "swiglu": SwiGLU,
    "diffmoe": DiffMoE,
    "time-experts": TimeExperts,
}


def build_feedforward(
    kind: str, dim: int, ratio: float, layer_index: int = 0, depth: int = 1
) -> FeedForward:
    """Builds one of ``FEEDFORWARDS``.

    Args:
        kind: "mlp", "mix-ffn", "swiglu", "diffmoe" or "time-experts". Of "diffmoe" every second
            block has experts, as DiffMoE has them, and the first and all others have an MLP.
        dim: Width of the tokens.
        ratio: Hidden width over ``dim``; "swiglu" takes two thirds of it, as is its custom.
        layer_index: Position of the block in the network, from 0.
        depth: Number of blocks of the network.

    Raises:
        InvalidValue: Unknown kind, or a ratio that leaves no hidden width.
    """
    if kind not in FEEDFORWARDS:
        raise InvalidValue(
            f"unknown feedforward {kind!r}{nearest(kind, FEEDFORWARDS)} "
            f"Choose one of {', '.join(FEEDFORWARDS)}"
        )
    if int(dim * ratio) < 1:
        raise InvalidValue(f"feedforward_ratio={ratio} leaves no hidden width of dim={dim}")
    if kind == "diffmoe":
        return DiffMoE(dim, ratio, depth // 2) if layer_index % 2 else MLP(dim, ratio)
    return FEEDFORWARDS[kind](dim, ratio)
