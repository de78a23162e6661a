"""What two processes add up in buckets, beside what one flat sum gives; two_processes runs it."""

import contextlib
import gc
import time
import weakref
from itertools import count

import torch
import torch.distributed as dist
from torch import nn

from backbones import build_backbone
from backbones.cast_once import CastWeights
from backbones.recorded import captured
from recipes.lab.training.buckets import GradientBuckets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE = 16
# Bytes of one matrix, so that each has a bucket of its own; of two; and all after the backward.
SIZES = {"each": SIDE * SIDE * 4e-6, "pairs": SIDE * SIDE * 8e-6, "after": 0}


class Shared(torch.autograd.Function):
    """As a batch norm of all processes: a sum of its own within the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Late(torch.autograd.Function):
    """Reads its gradient when a sum that began before has had time to end."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.1)
        return grad.clone()


class Added(nn.Module):
    """The gradient of what is added is a view of what the layer gets, and comes before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIDE, SIDE, bias=False)
        self.added = nn.ParameterList([torch.ones(8 * SIDE)])  # behind the layer: reduced first
        self.to(DEVICE)

    def forward(self, x, _):
        return (Late.apply(self.layer(x)) + self.added[0].view(8, SIDE)).square().mean()


class CastAdded(Added):
    """Likewise where the weights are cast, and what is sent is of that type."""

    def forward(self, x, _):
        late = Late.apply(self.layer(x))
        return (late + self.added[0].to(torch.bfloat16).view(8, SIDE)).square().mean()


class Toy(nn.Module):
    """Five layers: the first two share a matrix, the last is frozen; of two more one is unused."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(SIDE, SIDE)  # in the last bucket but those of single parameters
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(5))
        self.layers[1].weight = self.layers[0].weight
        self.layers[4].requires_grad_(False)
        self.sometimes = nn.Linear(SIDE, SIDE)
        self.wide = nn.Parameter(torch.ones(3, SIDE, dtype=torch.float64))
        # As of a convolution whose channels come last.
        self.turned = nn.Parameter(torch.randn(SIDE, SIDE).t())
        self.to(DEVICE)

    def forward(self, x, with_sometimes):
        for layer in self.layers:
            x = Shared.apply(torch.tanh(layer(x)))
        if with_sometimes:
            x = x + self.sometimes(x)
        return (x @ self.turned * self.wide.sum(0)).square().mean()


def inputs(step):
    """Of this process."""
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(8, SIDE, generator=generator).to(DEVICE)


def told_of(*numbers):
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat_sum(model, sums=torch.float32):
    """What one sum of all gradients gives, and 0 for those that there are not."""

    def rounded(gradient):
        return gradient.to(sums) if gradient.dtype == torch.float32 else gradient

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
    flat = torch.cat([rounded(gradient).double().flatten() for gradient in found])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in trained.values()])
    return {
        name: rounded(part.view_as(p).to(p.dtype)).to(p.dtype)
        for (name, p), part in zip(trained.items(), parts, strict=True)
    }


def backward(model, step, uses, lowered=False):
    """``uses`` says which processes use the layer that is used sometimes, or "even" steps."""
    is_used = {"both": True, "one": dist.get_rank() == 1, "even": step % 2 == 0}
    with torch.autocast(DEVICE, torch.bfloat16, lowered):
        loss = model(inputs(step), is_used.get(uses, False))
    loss.backward()


class Watched:
    """Notes every sum of buckets: its length, and when it began.

    Args:
        when: Gives that; without it, whether a backward was under way.
    """

    def __init__(self, when=None):
        self.events = []
        self.is_inside = False
        self._when = when or (lambda: self.is_inside)
        self._reduce = GradientBuckets._reduce

    def __enter__(self):
        def reduce(buckets, tensors):
            self.events.append((sum(tensor.numel() for tensor in tensors), self._when()))
            return self._reduce(buckets, tensors)

        GradientBuckets._reduce = reduce
        return self

    def __exit__(self, *_):
        GradientBuckets._reduce = self._reduce


def summed(size, uses, micro_steps=1, compiled=False, cast=False, kind=Toy, sums=torch.float32):
    """Three steps of a model, of which the first is not overlapped.

    With ``cast``, under autocast, of whose casts the model holds copies.

    Returns:
        Whether each step's gradients are those of one flat sum, bit for bit; the sums of the
        last; and whether its numbers are summed.
    """
    model, plain = kind(), kind()
    buckets = GradientBuckets(model, SIZES[size], sums)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    # The layer that is used sometimes is used here.
    casts = CastWeights(model, lambda: backward(model, 0, "both", True)) if cast else None
    if casts:
        assert len(casts.pairs) == (6 if kind is Toy else 2)
        buckets.follow(casts)
    equal, numbers = [], count(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(3):
        model.zero_grad()
        plain.zero_grad()
        with Watched() as watched:
            for micro_step in range(micro_steps):
                if micro_step == micro_steps - 1:
                    buckets.begin()
                watched.is_inside = True
                with casts.in_place() if casts else contextlib.nullcontext():
                    backward(called, micro_steps * step + micro_step, uses, cast)
                watched.is_inside = False
                if casts and micro_step < micro_steps - 1:
                    casts.hand_over()
            told, norm = buckets.finish(told_of(next(numbers), 1 + dist.get_rank()))
        for micro_step in range(micro_steps):
            backward(plain, micro_steps * step + micro_step, uses, cast)
        one, other = gradients(model), flat_sum(plain, sums)
        same = one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
        norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in trained])
        same &= torch.equal(norm, torch.linalg.vector_norm(norms))
        equal.append(same and torch.equal(told, told_of(2 * (step + 1), 3)))
    return {"equal": equal, "events": watched.events}


