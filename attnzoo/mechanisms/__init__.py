"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import (  # noqa: F401
    agent,
    compressed,
    deltanet,
    differential,
    dig,
    dydila,
    edit,
    focused,
    gated,
    lit,
    moh,
    sana,
    sla,
    softmax,
    ttt,
)
