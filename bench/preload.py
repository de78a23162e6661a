"""What the processes of a suite on a GPU need, imported once before they are forked.

Libraries ask for GPUs when they are imported, which must not start CUDA: ``isolate`` says how.
"""

import contextlib

import bench.worker  # noqa: F401

with contextlib.suppress(Exception):  # of whatever state Triton is in; who needs it finds out
    import attnzoo.ops.token_difference.triton  # noqa: F401 - Triton
