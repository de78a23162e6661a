"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import (  # noqa: F401
    agent,
    compressed,
    differential,
    dig,
    dydila,
    edit,
    focused,
    gated,
    lit,
    local,
    moh,
    sana,
    softmax,
)
