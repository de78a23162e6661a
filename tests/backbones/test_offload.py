"""Weights kept elsewhere, or in another type, until their module is called."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from attnzoo import InvalidValue, list_attention
from backbones import DiT

CPU = torch.device("cpu")


def model_of(attn, **options):
    torch.manual_seed(0)
    model = DiT(attn, dim=16, depth=1, num_classes=10, in_channels=3, patch_size=1, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def sample_of(model):
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([3, 500]), torch.tensor([0, 10])).sample


@pytest.mark.parametrize("attn", list_attention())
def test_weights_may_be_kept_in_another_type(attn):
    model = model_of(attn)
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    weight = cast.get_parameter("blocks.0.modulation.linear.weight")
    assert weight.dtype == torch.bfloat16
    exact = sample_of(model)
    assert (sample_of(cast) - exact).norm() < 0.02 * exact.norm()


def test_a_feed_forwards_convolution_keeps_its_type():
    model = model_of("sana", feedforward="mix-ffn")
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert sample_of(model).isfinite().all()


@pytest.mark.parametrize("attn", ["compressed", "conv", "differential", "gated", "zigma"])
def test_weights_that_are_read_but_not_there_are_refused(attn):
    """Some were read as they lay: numbers that were wrong, or a crash."""
    model = model_of(attn)
    exact, whole = sample_of(model), copy.deepcopy(model)
    with pytest.raises(InvalidValue, match="preload_module_classes"):
        sample_of(cpu_offload(model, CPU))
    with pytest.raises(InvalidValue, match="offload_type='block_level'"):
        whole.enable_group_offload(CPU, CPU, "leaf_level")
    # What both messages advise.
    together = cpu_offload(copy.deepcopy(whole), CPU, preload_module_classes=["Block"])
    for _ in range(2):
        torch.testing.assert_close(sample_of(together), exact)
    whole.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(sample_of(whole), exact)


@pytest.mark.parametrize("attn", ["sana", "softmax"])
def test_weights_of_linear_layers_may_be_elsewhere(attn):
    model = model_of(attn)
    exact = sample_of(model)
    torch.testing.assert_close(sample_of(cpu_offload(copy.deepcopy(model), CPU)), exact)
    model.enable_group_offload(CPU, offload_type="leaf_level")
    torch.testing.assert_close(sample_of(model), exact)


def test_weights_left_on_the_disk_are_refused_too(tmp_path):
    model = model_of("conv")
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.named_children()} | {"blocks": "disk"}
    loaded = DiT.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(InvalidValue, match="are offloaded until it is called"):
        sample_of(loaded)
