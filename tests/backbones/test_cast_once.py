"""Weights that are cast once give the numbers of autocast, and come back as they were."""

import contextlib

import pytest
import torch
from torch import nn

import attnzoo
from backbones import build_backbone, compile_blocks
from backbones.cast_once import CastWeights, cast_once
from tests.backbones.weights import scrambled

SHAPE = (3, 8, 8)


def model_of(name):
    model = build_backbone(name, "tiny", in_channels=3, num_classes=5, resolution=8,
                           latent_factor=1, patch_size=2, learn_sigma=False)  # fmt: skip
    return scrambled(model)


@pytest.mark.parametrize("name", attnzoo.list_attention())
def test_the_numbers_are_those_of_autocast(name):
    model = model_of(name)
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    own = {key: z.clone() for key, z in model.state_dict().items()}

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(images, torch.tensor([3.0, 700.0]), torch.tensor([0, 4])).sample

    wanted = call()
    with cast_once(model, call) as cast:
        assert cast and all(weight.dtype == torch.bfloat16 for weight in cast)
        assert torch.equal(call(), wanted)
    assert all(torch.equal(z, own[key]) for key, z in model.state_dict().items())
    assert all(z.dtype == own[key].dtype for key, z in model.state_dict().items())


def test_a_compiled_model_is_cast_too():
    model = compile_blocks(model_of("softmax"), backend="aot_eager")
    images, times = torch.randn(2, *SHAPE), torch.tensor([3.0, 700.0])

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(images, times, torch.tensor([0, 4])).sample

    wanted, own = call(), list(model.parameters())
    with cast_once(model, call) as cast:
        assert len(cast) > 10 and torch.equal(call(), wanted)
        # PyTorch up to 2.11 does not look again at parameters that it has compiled for.
        assert all(weight.dtype == torch.float32 for weight in own)
    assert torch.equal(call(), wanted)
    assert [id(weight) for weight in model.parameters()] == [id(weight) for weight in own]


def test_a_weight_that_is_read_otherwise_too_keeps_its_type():
    layer = nn.Linear(8, 8)
    other = nn.Linear(8, 8)
    model = nn.ModuleList([layer, other])
    x = torch.randn(2, 8)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return layer(x) * layer.weight.sum() + other(x)

    wanted = call()
    with cast_once(model, call) as cast:
        assert layer.weight.dtype == torch.float32 and other.weight.dtype == torch.bfloat16
        assert len(cast) == 3 and torch.equal(call(), wanted)


def test_without_autocast_there_is_nothing_to_cast():
    model = model_of("sana")
    with cast_once(model, lambda: model(torch.zeros(1, *SHAPE), 1, torch.tensor([0]))) as cast:
        assert cast == []


@pytest.mark.parametrize("name", attnzoo.list_attention())
def test_gradients_are_those_of_autocast(name):
    model = model_of(name).train()
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    own = {key: z.clone() for key, z in model.state_dict().items()}

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return model(images, torch.tensor([3.0, 700.0]), torch.tensor([0, 4])).sample

    def gradients(casts, steps=2):
        model.load_state_dict(own)  # batch norm has noted earlier calls
        model.zero_grad()
        torch.manual_seed(3)
        for _ in range(steps):
            with casts.in_place() if casts else contextlib.nullcontext():
                loss, auxiliary = call().square().mean(), attnzoo.auxiliary_loss(model)
                (loss if auxiliary is None else loss + auxiliary).backward()
            if casts:
                casts.hand_over()
        return [p.grad for p in model.parameters() if p.requires_grad]

    wanted, casts = gradients(None), CastWeights(model, call)
    attnzoo.auxiliary_loss(model)
    for (weight, copy), other in zip(casts.pairs, torch.randn(len(casts.pairs)), strict=True):
        copy.data.fill_(other)  # that of an earlier step
        copy.grad = torch.ones_like(copy)
        assert weight.dtype == torch.float32 and copy.dtype == torch.bfloat16
    casts.refresh()
    for one, other in zip(gradients(casts), wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert len(casts.pairs) > 20


def test_what_a_property_gives_is_another_use():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(2, 8)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            assert layer.weight.shape == (8, 8)
            return layer(x) + x * layer.weight.T.sum()

    with cast_once(layer, call) as cast:
        assert cast == []
