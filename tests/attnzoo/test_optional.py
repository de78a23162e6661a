"""Optional packages in states that nobody foresaw: each is reported in one line."""

import subprocess
import sys
import textwrap

import pytest

FLASH = """
def flash_attn_func(q, k, v):
    assert q.shape[2] in (1, 2), q.shape  # (batch, n, heads, d)
    import torch
    heads = [z.transpose(1, 2) for z in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
"""
# What a package does while it is imported.
BROKEN = {
    "RuntimeError": "raise RuntimeError('made for another torch\\nand more')",
    "SystemExit": "raise SystemExit('no license')",
    "AttributeError": "import torch; torch.no_such_thing",
    "OSError": "raise OSError('libcudart.so.11.0: cannot open shared object file')",
    "ImportError": "from flash_attn.flash_attn_interface import flash_attn_gpu",
    "error without text": "raise Exception",
    "error that cannot be shown": """
class Bad(Exception):
    def __str__(self):
        raise KeyError
raise Bad
""",
    "empty": "",
}


SAID = {
    "RuntimeError": "made for another torch",
    "SystemExit": "no license",
    "AttributeError": "no_such_thing",
    "OSError": "libcudart",
}


def run(folder, code, *arguments):
    """What code prints, with what lies in ``folder`` installed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


ATTEND = """
    import sys, torch, attnzoo
    x = torch.randn(1, 16, 32)
    for name, impl in [pair.split("=") for pair in sys.argv[1:] if "=" in pair]:
        layer = attnzoo.build_attention(name, 32, num_heads=2, impl=impl)
        try:
            out = layer(x, (4, 4))
        except attnzoo.InvalidValue as error:
            assert isinstance(error, RuntimeError) and impl in str(error), error
            print(str(error))
        else:
            layer.config = type(layer.config)(impl="reference")
            torch.testing.assert_close(out, layer(x, (4, 4)))
            print("runs")
    if "table" in sys.argv:
        from attnzoo.command.doctor import backends
        backends()
