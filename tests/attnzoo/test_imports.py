"""attnzoo works with every optional package out of reach."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path


def _run(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_attnzoo_needs_nothing_but_torch_and_einops():
    _run("""
        import sys
        blocked = ["diffusers", "xformers", "flash_attn", "fla", "triton", "transformers",
                   "accelerate", "fvcore", "numpy.testing_blocked", "pandas", "matplotlib",
                   "torchvision", "timm", "sklearn"]
        for name in blocked:
            sys.modules[name] = None
        import torch, attnzoo, attnzoo.testing
        for name in attnzoo.list_attention():
            layer = attnzoo.build_attention(name, 32)
            assert layer(torch.randn(1, 16, 32), (4, 4)).shape == (1, 16, 32)
    """)


def test_nothing_optional_is_imported_unasked():
    _run("""
        import sys
        import attnzoo, backbones
        loaded = {"xformers", "flash_attn", "fla", "timm", "torchvision", "fvcore"}
        assert not loaded & set(sys.modules), loaded & set(sys.modules)
    """)


def test_every_package_is_installed():
    """An editable install would find one that pyproject.toml forgot; a user's would not."""
    root = Path(__file__).parents[2]
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for name in ("attnzoo", "backbones")
        for init in (root / name).rglob("__init__.py")
    }
    listed = re.search(r"packages = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.DOTALL)
    assert found == set(re.findall(r'"([\w.]+)"', listed[1]))
