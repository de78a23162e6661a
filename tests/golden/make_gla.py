"""Writes gla.safetensors: inputs, outputs and gradients of flash-linear-attention's recurrence.

Needs flash-linear-attention 0.6.0, fla-core 0.6.0 (MIT) and triton, in one throw-away folder, as
both packages hold a part of `fla`; the recurrence itself runs on a CPU:

    pip download --no-deps -d wheels flash-linear-attention==0.6.0 fla-core==0.6.0 triton
    for wheel in wheels/*.whl; do unzip -qo $wheel -d packages; done
    PYTHONPATH=packages python tests/golden/make_gla.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from fla.ops.gla.naive import naive_recurrent_gla
from safetensors.torch import save_file


def main() -> None:
    batch, tokens, heads, key_dim, value_dim = 1, 75, 2, 8, 12
    generator = torch.Generator().manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, width, generator=generator)

    query, key, value, logit = normal(key_dim), normal(key_dim), normal(value_dim), normal(key_dim)
    weight = normal(value_dim)
    golden = {"query": query, "key": key, "value": value, "weight": weight}
    for name, strength in (("mild", 1), ("strong", 100)):
        gate = F.logsigmoid(logit) / 16 * strength
        inputs = [z.clone().requires_grad_() for z in (query, key, value, gate)]
        out, _ = naive_recurrent_gla(*inputs)
        (out * weight).sum().backward()
        golden |= {f"{name}.log_gate": gate, f"{name}.out": out.detach()}
        for z, tensor in zip(("query", "key", "value", "log_gate"), inputs, strict=True):
            golden[f"{name}.grad.{z}"] = tensor.grad
    save_file(golden, Path(__file__).with_name("gla.safetensors"))


if __name__ == "__main__":
    main()
