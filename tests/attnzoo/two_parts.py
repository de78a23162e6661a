"""Two processes in one: what halves of a batch exchange, without a process group."""

import copy

import torch
import torch.distributed as dist

from attnzoo.layers.shared_norm import share_batch_statistics
from attnzoo.ops import processes


class TwoParts:
    """Collectives that give each half of a batch what the other half put in when last computed.

    What a half puts into its first collective does not depend on the other, what it puts into the
    second depends on the first one's result, and so on: after ``rounds`` both are those of two
    processes.
    """

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        self._last: list[list[torch.Tensor]] = [[], []]
        self._now: list[torch.Tensor] = []
        self._part = 0
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(dist, "all_gather_into_tensor", self._gather)
        monkeypatch.setattr(dist, "all_reduce", self._reduce)

    def __call__(self, compute, rounds=3):
        """The results of ``compute(part)`` for parts 0 and 1; ``calls`` are those of one part."""
        results: list = [None, None]
        for _ in range(rounds):
            for self._part in (0, 1):
                self._now, self.calls = [], []
                results[self._part] = compute(self._part)
                self._last[self._part] = self._now
        return results

    def _both(self, x):
        place, other = len(self._now), self._last[1 - self._part]
        self._now.append(x.clone())
        theirs = other[place] if place < len(other) else x.clone()
        return torch.stack([self._now[-1], theirs] if self._part == 0 else [theirs, self._now[-1]])

    def _gather(self, out, x):
        self.calls.append("gather")
        out.copy_(self._both(x).view_as(out))

    def _reduce(self, x):
        self.calls.append("reduce")
        x.copy_(self._both(x).sum(0))


def shared(module):
    module = copy.deepcopy(module)
    share_batch_statistics(module)
    return module


def halves_and_whole(module, x, monkeypatch, call):
    """Output, gradients of x and of the weights, and buffers; and what one half exchanged."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(x.shape, generator=generator).to(x)

    def run(module, part):
        own = x.chunk(2)[part] if part is not None else x
        own = own.clone().requires_grad_()
        out = call(module, own)
        slopes = cotangent if part is None else cotangent.chunk(2)[part]
        found = torch.autograd.grad(out, [own, *module.parameters()], slopes)
        # Otherwise what is done to one in place is done to all.
        assert len({grad.data_ptr() for grad in found}) == len(found)
        return out.detach(), found, list(module.buffers())

    whole = run(copy.deepcopy(module), None)
    parts = TwoParts(monkeypatch)
    one, other = parts(lambda part: run(shared(module), part))
    for mine, theirs in zip(one[2], other[2], strict=True):
        assert torch.equal(mine, theirs)
    out, of_input = torch.cat([one[0], other[0]]), torch.cat([one[1][0], other[1][0]])
    weights = [a + b for a, b in zip(one[1][1:], other[1][1:], strict=True)]
    return (out, [of_input, *weights], one[2]), whole, parts.calls


def assert_equal(found, expected, tolerance):
    """What ``halves_and_whole`` gives, up to rounding; of gradients, of the largest."""
    for mine, theirs in zip([found[0], *found[2]], [expected[0], *expected[2]], strict=True):
        size = theirs.double().abs().amax()
        assert (mine.double() - theirs).abs().amax() <= tolerance * size
    largest = max(grad.norm() for grad in expected[1])
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * largest
