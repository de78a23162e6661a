"""Both by PyTorch's operators, which the reference is already."""

from attnzoo.ops.windows.reference import from_windows, to_windows

__all__ = ["from_windows", "to_windows"]
