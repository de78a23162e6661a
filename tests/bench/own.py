"""The file of a user's own mechanism, of the name that ``format`` gives it."""

OWN = """
import attnzoo
import torch

@attnzoo.register_attention({!r})
class Mean(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.proj = torch.nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return self.proj(x).mean(1, keepdim=True).expand_as(x)
"""