def broken_off():
    """Whether a step is right after a backward that broke off when two sums had begun."""
    model, plain = Toy(), Toy()
    buckets = GradientBuckets(model, SIZES["each"])
    for step in range(2):
        model.zero_grad()
        buckets.begin()
        handle = None
        if step == 1:

            def refuse(gradient):
                raise RuntimeError("as a compiler")

            handle = model.layers[2].weight.register_hook(refuse)
        try:
            backward(model, step, "both")
            buckets.finish(told_of(0))
        except RuntimeError as error:
            assert "as a compiler" in str(error)
        if handle is not None:
            handle.remove()
    begun = len(buckets._works)
    model.zero_grad()
    buckets.begin()
    backward(model, 2, "both")
    buckets.finish(told_of(0))
    backward(plain, 2, "both")
    one, other = gradients(model), flat_sum(plain)
    return {"begun": begun, "equal": all(torch.equal(one[name], other[name]) for name in other)}


def arrives_twice():
    """What is said where a parameter has two gradients in one backward."""
    model = Toy()
    buckets = GradientBuckets(model, SIZES["each"])
    buckets.begin()
    backward(model, 0, "both")
    buckets.finish(told_of(0))
    model.zero_grad()
    buckets.begin()
    backward(model, 1, "both")
    try:
        backward(model, 2, "both")
    except RuntimeError as error:
        buckets.finish(told_of(0))
        return str(error)
    return ""


def recorded():
    """Whether replays of a step that is one CUDA graph give the sums of their own inputs."""
    model, plain = Toy(), Toy()
    buckets = GradientBuckets(model, SIZES["each"])
    x, told, equal = inputs(0), told_of(1), []

    def step():
        model.zero_grad()
        buckets.begin()
        model(x, True).backward()
        return buckets.finish(told.clone())[0]

    graph, numbers = captured(step)
    for number in (1, 2):
        x.copy_(inputs(number))
        graph.replay()
        plain.zero_grad()
        backward(plain, number, "both")
        one, other = gradients(model), flat_sum(plain)
        same = all(torch.allclose(one[name], other[name], rtol=1e-5) for name in other)
        equal.append(same and numbers.item() == 2)
    return equal


def freed():
    """Whether buckets and weights go with the last name for them, or with the next collection."""
    model = Toy()
    buckets = GradientBuckets(model, SIZES["each"])
    buckets.begin()
    backward(model, 0, "both")
    buckets.finish(told_of(0))
    left = [weakref.ref(thing) for thing in (buckets, model.turned)]
    del model, buckets
    gc.collect()
    return [thing() is None for thing in left]


def of_a_backbone():
    """How far a backward had got when each bucket's sum began, and could have begun at best."""
    model = build_backbone("dydila", "tiny", latent_factor=1, resolution=16).to(DEVICE)
    sizes = [p.numel() for p in model.parameters()]
    buckets, come = GradientBuckets(model, 4e-6 * sum(sizes) / 10), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: come.append(p.numel()))
    images = torch.ones(2, 4, 16, 16, device=DEVICE)
    label = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        model.zero_grad()
        come.clear()
        with Watched(lambda: sum(come) / sum(sizes)) as watched:
            buckets.begin()
            model(images, 1, label).sample.square().mean().backward()
            buckets.finish(told_of(0))
    *lengths, _ = (length for length, _ in watched.events)
    best = [sum(lengths[: index + 1]) / sum(lengths) for index in range(len(lengths))]
    return {"begun": [at for _, at in watched.events[:-1]], "best": best}


def cases():
    """All of it, by name."""
    found = {f"{size} {uses}": summed(size, uses) for size in SIZES for uses in ("both", "one")}
    found["each neither"] = summed("each", "neither")
    found["each, micro-steps"] = summed("each", "both", micro_steps=2)
    # The last micro-step has no gradient for a layer of which the first has one.
    found["each even, micro-steps"] = summed("each", "even", micro_steps=2)
    found["each, cast"] = summed("each", "one", cast=True)
    found["each even, cast, micro-steps"] = summed("each", "even", micro_steps=2, cast=True)
    found["each, compiled"] = summed("each", "both", compiled=True)
    found["each, views"] = summed("each", "both", kind=Added)
    low = {"sums": torch.bfloat16}
    found["each, bf16"] = summed("each", "one", **low)
    found["each, views, bf16"] = summed("each", "both", cast=True, kind=CastAdded, **low)
    found["each, cast, bf16"] = summed("each", "one", cast=True, **low)
    found["each even, cast, micro-steps, bf16"] = summed("each", "even", 2, cast=True, **low)
    if DEVICE == "cuda":
        found["recorded"] = recorded()
    found |= {"backbone": of_a_backbone(), "freed": freed()}
    return {**found, "broken off": broken_off(), "twice": arrives_twice()}