"""


# Every state in half of the packages: they are imported in one place, whatever they do. Triton is
# in two only, because torch itself would not survive others for long.
@pytest.mark.parametrize(
    "states",
    [
        ("RuntimeError", "AttributeError", "OSError", "SystemExit"),
        ("SystemExit", "ImportError", "AttributeError", "RuntimeError"),
        ("OSError", "error without text", "error that cannot be shown"),
        ("empty", "error that cannot be shown", "error without text"),
        ("ImportError", "RuntimeError", "empty"),
    ],
    ids=" ".join,
)
def test_a_broken_package_is_one_line(states, tmp_path):
    broken = dict(zip(("flash_attn", "xformers", "fla", "triton"), states, strict=False))
    install(tmp_path, {f"{name}/__init__.py": BROKEN[state] for name, state in broken.items()})
    lines = run(tmp_path, ATTEND, "softmax=flash", "softmax=xformers", "gated=fla", "table")
    lines = lines.splitlines()
    assert all(line != "runs" for line in lines[:3]), lines
    for name, state in broken.items():
        [line] = [z for z in lines[3:] if z.startswith(f"  {name.removesuffix('_attn')} ")]
        assert "runs" not in line
        assert SAID.get(state, "") in line


@pytest.mark.parametrize("returned", ["out", "(out, None)"])
def test_flash_attn_4_serves_flash(returned, tmp_path):
    install(tmp_path, {"flash_attn/cute/__init__.py": f"{FLASH}    return {returned}\n"})
    said = run(tmp_path, ATTEND, "softmax=flash", "table")
    assert said.startswith("runs\n") and "  flash     runs\n" in said


def test_flash_attn_2_comes_before_4(tmp_path):
    wrong = "def flash_attn_func(*_): raise RuntimeError('4')"
    install(tmp_path, {"flash_attn/__init__.py": f"{FLASH}    return out\n"})
    install(tmp_path, {"flash_attn/cute/__init__.py": wrong})
    assert run(tmp_path, ATTEND, "softmax=flash").strip() == "runs"


def test_flash_attn_4_that_cannot_be_imported_is_named(tmp_path):
    install(tmp_path, {"flash_attn/cute/__init__.py": "import cutlass"})
    assert "No module named 'cutlass'" in run(tmp_path, ATTEND, "softmax=flash")


@pytest.mark.parametrize("failure", ["NotImplementedError('no operator')", "SystemExit(1)"])
def test_a_package_that_imports_and_fails_when_called(failure, tmp_path):
    kernel = f"(*_, **__): raise {failure}"
    install(
        tmp_path,
        {
            "flash_attn/__init__.py": f"def flash_attn_func{kernel}",
            "xformers/__init__.py": "",
            "xformers/ops.py": f"def memory_efficient_attention{kernel}",
            "fla/__init__.py": "",
            "fla/ops/__init__.py": "",
            "fla/ops/gla.py": f"def chunk_gla{kernel}",
        },
    )
    said = run(tmp_path, ATTEND, "softmax=flash", "softmax=xformers", "gated=fla").splitlines()
    assert len(said) == 3
    kind = failure.split("(")[0]
    assert all(kind in line or "no operator" in line for line in said[:2])
    assert "GPU" in said[2]


def test_a_fla_kernel_that_fails_is_one_line(monkeypatch):
    import torch

    from attnzoo import InvalidValue
    from attnzoo.ops.gated_scan import fla

    def broken(*_, **__):
        raise AttributeError("module 'triton.language' has no attribute 'core'")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(fla, "load", lambda *_: broken)
    z = torch.zeros(1, 1, 4, 4).as_subclass(OnGpu)
    with pytest.raises(InvalidValue, match=r"impl='fla' cannot run: AttributeError: module"):
        fla.gated_linear_attention(z, z, z, z)


@pytest.mark.parametrize("module", ["attnzoo", "backbones"])
def test_a_reader_that_stops_reading_sees_no_traceback(module):
    """The pipe is closed before anything is printed, so that the first write fails."""
    code = (
        "import runpy, sys; sys.argv = ['x']; sys.stdin.read(); "
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert not said, said


def test_the_table_prints_without_utf_8(module="attnzoo"):
    done = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        env={
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
    )
    assert done.returncode == 0, done.stderr


LONG = """
    import sys, torch, warnings
    from attnzoo.ops import dispatch
    from attnzoo.ops.softmax import flash, softmax_attention

    class OnGpu(torch.Tensor):
        is_cuda = True

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    real, torch.zeros = torch.zeros, lambda *size, device, **options: real(*size, **options)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 64, dtype=torch.bfloat16).as_subclass(OnGpu)
    flash._KEYS = 8
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        print(flash.is_faster(q, k, v))
    print(*[w.message for w in said])
    assert not flash.is_faster(q.float(), k, v)
    assert not flash.is_faster(q, k[:, :, :7], v[:, :, :7])
    assert not flash.is_faster(q, k, torch.cat([v, v], -1))
    assert not flash.is_faster(q, k, v.requires_grad_())
"""


def test_auto_takes_flash_attn_4_for_long_rows_without_a_gradient(tmp_path):
    install(tmp_path, {"flash_attn/cute/__init__.py": f"{FLASH}    return out, None\n"})
    assert run(tmp_path, LONG).split() == ["True"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ""),
        ({"flash_attn/__init__.py": f"{FLASH}    return out\n"}, ""),
        ({"flash_attn/cute/__init__.py": "import cutlass"}, "No module named 'cutlass'"),
        ({"flash_attn/cute/__init__.py": "raise SystemExit('no license')"}, "no license"),
    ],
)
def test_auto_stays_with_pytorch_where_flash_attn_4_does_not_run(files, said, tmp_path):
    install(tmp_path, files)
    verdict, _, warned = run(tmp_path, LONG).partition("\n")
    assert verdict == "False"
    assert said in warned and bool(warned.strip()) == bool(said)
