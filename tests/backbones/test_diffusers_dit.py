"""A DiT of diffusers as our softmax DiT: the same outputs from the same weights."""

import json

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from attnzoo import InvalidValue
from backbones import DiT
from backbones.diffusers_dit import diffusers_folder, from_diffusers, load_diffusers

SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
    "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 4,
}  # fmt: skip


def random_dit(**options):
    """With weights that are nowhere zero, and one embedding for all blocks as in a real one."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": False, "norm_eps": 1e-2},
        {"out_channels": None, "patch_size": 4, "num_layers": 1},
        {"dropout": 0.5, "out_channels": 3},
    ],
)
@torch.no_grad()
def test_outputs_are_equal(options):
    theirs = random_dit(**options)
    ours = from_diffusers(theirs)
    images = torch.randn(4, 3, 8, 8)
    times, labels = torch.tensor([0, 7, 500, 999]), torch.tensor([0, 1, 3, 4])  # 4 is the null
    wanted = theirs(images, timestep=times, class_labels=labels).sample
    found = ours(images, timestep=times, class_labels=labels).sample
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert ours.config.learn_sigma == (options.get("out_channels", 6) == 6)


@torch.no_grad()
def test_it_is_loaded_from_a_folder_or_a_pipelines_and_saved_as_ours(tmp_path):
    theirs = random_dit()
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert diffusers_folder(tmp_path) is None
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        ours = load_diffusers(folder)
        inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 4]), torch.tensor([1, 2])
        torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample)
    ours.save_pretrained(tmp_path / "ours")
    again = DiT.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(*inputs).sample, ours(*inputs).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn='geglu' is no DiT"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"out_channels": 5}, "3 channels in and 5 out"),
    ],
)
def test_what_ours_cannot_be_is_one_line(options, message):
    with pytest.raises(InvalidValue, match=message) as caught:
        from_diffusers(random_dit(**options))
    assert "\n" not in str(caught.value)


def test_blocks_that_embed_otherwise_are_refused():
    theirs = random_dit()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight += 1
    with pytest.raises(InvalidValue, match="block 2 embeds time and class otherwise"):
        from_diffusers(theirs)


def test_a_damaged_folder_is_one_line(tmp_path):
    random_dit().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidValue, match="cannot load a DiTTransformer2DModel from"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(InvalidValue, match="holds no DiTTransformer2DModel"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("options", [{"norm_eps": 0.0}, {"frequency_shift": 2}])
def test_options_of_the_backbone_are_checked(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        DiT("softmax", dim=16, depth=1, **options)
