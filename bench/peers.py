"""The same mathematics by other libraries, on the same weights: what ours is timed against."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo.ops.gated_scan import scan, unscan
from attnzoo.testing import reference_of
from bench.isolate import Unsupported, one_line

Contestant = Callable[[Tensor, tuple[int, int]], Tensor]
Builder = Callable[[Any], Any]


class Peer(nn.Module):
    """A function of tokens and grid with the modules whose gradients it needs."""

    def __init__(self, function: Contestant, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ModuleList(modules)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.function(x, grid)


def optional(function: str, *modules: str) -> Callable[..., Any]:
    """A function of the first of these modules that has it.

    Raises:
        Unsupported: None has, whatever importing them raised; the message is one line.
    """
    failed = []
    for module in modules:
        try:
            return getattr(importlib.import_module(module), function)
        except (Exception, SystemExit) as error:
            failed.append(one_line(error))
    raise Unsupported("; ".join(failed))


def _require_device(layer: Any, device: str, reason: str) -> None:
    if next(layer.parameters()).device.type != device:
        raise Unsupported(reason)


def _require_plain(layer: Any) -> None:
    """Refuses a layer with parts that no rival has beside its projections."""
    extra = {name.split(".")[0] for name, _ in layer.named_parameters()} - {"qkv", "proj"}
    if extra:
        raise Unsupported(f"rivals have no {', '.join(sorted(extra))}")


def _by(attend: Callable[..., Tensor]) -> Builder:
    """A softmax layer's two projections around a function of (b, heads, n, d) operands."""

    def build(layer: Any) -> nn.Module:
        _require_plain(layer)

        def run(x: Tensor, grid: tuple[int, int]) -> Tensor:
            batch, n, dim = x.shape
            qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias)
            query, key, value = qkv.view(batch, n, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
            out = attend(query, key, value).transpose(1, 2).reshape(batch, n, dim)
            return F.linear(out, layer.proj.weight, layer.proj.bias)

        return Peer(run, layer)

    return build


def _sdpa(backend: SDPBackend) -> Builder:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    def build(layer: Any) -> nn.Module:
        _require_device(layer, "cuda", "a CUDA backend of SDPA")
        return _by(attend)(layer)

    return build


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Three plain operators in the dtype of the tokens: in bfloat16 faster than a CPU's SDPA."""
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(-1) @ value


def _package(function: str, *modules: str) -> Builder:
    def build(layer: Any) -> nn.Module:
        kernel = optional(function, *modules)

        def attend(*operands: Tensor) -> Tensor:  # all of these want (b, n, h, d)
            out = kernel(*(z.transpose(1, 2) for z in operands))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return _by(attend)(layer)

    return build


def _diffusers(processor: str | None = None) -> Builder:
    """diffusers' block with our weights, by a processor of its own or the one it takes."""

    def build(layer: Any) -> nn.Module:
        from diffusers.models import attention_processor as library

        _require_plain(layer)
        given = {}
        if processor:
            if layer.qkv.bias is not None:
                raise Unsupported("diffusers' Sana block has no qkv_bias")
            given["processor"] = getattr(library, processor)()
        dim, heads = layer.dim, layer.num_heads
        peer: Any = library.Attention(dim, heads=heads, dim_head=dim // heads,
                                      bias=layer.qkv.bias is not None, **given)  # fmt: skip
        state = {f"to_out.0.{name}": value for name, value in layer.proj.state_dict().items()}
        for kind, values in layer.qkv.state_dict().items():
            parts = zip("qkv", values.chunk(3), strict=True)
            state |= {f"to_{part}.{kind}": value for part, value in parts}
        peer.load_state_dict(state)
        peer.to(layer.qkv.weight).train(layer.training)
        return Peer(lambda x, grid: peer(x), peer)

    return build


def _multihead(layer: Any) -> nn.Module:
    _require_plain(layer)
    peer = nn.MultiheadAttention(layer.dim, layer.num_heads, batch_first=True)
    peer.load_state_dict({
        "in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias,
        "out_proj.weight": layer.proj.weight, "out_proj.bias": layer.proj.bias,
    })  # fmt: skip
    peer.to(layer.qkv.weight).train(layer.training)
    return Peer(lambda x, grid: peer(x, x, x, need_weights=False)[0], peer)


def _fla(module: str, function: str, gate: str, device: str, reason: str) -> Builder:
    """The layer of GLA around flash-linear-attention's scan, whose gates are named ``gate``."""

    def build(layer: Any) -> nn.Module:
        kernel, gla = optional(function, module), layer.layer
        _require_device(layer, device, reason)

        def run(x: Tensor, grid: tuple[int, int]) -> Tensor:
            query, key, value, logit, output_gate = (
                rearrange(project(x), "b n (h d) -> b n h d", h=gla.num_heads)
                for project in (gla.query, gla.key, gla.value, gla.forget_gate, gla.output_gate)
            )
            # In float32, as the layer has them around its own scans.
            log_gate = F.logsigmoid(logit.float()) / gla.config.gate_normalizer
            ordered = (
                torch.cat([scan(z, grid, direction) for direction in layer.directions])
                for z in (query, key, value, log_gate)
            )
            # Its kernels sum in float32 themselves; operands in float32 would cost them twice.
            out = kernel(**dict(zip(("q", "k", "v", gate), ordered, strict=True)))[0].float()
            scans = zip(out.chunk(len(layer.directions)), layer.directions, strict=True)
            mean = torch.stack([unscan(z, grid, direction) for z, direction in scans]).mean(0)
            out = F.rms_norm(mean, mean.shape[-1:], gla.norm.weight.float(), gla.norm_eps)
            out = (out * F.silu(output_gate.float())).to(x.dtype)
            return gla.proj(rearrange(out, "b n h d -> b n (h d)"))

        return Peer(run, layer)

    return build


def _recurrence(layer: Any) -> Any:
    _require_device(layer, "cpu", _SLOW)
    return reference_of(layer)


_SLOW = "thousands of launches, token by token: timed on a CPU only"
_TRITON = ("cuda", "Triton kernels need a CUDA device")
PEERS: dict[str, dict[str, Builder]] = {
    "softmax": {
        "reference": reference_of,
        "matmul-softmax-matmul": _by(_plain),
        "bare SDPA": _by(F.scaled_dot_product_attention),
        "diffusers DiT attention": _diffusers(),
        "torch MultiheadAttention": _multihead,
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        # The second is flash-attn 4, a package that has no more than that.
        "flash-attn": _package("flash_attn_func", "flash_attn", "flash_attn.cute"),
        "xformers": _package("memory_efficient_attention", "xformers.ops"),
    },
    "sana": {
        "reference map": reference_of,
        "diffusers Sana processor": _diffusers("SanaLinearAttnProcessor2_0"),
    },
    "gated": {
        "recurrence": _recurrence,
        "fla chunk_gla": _fla("fla.ops.gla", "chunk_gla", "g", *_TRITON),
        "fla fused_recurrent_gla": _fla("fla.ops.gla", "fused_recurrent_gla", "gk", *_TRITON),
        "fla naive_recurrent_gla": _fla("fla.ops.gla.naive", "naive_recurrent_gla", "gk", "cpu",
                                        _SLOW),
    },
}  # fmt: skip
