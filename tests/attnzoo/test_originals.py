"""Mechanisms against the originals that packages ship, with the weights copied over."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnProcessor2_0, SanaLinearAttnProcessor2_0
from torch import nn

from attnzoo import build_attention
from attnzoo.testing import tokens


def diffusers_attention(processor, layer, bias, qk_norm=None):
    """diffusers' attention module with the weights of ``layer``."""
    theirs = DiffusersAttention(
        query_dim=layer.dim,
        heads=layer.num_heads,
        dim_head=layer.dim // layer.num_heads,
        bias=bias,
        kv_heads=layer.num_heads,
        qk_norm=qk_norm,
        processor=processor,
    )
    with torch.no_grad():
        for ours, name in zip(layer.qkv.weight.chunk(3), ("q", "k", "v"), strict=True):
            getattr(theirs, f"to_{name}").weight.copy_(ours)
        if bias:
            for ours, name in zip(layer.qkv.bias.chunk(3), ("q", "k", "v"), strict=True):
                getattr(theirs, f"to_{name}").bias.copy_(ours)
        theirs.to_out[0].load_state_dict(layer.proj.state_dict())
    return theirs


def check_same(ours, theirs, grid, tolerance=1e-6):
    """Outputs and input gradients agree, relative to the largest."""
    x = tokens(grid, dim=64).requires_grad_()
    cotangent = torch.randn_like(x)
    results = [(out, *torch.autograd.grad(out, x, cotangent)) for out in (ours(x), theirs(x))]
    for mine, original in zip(*results, strict=True):
        assert (mine - original).abs().max() <= tolerance * original.abs().max()


@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (16, 24)])
def test_sana_is_diffusers_sana(grid):
    torch.manual_seed(0)
    layer = build_attention("sana", 64, eps=1e-15)
    theirs = diffusers_attention(SanaLinearAttnProcessor2_0(), layer, bias=False)
    check_same(lambda x: layer(x, grid), theirs, grid)


def test_sana_with_qk_norm_is_sana_1_5_at_small_activations():
    """Where the mean square of a query is not far above the norm's eps."""
    torch.manual_seed(0)
    layer = build_attention("sana", 64, eps=1e-15, qk_norm=True)
    processor = SanaLinearAttnProcessor2_0()
    theirs = diffusers_attention(processor, layer, False, qk_norm="rms_norm_across_heads")
    with torch.no_grad():
        for mine, original in (
            (layer.query_norm, theirs.norm_q),
            (layer.key_norm, theirs.norm_k),
        ):
            mine.weight.uniform_(0.5, 1.5)
            original.weight.copy_(mine.weight)
    check_same(lambda x: layer(1e-2 * x, (7, 13)), lambda x: theirs(1e-2 * x), (7, 13))


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
def test_softmax_is_the_attention_of_diffusers_dit_block(grid):
    torch.manual_seed(0)
    layer = build_attention("softmax", 64, num_heads=4)
    nn.init.normal_(layer.qkv.bias)
    theirs = diffusers_attention(AttnProcessor2_0(), layer, bias=True)
    check_same(lambda x: layer(x, grid), theirs, grid)


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
def test_softmax_is_torchs_multihead_attention(grid):
    torch.manual_seed(0)
    layer = build_attention("softmax", 64, num_heads=4)
    theirs = nn.MultiheadAttention(64, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.qkv.weight)
        theirs.in_proj_bias.copy_(layer.qkv.bias.normal_())
        theirs.out_proj.load_state_dict(layer.proj.state_dict())
    check_same(lambda x: layer(x, grid), lambda x: theirs(x, x, x, need_weights=False)[0], grid)
