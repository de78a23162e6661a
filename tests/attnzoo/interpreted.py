"""Where tests of kernels run, on a GPU or interpreted, and what they hold an operator to."""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a start decides it
HALF = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
CAN_RUN = HAS_TRITON and (DEVICE == "cuda" or IS_INTERPRETED)


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def saved_once():
    """What a backward reads can be read once, as under gradient checkpointing."""
    return torch.autograd.graph.saved_tensors_hooks(lambda z: [z], list.pop)


def errors(function, operands, shape, dtype, impl):
    """Of an operator's output and gradients, against its reference in float64."""
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    results = []
    for name, wide in (("reference", torch.float64), (impl, dtype)):
        inputs = [z.to(dtype).to(wide).requires_grad_() for z in operands]
        with saved_once():
            out = function(*inputs, impl=name)
        assert out.dtype == wide
        results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(wide))])
    for exact, found in zip(*results, strict=True):
        assert found.shape == exact.shape
        yield ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def with_gradients(function, inputs, *args, **options):
    """The output and the gradients of all inputs but the last, the cotangent, in float64."""
    *inputs, cotangent = (z.detach().clone() for z in inputs)
    inputs = [z.requires_grad_() for z in inputs]
    out = function(*inputs, *args, **options)
    assert out.dtype == inputs[0].dtype
    found = [out, *torch.autograd.grad(out, inputs, cotangent)]
    return [z.detach().double() for z in found]


def doubled(inputs):
    return [z.double() for z in inputs]


def relative_errors(found, exact):
    pairs = zip(found, exact, strict=True)
    apart = [(f - e).norm() / e.norm().clamp_min(1e-30) for f, e in pairs]
    return [z.nan_to_num(torch.inf).item() for z in apart]  # max() may overlook a NaN


# PyTorch's are tested where nothing is interpreted.
IMPLEMENTATIONS = ["torch"] * (not IS_INTERPRETED) + ["triton"] * CAN_RUN
# The interpreter cuts digits off where a GPU rounds.
BUDGETS = [(torch.float32, 1e-6), (HALF, 2**-6)]
