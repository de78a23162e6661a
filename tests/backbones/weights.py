"""Weights for models whose gates and heads begin at zero."""

import torch


def scrambled(model):
    """The model in eval mode with every weight moved, so that every part of it matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()
