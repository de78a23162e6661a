"""Launches that are replayed without their Python give what the operators give.

On a GPU, or with addresses for the interpreter, as ``test_interpreted.py`` runs it.
"""

import ctypes
import dataclasses
import gc
import importlib.util
import os
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.ops import dispatch
from backbones.cast_once import CastWeights

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton"
)
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="needs Triton, compiled")
pytestmark = needs_triton
GRID = (2, 3)


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors of the host that say they are on a GPU; kernels are to be found beside."""
    from attnzoo.ops import triton_common

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: 7, raising=False)
    monkeypatch.setattr(torch._C, "_get_cublas_allow_tf32", lambda: False, raising=False)
    monkeypatch.setattr(dispatch, "_try_triton", lambda: True)
    monkeypatch.setattr(triton_common, "_CAN_SKIP", True)
    monkeypatch.setattr(triton_common, "_COMPILED", {})
    return triton_common


class Launcher:
    """As Triton's of version 3.7, to which a kernel's operands are a tuple."""

    global_scratch_size = profile_scratch_size = 0

    def __call__(self, x, y, z, stream, function, metadata, told, enter, leave, *args):
        self.launch(x, y, z, stream, function, metadata, args)


@pytest.fixture
def by_address(on_gpu, monkeypatch):
    """The interpreter as what was compiled: it gets addresses, and counts what it gets."""
    from triton.runtime.interpreter import InterpretedFunction

    started = []

    def at(pointer, like):
        if not pointer:  # of an empty tensor
            return like
        size = like.element_size()
        return torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=like.dtype)

    def launch(kernel, grid):
        def first(*args, **options):
            kernel.run(*args, grid=grid, warmup=False, **options)
            types = [z.new_empty(0) if isinstance(z, torch.Tensor) else None for z in args]

            def run(x, y, z, stream, function, metadata, args):
                assert (stream, function, metadata) == (7, "function", "metadata")
                args = list(args)
                started.append(kernel)
                for i, like in enumerate(types):
                    if like is not None:
                        args[i] = at(args[i], like)
                with torch._C.DisableTorchFunction():  # it is no part of the call
                    kernel.run(*args, grid=(x, y, z), warmup=False, **options)

            launcher = Launcher()
            launcher.launch = run
            return SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")

        return first

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)
    return started


@pytest.fixture
def replays(monkeypatch):
    """What has been replayed."""
    from attnzoo.ops.triton_replay import _Replay

    found, own = [], _Replay.__call__
    monkeypatch.setattr(_Replay, "__call__", lambda z, *args: (found.append(z), own(z, *args))[1])
    return found


def build(name, dtype=torch.float32, width=32, **options):
    torch.manual_seed(0)
    layer = attnzoo.build_attention(name, width, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    layer.fuse()
    return layer.eval().to(dtype)


def tokens(seed=1, batch=2, grid=GRID, dtype=torch.float32, width=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], width, generator=generator).to(dtype)


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sana", torch.float32),
        ("sla", torch.bfloat16),
        ("focused", torch.bfloat16),
        ("dydila", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_a_replay_gives_what_the_operators_give(
    name, dtype, by_address, replays, on_gpu, small_convolutions, monkeypatch
):
    layer, started = build(name, dtype), by_address

    def compare(x, grid=GRID, is_new=False):
        del replays[:]
        found = [layer(x, grid) for _ in range(3 if is_new else 1)][-1]
        assert replays
        with monkeypatch.context() as patch:
            patch.setattr(on_gpu, "_CAN_SKIP", False)
            wanted = layer(x, grid)
        assert torch.equal(found, wanted)
        return found

    first = compare(tokens(dtype=dtype), is_new=True)
    kept, count = first.clone(), len(started)
    assert count > 1
    # Other numbers at other addresses; what was returned stays as it is.
    second = compare(tokens(2, dtype=dtype))
    assert not torch.equal(first, second) and torch.equal(first, kept)
    assert len(started) == count + count // 2  # launched twice by address before
    compare(tokens(3, batch=1, grid=(1, 3), dtype=dtype), (1, 3), is_new=True)
    for parameter in layer.parameters():  # in place
        parameter.mul_(1.25)
    compare(tokens(dtype=dtype))
    moved = [parameter.data for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.data = parameter.data * 1.25
    compare(tokens(dtype=dtype))
    del moved
    if name != "sana":  # the rest is of replays, not of layers, and the interpreter is slow
        return
    # Rows with gaps, and addresses that 16 does not divide.
    wide = torch.cat([tokens(4, dtype=dtype), tokens(5, dtype=dtype)], -1)
    compare(wide[..., :32], is_new=True)
    odd = torch.zeros(2 * 6 * 32 + 1, dtype=dtype)[1:].view(2, 6, 32)
    compare(odd.copy_(tokens(6, dtype=dtype)))
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    layer.to(other)
    compare(tokens(dtype=other), is_new=True)
    layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        compare(tokens(dtype=torch.float32))
    compare(tokens(dtype=dtype))


@interpreted
@pytest.mark.parametrize(
    ("name", "options"),
    [("dydila", {}), ("dydila", {"num_heads": 2}), ("dydila-map", {"conv": "none"})],
)
@torch.no_grad()
def test_products_of_wide_heads_are_replayed(
    name, options, by_address, replays, on_gpu, small_convolutions, monkeypatch
):
    from attnzoo.ops.token_difference import triton

    monkeypatch.setattr(triton, "slower", lambda *_, **__: "yes")
    layer = build(name, **options)
    for seed in range(4):
        x = tokens(seed, 3)  # no other test's kind, for it would find this core
        found = layer(x, GRID)
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu, "_CAN_SKIP", False)
        assert torch.equal(found, layer(x, GRID))
    assert len(replays) == 2
    layer.config = dataclasses.replace(layer.config, impl="torch")
    torch.testing.assert_close(found, layer(x, GRID), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "width"),
    [(name, 32) for name in ("sana", "focused", "dydila", "dydila-map", "lit", "edit")]
    + [("dydila", 160), ("dydila-map", 160)],
)
@torch.no_grad()
def test_a_replay_on_a_gpu_gives_what_triton_gives(name, width, monkeypatch):
    from attnzoo.ops import triton_common

    layer = build(name, torch.bfloat16, width).cuda()
    x = tokens(dtype=torch.bfloat16, width=width).cuda()
    found = [layer(x, GRID).clone() for _ in range(4)]
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        out = layer(x, GRID)
    monkeypatch.setattr(triton_common, "_CAN_SKIP", False)
    wanted = layer(x, GRID)
    assert all(torch.equal(z, wanted) for z in found)
    x.copy_(tokens(2, dtype=torch.bfloat16, width=width))
    recorded.replay()
    assert torch.equal(out, layer(x, GRID)) and not torch.equal(out, wanted)


@interpreted
@torch.no_grad()
def test_operands_may_share_memory_or_not(by_address):
    from attnzoo.ops.linear_core.triton import linear_tokens

    packed = tokens().repeat(1, 1, 3)
    packed += torch.randn_like(packed)
    parts = packed.chunk(3, dim=-1)
    apart = [z.clone().repeat(1, 1, 3)[..., :32] for z in parts]  # strides as of the packed
    results = []
    for operands in (parts, apart, parts[::-1]):
        results.append([linear_tokens(*operands, 2, "relu") for _ in range(3)][-1])
    assert torch.equal(results[0], results[1])
    wanted = linear_tokens(*[z.contiguous() for z in parts[::-1]], 2, "relu")
    torch.testing.assert_close(results[2], wanted, rtol=0, atol=0)


@interpreted
@torch.no_grad()
def test_replays_hold_no_tensor(by_address):
    layer, x = build("sana"), tokens()
    out = [layer(x, GRID) for _ in range(3)][-1]
    held = [weakref.ref(z) for z in (x, out, *layer.parameters())]
    del layer, x, out
    gc.collect()
    assert [z() for z in held] == [None] * len(held)


@interpreted
@torch.no_grad()
def test_what_cannot_be_noted_is_called_always(by_address):
    from attnzoo.ops.triton_replay import replayed

    def writes(z, n):
        return torch.empty(4).copy_(z)

    def multiplies(z, n):
        return z @ z

    def shifts(z, n):
        return z.cos()[n:].contiguous()

    for function in (writes, multiplies, shifts):
        again = replayed(function)
        for seed in range(4):
            z = tokens(seed)[0, 0, :4]
            assert torch.equal(again(z.clone(), 1), function(z, 1))


@interpreted
@torch.no_grad()
def test_functions_of_pytorch_are_repeated_between_launches(by_address):
    from attnzoo.ops.triton_replay import replayed

    calls = []

    def mean(z, scale):
        calls.append(z)
        return z[1:].sum(0), None, z.to(torch.float64)

    again = replayed(mean)
    for seed in range(4):
        z = tokens(seed)[0]
        total, nothing, wide = again(z.clone(), 1.0)
        assert torch.equal(total, z[1:].sum(0)) and nothing is None
        assert torch.equal(wide, z.double())
    assert len(calls) == 2


@interpreted
@torch.no_grad()
def test_products_of_pytorch_read_what_kernels_write(by_address, replays, monkeypatch):
    from attnzoo.ops.triton_common import sample_sum
    from attnzoo.ops.triton_replay import replayed

    def product(z, w, n):
        first, last = sample_sum(z), sample_sum(z[:, 1:])  # (b, d), (b, d)
        wide = torch.bmm(first.unsqueeze(2), last.unsqueeze(1))
        return sample_sum(torch.bmm(wide[:, n:], w)[n:]), w.transpose(1, 2), None

    again, started, made = replayed(product), by_address, []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    kept = []
    for seed in range(5):
        whole = tokens(seed, 4)
        z, w = whole[1:3], tokens(seed + 9, 3, width=7).repeat(1, 6, 1)[1:, :32]
        del made[:]
        count = len(started)
        found, wanted = again(z, w, 1), product(z, w, 1)
        assert all(torch.equal(one, other) for one, other in zip(found[:2], wanted, strict=False))
        assert found[1].data_ptr() == w.data_ptr() and found[2] is None
        kept.append((found[0], wanted[0]))
    assert len(made) == 2 + 3  # one for the result, one for what lies between; by itself three
    assert len(started) == count + 6
    assert all(torch.equal(*pair) for pair in kept)  # no later call has written there
    assert len(replays) == 3
    odd = torch.zeros(z.numel() + 1)[1:].view(z.shape).copy_(z)  # 16 does not divide its address
    assert torch.equal(again(odd, w, 1)[0], wanted[0]) and len(replays) == 3


@interpreted
@torch.no_grad()
def test_what_only_kernels_need_is_freed_before_a_product(by_address, monkeypatch):
    from attnzoo.ops import triton_replay
    from attnzoo.ops.triton_common import sample_sum

    alive, made, empty = [], [], torch.empty

    def allocate(*sizes, **options):
        made.append(weakref.ref(z := empty(*sizes, **options)))
        return z

    def bmm(a, b):
        if torch.overrides.has_torch_function_unary(a):
            return torch.overrides.handle_torch_function(bmm, (a,), a, b)
        alive.append(sum(z() is not None for z in made))
        return a @ b

    monkeypatch.setattr(torch, "empty", allocate)
    again = triton_replay.replayed(lambda z: bmm(sample_sum(sample_sum(z)[:, None])[None], z))
    z = tokens(batch=1, grid=(1, 32))
    for _ in range(3):
        del made[:]
        out = again(z)
    torch.testing.assert_close(out, z.sum(1)[None] @ z)
    assert alive[-1] == 1 and len(made) == 2  # what the product reads, and what came before


@interpreted
@torch.no_grad()
def test_a_replay_is_of_one_device_and_of_one_autocast(by_address, monkeypatch):
    from attnzoo.ops import triton_replay

    calls = []
    again = triton_replay.replayed(lambda z: (calls.append(z), z.sum(0))[1])
    z = torch.ones(3, 2)
    for expected in (1, 2, 2):
        assert torch.equal(again(z), z.sum(0)) and len(calls) == expected
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind: True)
        for expected in (3, 4, 4):
            assert torch.equal(again(z), z.sum(0)) and len(calls) == expected
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)  # and tensors are on another
    for expected in (5, 6, 7):
        assert torch.equal(again(z), z.sum(0)) and len(calls) == expected


@interpreted
@torch.no_grad()
def test_sizes_that_change_always_are_not_stored_without_end(by_address, monkeypatch):
    from attnzoo.ops import triton_replay

    monkeypatch.setattr(triton_replay, "_MOST_REPLAYS", 3)
    calls = []
    again = triton_replay.replayed(lambda z: (calls.append(z), z.sum(0))[1])
    sizes = [1, 2, 3, 4, 1, 1, 1, 1]
    for n in sizes:
        assert torch.equal(again(torch.ones(n, 2)), torch.full((2,), float(n)))
    assert len(calls) == 6  # the fourth size made the others unknown


@interpreted
@torch.no_grad()
def test_an_adapter_around_a_projection_is_heard_by_the_kernels():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x) + x.repeat(1, 1, 3).roll(1, -1)

    layer, x = build("dydila", impl="triton"), tokens(batch=1, grid=(1, 2))
    plain = layer(x, (1, 2))
    layer.shared = Adapted(layer.shared)
    found = layer(x, (1, 2))
    layer.config = dataclasses.replace(layer.config, impl="torch")
    torch.testing.assert_close(found, layer(x, (1, 2)), rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 0.01


@interpreted
@pytest.mark.parametrize("way", ["hook", "replaced", "parametrized", "adapter", "conv"])
@torch.no_grad()
def test_a_replayed_layer_is_asked_anew_for_what_it_consists_of(
    way, by_address, replays, on_gpu, small_convolutions, monkeypatch
):
    layer, x, seen = build("dydila"), tokens(), []
    while not replays:  # by now, or by the test before
        plain = layer(x, GRID)
    router = layer.kernel_routers["query_prime"]
    if way == "hook":
        layer.conv.register_forward_hook(lambda _, __, out: (seen.append(out), 2 * out)[1])
    elif way == "replaced":
        router.weight = nn.Parameter(-router.weight)
        layer.gamma = nn.Parameter(layer.gamma + 1)
    elif way == "parametrized":
        nn.utils.parametrize.register_parametrization(router, "weight", nn.Softsign())
        nn.utils.parametrize.register_parametrization(layer.projectors, "key", nn.Softsign())
    elif way == "adapter":
        own = layer.shared.forward
        layer.shared.forward = lambda z: own(z) * 2
    else:
        layer.conv = build("dydila", conv="5x5").conv
    found = layer(x, GRID)
    assert not torch.equal(found, plain) and len(seen) == (way == "hook")
    with monkeypatch.context() as patch:
        patch.setattr(on_gpu, "_CAN_SKIP", False)
        assert torch.equal(found, layer(x, GRID))


def test_operators_that_are_replayed_launch_in_one_way_only():
    # A launch that is not noted would be left out of the replay.
    package = Path(attnzoo.__file__).parent / "ops"
    files = [path for path in package.rglob("*.py") if "replayed(" in path.read_text("utf-8")]
    assert len(files) > 3
    for path in files:
        assert not re.search(r"_kernel\[", path.read_text("utf-8")), path


# Calls of Python and of C in a forward: on the host of a GPU about a microsecond each, and half.
# One head of 160 leaves the core to PyTorch's products, which are not counted.
MOST_CALLS = {("sana", 32): 70, ("focused", 32): 80, ("dydila", 32): 95, ("dydila", 160): 95}


@compiled
@pytest.mark.parametrize(("name", "width"), MOST_CALLS)
@torch.no_grad()
def test_a_warm_forward_takes_few_calls(name, width, on_gpu, monkeypatch):
    from triton.runtime.jit import JITFunction

    from attnzoo.ops.token_difference import triton as difference

    monkeypatch.setattr(difference, "half_attention", lambda query, *_: query)
    started = SimpleNamespace(run=lambda *_: None, function=0, packed_metadata=0)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: started)
    monkeypatch.setattr(dispatch, "_try_native", lambda: False)
    layer, counts = build(name, torch.bfloat16, width), []
    x = tokens(dtype=torch.bfloat16, width=width)
    for _ in range(3):
        layer(x, GRID)
    sys.setprofile(lambda _, event, __: counts.append(event))
    try:
        layer(x, GRID)
    finally:
        sys.setprofile(None)
    calls = sum(event in ("call", "c_call") for event in counts)
    assert MOST_CALLS[name, width] / 2 < calls <= MOST_CALLS[name, width], calls


@compiled
@pytest.mark.parametrize("way", ["forward_hook", "pre_hook", "forward", "subclass"])
@torch.no_grad()
def test_projections_are_called_where_something_watches(way):
    from attnzoo.ops.dispatch import linear

    layer, x, seen = nn.Linear(4, 3), torch.randn(2, 4), []
    assert torch.equal(linear(layer, x), layer(x))
    if way == "forward_hook":
        layer.register_forward_hook(lambda *_: seen.append(1))
    elif way == "pre_hook":
        layer.register_forward_pre_hook(lambda *_: seen.append(1))
    elif way == "forward":
        own = layer.forward
        layer.forward = lambda z: (seen.append(1), own(z))[1]
    else:
        layer = type("Adapted", (nn.Linear,), {"forward": lambda self, z: seen.append(1) or z})(
            4, 3
        )
    assert torch.equal(linear(layer, x), layer(x))
    assert seen == [1, 1]


@interpreted
@pytest.mark.parametrize("name", ["dydila", "focused", "sana"])
def test_weights_that_a_replay_casts_are_cast_once(name, by_address):
    """Else a recording would repeat the casts: plain and replayed calls are seen alike."""
    torch.manual_seed(0)
    layer = attnzoo.build_attention(name, 96).eval()
    layer.fuse()
    x = torch.randn(2, 6, 96)

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return [layer(x, GRID) for _ in range(4)][-1]

    casts = CastWeights(layer, call)
    cast = {name for name, z in layer.named_parameters() if id(z) in casts.copies}
    kept = {name for name, _ in layer.named_parameters()} - cast
    assert not [name for name in kept if "router" in name or "projector" in name], kept
    wanted = call()
    with casts.in_place():
        assert torch.equal(call(), wanted)
