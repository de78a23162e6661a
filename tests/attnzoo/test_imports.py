"""attnzoo works with every optional package out of reach."""

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


def test_every_folder_of_code_is_a_package():
    """The wheel takes packages alone; an editable install would find the others too."""
    root = Path(__file__).parents[2]
    folders = {
        file.parent for name in ("attnzoo", "backbones") for file in (root / name).rglob("*.py")
    }
    assert len(folders) > 30
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
