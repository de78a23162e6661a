"""The same mathematics by other libraries, on the same weights: what ours is timed against."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo.contract import Attention
from attnzoo.layers.gated_linear import GatedLinear
from bench.checks import reference_of
from bench.isolate import Unsupported, one_line

Contestant = Callable[[Tensor, tuple[int, int]], Tensor]


class Peer(nn.Module):
    """A function of tokens and grid with the modules whose gradients it needs."""

    def __init__(self, function: Contestant, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ModuleList(modules)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.function(x, grid)


def contestants_of(layer: Attention) -> tuple[nn.Module, dict[str, nn.Module], dict[str, str]]:
    """Ours, the peers that could be built, and why others could not.

    Whether a peer runs is found by calling it: a package that imports may have no kernel here,
    and one in a state that nobody foresaw may raise anything.

    Args:
        layer: A layer of "softmax", "sana" or "gated", on its device and in its dtype.
    """
    peers: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name, build in _PEERS.get(layer.name, {}).items():
        try:
            peers[name] = build(layer)
        except (Exception, SystemExit) as error:
            missing[name] = one_line(error)
    return layer, peers, missing


# --- softmax ------------------------------------------------------------------------------------


def _bare_sdpa(layer: Any) -> nn.Module:
    """SDPA between the same two projections, without a module around it."""
    return Peer(lambda x, grid: _projected(layer, x, F.scaled_dot_product_attention), layer)


def _projected(layer: Any, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    batch, n, dim = x.shape
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias)
    query, key, value = qkv.view(batch, n, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = attend(query, key, value).transpose(1, 2).reshape(batch, n, dim)
    return F.linear(out, layer.proj.weight, layer.proj.bias)


def _sdpa_backend(backend: SDPBackend) -> Callable[[Any], nn.Module]:
    def build(layer: Any) -> nn.Module:
        if next(layer.parameters()).device.type != "cuda":
            raise NotImplementedError("a CUDA backend of SDPA")

        def run(x: Tensor, grid: tuple[int, int]) -> Tensor:
            with sdpa_kernel(backend):
                return _projected(layer, x, F.scaled_dot_product_attention)

        return Peer(run, layer)

    return build


def _plain(layer: Any) -> nn.Module:
    """Three plain operators in the dtype of the tokens: in bfloat16 faster than a CPU's SDPA."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(-1) @ value

    return Peer(lambda x, grid: _projected(layer, x, attend), layer)


