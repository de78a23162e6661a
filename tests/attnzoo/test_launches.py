"""A launch that skips Triton's preparation starts what Triton would have started."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, compiled",
)


class Kernel:
    """What Triton would compile, and what is started without it."""

    def __init__(self):
        self.prepared, self.started = [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.prepared.append(args)
            name = len(self.prepared)

            def run(*args):
                self.started.append((name, args))

            return SimpleNamespace(run=run, function=f"f{name}", packed_metadata=f"m{name}")

        return launch


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device_index = 0

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return self.device_index


def on_gpu(*shape, dtype=torch.float32, device=0, offset=0):
    # Allocations are aligned to 64 bytes.
    z = torch.zeros(4096, dtype=dtype)[offset:][:16].as_subclass(OnGPU)
    z.device_index = device
    return z


@pytest.fixture
def common(monkeypatch):
    from attnzoo.ops import triton_common

    monkeypatch.setattr(triton_common, "_COMPILED", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: 7 + d, raising=False)
    return triton_common


def test_a_second_launch_starts_what_was_compiled(common):
    kernel, x, y = Kernel(), on_gpu(), on_gpu(dtype=torch.bfloat16)
    for _ in range(3):
        common.launch_kernel(kernel, (4, 2), x, y, 5, 0.5, "ieee", num_warps=2)
    assert len(kernel.prepared) == 1
    pointers = x.data_ptr(), y.data_ptr()
    wanted = (4, 2, 1, 7, "f1", "m1", None, None, None, *pointers, 5, 0.5, "ieee")
    assert kernel.started == [(1, wanted)] * 2


@pytest.fixture
def launcher():
    """Triton's own of a kernel without scratch memory, which notes what it would call in C."""
    from triton.backends.nvidia.driver import CudaLauncher

    made = CudaLauncher.__new__(CudaLauncher)
    sizes = {f"{z}_scratch_{what}": 0 for z in ("global", "profile") for what in ("size", "align")}
    others = {"launch_cooperative_grid": False, "launch_pdl": True, "num_ctas": 1}
    told = {"arg_annotations": ["told"], "kernel_signature": b"told"}
    vars(made).update(sizes | others | told, launch=lambda *args: made.started.append(args))
    made.started = []
    return made


def test_what_skips_the_launcher_calls_what_it_would(common, launcher):
    class Compiled(Kernel):
        def __getitem__(self, grid):
            return lambda *_, **__: SimpleNamespace(
                run=launcher, function="f", packed_metadata="m"
            )

    kernel, x, y = Compiled(), on_gpu(), on_gpu(dtype=torch.bfloat16)
    for _ in range(2):
        common.launch_kernel(kernel, (4, 2), x, y, 5, "ieee")
    pointers = x.data_ptr(), y.data_ptr()
    launcher(4, 2, 1, 7, "f", "m", None, None, None, *pointers, 5, "ieee")
    assert launcher.started[0] == launcher.started[1] and len(launcher.started) == 2
    found = common._in_c(launcher, "f", "m")
    assert found[0] is launcher.launch
    launcher.global_scratch_size = 64  # which it allocates anew for every launch
    assert common._in_c(launcher, "f", "m")[0] is launcher


OTHERS = {
    "type": {"x": on_gpu(dtype=torch.bfloat16)},
    "address": {"x": on_gpu(offset=1)},
    "device": {"x": on_gpu(device=1), "y": on_gpu(device=1)},
    "number": {"n": 32},
    "one": {"n": 1},
    "true": {"n": True},
    "float": {"n": 1.0},
    "constant": {"kind": "tf32"},
    "option": {"num_warps": 8},
}


def test_whatever_triton_looks_at_is_looked_at(common):
    kernel, names = Kernel(), []

    def launch(x=on_gpu(), y=on_gpu(), n=5, kind="ieee", num_warps=4):  # noqa: B008
        common.launch_kernel(kernel, (1,), x, y, n, kind, num_warps=num_warps)

    for changed in ({}, *OTHERS.values()):
        before = len(kernel.prepared)
        launch(**changed)
        assert len(kernel.prepared) == before + 1, changed
        names.append(len(kernel.prepared))
    for name, changed in zip(names, ({}, *OTHERS.values()), strict=True):
        launch(**changed)
        assert kernel.started[-1][0] == name, changed
    assert len(kernel.prepared) == len(names)


def test_an_aligned_offset_is_no_other(common):
    kernel = Kernel()
    for offset in (0, 4, 8):
        common.launch_kernel(kernel, (1,), on_gpu(offset=offset), 3)
    assert len(kernel.prepared) == 1


def test_triton_launches_what_it_alone_can(common, monkeypatch):
    kernel, x = Kernel(), on_gpu()
    for _ in range(2):
        common.launch_kernel(kernel, (1,), torch.zeros(4), 3)
        common.launch_kernel(kernel, (1,), x, on_gpu(device=-1), 3)  # on the host
    assert len(kernel.prepared) == 4
    common.launch_kernel(kernel, (1,), x, 3)
    seen = kernel.prepared[-1]
    monkeypatch.setattr(common.triton.knobs.runtime.launch_enter_hook, "calls", [print])
    common.launch_kernel(kernel, (1,), x, 3)
    assert len(kernel.prepared) == 6 and kernel.prepared[-1] == seen and not kernel.started


def test_sizes_that_change_always_are_not_stored_without_end(common, monkeypatch):
    monkeypatch.setattr(common, "_MOST_COMPILED", 8)
    kernel, x = Kernel(), on_gpu()
    for n in range(40):
        common.launch_kernel(kernel, (1,), x, n)
        assert len(common._COMPILED) <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_those_of_triton(monkeypatch, dtype):
    from attnzoo.ops import triton_common
    from attnzoo.ops.linear_core import linear_tokens

    def results():
        found = []
        for offset in (0, 1, 8, 3):
            for n in (64, 65, 1, 128):
                torch.manual_seed(n + offset)
                flat = torch.randn(n * 192 + offset, device="cuda", dtype=dtype)
                z = flat[offset:].view(1, n, 192)
                found.append(linear_tokens(z, None, None, 2, "relu", impl="triton"))
        return found

    monkeypatch.setattr(triton_common, "_CAN_SKIP", False)
    wanted = results()
    monkeypatch.setattr(triton_common, "_CAN_SKIP", True)
    for _ in range(2):
        for one, other in zip(results(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
