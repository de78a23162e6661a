"""Every registered mechanism keeps the contract."""

import pytest
import torch

from attnzoo import build_attention, list_attention
from attnzoo.ops import dispatch
from attnzoo.testing import CHECKS, build_scrambled, reference_of


@pytest.mark.parametrize("name", list_attention())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, name):
    check(name)


@pytest.mark.parametrize("name", ["gated", "dig"])
def test_the_reference_of_a_layer_is_one_in_its_parts_too(name):
    layer = build_scrambled(name)
    assert reference_of(layer).layer.config.impl == "reference"
    assert layer.layer.config.impl == layer.config.impl == "auto"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list_attention())
def test_a_reference_keeps_the_type_of_its_tokens(name, dtype):
    layer = build_attention(name, 64, impl="reference").to(dtype)
    assert layer(torch.randn(1, 16, 64, dtype=dtype), (4, 4)).dtype is dtype


# Whose bias a kernel adds itself, or whose parts are products of their own without kernels.
ELSEWHERE = ("step_proj", "forget_gate.1", "focused.qkv", "ttt.qkv")
PRODUCTS = ("fusion.expand", "pvt.reduce")  # convolutions


@pytest.mark.parametrize("name", list_attention())
def test_a_kernel_adds_up_the_gradients_of_biases(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_IS_FORCED", True)
    layer = build_attention(name, 64, impl="reference")
    nodes = [layer(torch.randn(1, 16, 64), (4, 4)).grad_fn]
    users = {}
    for node in nodes:
        for before in {following for following, _ in node.next_functions if following}:
            users.setdefault(getattr(before, "variable", None), set()).add(node.name())
            if before not in nodes:
                nodes.append(before)
    for path, module in layer.named_modules(prefix=name):
        is_product = isinstance(module, torch.nn.Linear) or path.endswith(PRODUCTS)
        if is_product and not path.endswith(ELSEWHERE):
            assert module.bias is None or users[module.bias] == {"BiasedLinearBackward"}, path
