"""Ways in which something stands around a projection, or its weight is no plain one."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker


class Adapter(nn.Module):
    """All that one needs to have is a forward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1.5 * self.layer(x)


def _scaled(module, arguments, out):
    return 1.5 * out


def projections(layer):
    """The linear layers inside it, by name."""
    return {name: z for name, z in layer.named_modules() if type(z) is nn.Linear}


def adapt(layer, way, only=""):
    """Multiplies what every projection gives by 1.5; "weights" is what the others must equal."""
    for path, module in projections(layer).items():
        if only not in ("", path):
            continue
        if way == "hook":
            module.register_forward_hook(_scaled)
        elif way == "forward":
            vars(module)["forward"] = Adapter(copy.copy(module)).forward
        elif way == "adapter":
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, Adapter(module))
        else:
            for parameter in module.parameters():
                parameter.data.mul_(1.5)
    return layer


class Quantized(torch.Tensor):
    """A weight of which only the product is known."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers):
        self.numbers = numbers

    def __tensor_flatten__(self):
        return ["numbers"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].numbers, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].numbers)
        raise NotImplementedError(f"{function} of a quantized weight")


def quantize(layer, only=""):
    """Of every projection, or of one."""
    for path, module in projections(layer).items():
        if only in ("", path):
            quantized: Any = Quantized(module.weight.detach())
            module.weight = nn.Parameter(quantized, requires_grad=False)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operators_alone_and_tracked(call):
    """How often each operator runs, without and under hooks of all modules, as a counter's are."""
    with _Operators() as alone:
        call()
    with ModuleTracker(), _Operators() as tracked:
        call()
    return alone.found, tracked.found
