"""Ways in which something stands around a projection."""

import copy

from torch import nn


class Adapter(nn.Module):
    """All that one needs to have is a forward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 1.5 * self.layer(x)


def _scaled(module, arguments, out):
    return 1.5 * out


def adapt(layer, way):
    """Multiplies what every projection gives by 1.5; "weights" is what the others must equal."""
    for path, module in list(layer.named_modules()):
        if type(module) is not nn.Linear:
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