def _diffusers_dit(layer: Any) -> nn.Module:
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    dim, heads = layer.dim, layer.num_heads
    peer = DiffusersAttention(dim, heads=heads, dim_head=dim // heads, bias=True, out_bias=True)
    _copy_projections(peer, layer)
    return Peer(lambda x, grid: peer(x), peer)


def _copy_projections(peer: Any, layer: Any) -> None:
    parts = (peer.to_q, peer.to_k, peer.to_v)
    with torch.no_grad():
        for part, weight in zip(parts, layer.qkv.weight.chunk(3), strict=True):
            part.weight.copy_(weight)
        if layer.qkv.bias is not None:
            for part, bias in zip(parts, layer.qkv.bias.chunk(3), strict=True):
                part.bias.copy_(bias)
        peer.to_out[0].weight.copy_(layer.proj.weight)
        peer.to_out[0].bias.copy_(layer.proj.bias)
    peer.to(layer.qkv.weight).train(layer.training)


def _multihead(layer: Any) -> nn.Module:
    peer = nn.MultiheadAttention(layer.dim, layer.num_heads, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(layer.qkv.weight)
        peer.in_proj_bias.copy_(layer.qkv.bias)
        peer.out_proj.weight.copy_(layer.proj.weight)
        peer.out_proj.bias.copy_(layer.proj.bias)
    peer.to(layer.qkv.weight).train(layer.training)
    return Peer(lambda x, grid: peer(x, x, x, need_weights=False)[0], peer)


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


def _package(function: str, *modules: str) -> Callable[[Any], nn.Module]:
    def build(layer: Any) -> nn.Module:
        kernel = optional(function, *modules)

        def attend(*operands: Tensor) -> Tensor:  # all of these want (b, n, h, d)
            out = kernel(*(z.transpose(1, 2) for z in operands))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return Peer(lambda x, grid: _projected(layer, x, attend), layer)

    return build


# --- Sana ---------------------------------------------------------------------------------------


def _diffusers_sana(layer: Any) -> nn.Module:
    from diffusers.models.attention_processor import Attention as DiffusersAttention
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    processor: Any = SanaLinearAttnProcessor2_0()
    dim, heads = layer.dim, layer.num_heads
    if layer.qkv.bias is not None or layer.config.qk_norm:
        raise NotImplementedError("diffusers' Sana block has neither qkv_bias nor qk_norm")
    peer = DiffusersAttention(
        dim, heads=heads, dim_head=dim // heads, bias=False, out_bias=True,
        processor=processor,
    )  # fmt: skip
    _copy_projections(peer, layer)
    return Peer(lambda x, grid: peer(x), peer)


# --- gated linear attention ---------------------------------------------------------------------


def _fla(module: str, function: str, gate: str) -> Callable[[Any], nn.Module]:
    """Our layer with flash-linear-attention's scan in place of ours; ``gate`` is its argument."""

    def build(layer: Any) -> nn.Module:
        kernel = optional(function, module)
        if "naive" in function:
            _refuse_cuda(layer)
        elif next(layer.parameters()).device.type != "cuda":
            raise NotImplementedError("Triton kernels need a CUDA device")
        # Our kernels would take the place of the scan that is replaced.
        scans = layer.layer
        scans.config = dataclasses.replace(scans.config, impl="torch")
        # Where the scale cannot be given it is that of softmax attention.
        has_scale = "scale" in inspect.signature(kernel).parameters

        def scan(
            query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, *_: Any, **__: Any
        ) -> Tensor:
            query = query if has_scale else query * query.shape[-1] ** 0.5
            operands = [rearrange(z, "b h n d -> b n h d") for z in (query, key, value, log_gate)]
            given = dict(zip(("q", "k", "v", gate), operands, strict=True))
            out = kernel(**given, **({"scale": 1.0} if has_scale else {}))
            return rearrange(out[0] if isinstance(out, tuple) else out, "b n h d -> b h n d")

        def run(x: Tensor, grid: tuple[int, int]) -> Tensor:
            with _scan_replaced(scan):
                return layer(x, grid)

        return Peer(run, layer)

    return build


@contextlib.contextmanager
def _scan_replaced(scan: Callable[..., Tensor]) -> Iterator[None]:
    module = importlib.import_module(GatedLinear.__module__)
    before = module.gated_linear_attention
    module.gated_linear_attention = scan  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        module.gated_linear_attention = before  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_cuda(layer: Any) -> None:
    if next(layer.parameters()).device.type == "cuda":
        raise NotImplementedError("thousands of launches, token by token: timed on a CPU only")


def _recurrence(layer: Any) -> nn.Module:
    _refuse_cuda(layer)
    return reference_of(layer)


_PEERS: dict[str, dict[str, Callable[[Any], nn.Module]]] = {
    "softmax": {
        "reference": reference_of,
        "matmul-softmax-matmul": _plain,
        "bare SDPA": _bare_sdpa,
        "diffusers DiT attention": _diffusers_dit,
        "torch MultiheadAttention": _multihead,
        "SDPA flash": _sdpa_backend(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa_backend(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": _sdpa_backend(SDPBackend.EFFICIENT_ATTENTION),
        # The second is flash-attn 4, a package that has no more than that.
        "flash-attn": _package("flash_attn_func", "flash_attn", "flash_attn.cute"),
        "xformers": _package("memory_efficient_attention", "xformers.ops"),
    },
    "sana": {"reference map": reference_of, "diffusers Sana processor": _diffusers_sana},
    "gated": {
        "recurrence": _recurrence,
        "fla chunk_gla": _fla("fla.ops.gla", "chunk_gla", "g"),
        "fla fused_recurrent_gla": _fla("fla.ops.gla", "fused_recurrent_gla", "gk"),
        "fla naive_recurrent_gla": _fla("fla.ops.gla.naive", "naive_recurrent_gla", "gk"),
    },
}
