"""What the processes of a suite on a GPU need, imported once before they are forked.

Whoever asks CUDA how many GPUs there are breaks it in all later forks of the process, and
libraries ask when they are imported. Here they get the answer without CUDA being asked: this
module is imported only where there is a GPU.
"""

import contextlib
from unittest import mock

import torch

with (
    mock.patch.object(torch.cuda, "is_available", return_value=True),
    mock.patch.object(torch.cuda, "device_count", return_value=1),
):
    import bench.worker  # noqa: F401

    with contextlib.suppress(Exception):  # of whatever state Triton is in; who needs it finds out
        import attnzoo.ops.token_difference.triton  # noqa: F401 - Triton
