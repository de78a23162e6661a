"""Every registered mechanism keeps the contract."""

import pytest
import torch

from attnzoo import build_attention, list_attention
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
