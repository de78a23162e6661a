"""A DiT of diffusers (``DiTTransformer2DModel``) as the shared backbone with softmax attention.

Both compute the same. Where diffusers' differs from DiT's own code it is followed: its time has
other frequencies, and the norm before its feed-forward another eps. Every block of it has an
embedding of time and class; DiT has one, and a model whose blocks differ in it has no place here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from attnzoo import InvalidValue
from backbones.dit import CannotLoad, DiT

_CLASS = "DiTTransformer2DModel"
_NEEDED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_EMBEDDING = "norm1.emb."
# Ours -> theirs, inside a block and around the blocks.
_OF_BLOCK = {
    "modulation.linear": "norm1.linear",
    "attention.proj": "attn1.to_out.0",
    "feedforward.expand": "ff.net.0.proj",
    "feedforward.contract": "ff.net.2",
}
_AROUND = {
    "patch_embedding": "pos_embed.proj",
    "timestep_embedding.linear_1": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "timestep_embedding.linear_2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    "class_embedding": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
    "final_projection": "proj_out_2",
}


def diffusers_folder(folder: str | Path) -> Path | None:
    """The folder of a diffusers DiT: this one, or its "transformer"; None where there is none."""
    for path in (Path(folder), Path(folder) / "transformer"):
        try:
            config = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.get("_class_name") == _CLASS:
            return path
    return None


def load_diffusers(folder: str | Path) -> DiT:
    """Loads a diffusers DiT as ours, in eval mode.

    Args:
        folder: Of the model, or of a pipeline that has it as "transformer".

    Raises:
        InvalidValue: There is none, it is damaged, or it is built as ours cannot be.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    path = diffusers_folder(folder)
    if path is None:
        raise InvalidValue(f"{folder} holds no {_CLASS} of diffusers")
    try:
        theirs: Any = DiTTransformer2DModel.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, NotImplementedError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CannotLoad(f"cannot load a {_CLASS} from {path}: {reason}") from error
    return from_diffusers(theirs)


def from_diffusers(theirs: Any) -> DiT:
    """Our softmax DiT with the weights of a ``DiTTransformer2DModel``, in eval mode.

    Dropout, which only training would notice, is left out.

    Raises:
        InvalidValue: It is built as ours cannot be.
    """
    config: Any = theirs.config
    for name, needed in _NEEDED.items():
        if config[name] != needed:
            raise InvalidValue(f"a {_CLASS} with {name}={config[name]!r} is no DiT: {needed!r} is")
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise InvalidValue(
            f"a {_CLASS} with {config.in_channels} channels in and {out_channels} out is no DiT: "
            f"it has as many, or twice as many"
        )
    model = DiT(
        "softmax",
        {} if config.attention_bias else {"qkv_bias": False},
        dim=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        learn_sigma=out_channels != config.in_channels,
        num_classes=config.num_embeds_ada_norm,
        sample_size=config.sample_size,
        norm_eps=config.norm_eps,
        frequency_shift=1,
    )
    model.load_state_dict(_weights(theirs.state_dict(), config.num_layers))
    return model.eval()


def _weights(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    renamed = dict(_AROUND)
    for index in range(depth):
        ours, block = f"blocks.{index}", f"transformer_blocks.{index}"
        renamed |= {f"{ours}.{new}": f"{block}.{old}" for new, old in _OF_BLOCK.items()}
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{block}.attn1.to_{letter}.{kind}") for letter in "qkv"]
            if parts[0] is not None:
                found[f"{ours}.attention.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
        for name, tensor in theirs.items():
            if name.startswith(f"{block}.{_EMBEDDING}"):
                first = theirs[f"transformer_blocks.0.{name.removeprefix(f'{block}.')}"]
                if not torch.equal(tensor, first):
                    raise InvalidValue(
                        f"block {index} embeds time and class otherwise than block 0 ({name}), "
                        f"and a DiT has one embedding for all blocks, as every {_CLASS} that was "
                        f"converted from one does"
                    )
    for new, old in renamed.items():
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in theirs:
                found[f"{new}.{kind}"] = theirs[f"{old}.{kind}"]
    for kind in ("weight", "bias"):  # theirs gives the shift first, ours the scale
        shift, scale = theirs[f"proj_out_1.{kind}"].chunk(2)
        found[f"final_norm.linear.{kind}"] = torch.cat([scale, shift])
    return found
