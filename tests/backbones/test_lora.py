"""LoRA by peft: one name for its targets in every mechanism."""

import pytest
import torch
from torch import nn

from attnzoo import InvalidValue, list_attention
from backbones import DiT, lora_targets

peft = pytest.importorskip("peft")
# "rest" of SLA, in blocks of 4 tokens, else its linear part would see nothing.
OPTIONS = {"sla": {"block": 4}}


def model_of(attn):
    torch.manual_seed(0)
    options = OPTIONS.get(attn)
    model = DiT(attn, options, dim=16, depth=1, num_classes=10, in_channels=3, patch_size=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("attn", list_attention())
def test_every_mechanism_trains_and_merges(attn):
    model = model_of(attn)
    x, t, labels = torch.randn(2, 3, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 10])
    before = model(x, t, labels).sample.detach()
    # Every projection of the mechanism, whatever its name, and nothing else.
    targets = lora_targets(model)
    inside = dict(model.blocks[0].attention.named_modules())
    assert {name.removeprefix("blocks.0.attention.") for name in targets} == {
        name for name, module in inside.items() if type(module) is nn.Linear
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(adapted(x, t, labels).sample, before)
    ours = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(ours) == 2 * len(targets)
    optimizer = torch.optim.SGD(ours.values(), lr=1.0)
    adapted(x, t, labels).sample.square().sum().backward()
    for name, parameter in ours.items():  # the first matrices learn once the second are not 0
        if "lora_B" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    optimizer.step()
    after = adapted(x, t, labels).sample.detach()
    assert (after - before).abs().max() > 1e-4
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x, t, labels).sample, after, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == model_of(attn).state_dict().keys()


def test_parts_are_chosen_by_name():
    model = model_of("sana")
    both = lora_targets(model, "both")
    assert lora_targets(model, "feed-forward") == [name for name in both if "feedforward" in name]
    assert lora_targets(model) == ["blocks.0.attention.qkv", "blocks.0.attention.proj"]
    with pytest.raises(InvalidValue, match="'ffn' is none of attention, feed-forward, both"):
        lora_targets(model, "ffn")
    with pytest.raises(InvalidValue, match="no attention of this Linear"):
        lora_targets(nn.Linear(2, 2))
