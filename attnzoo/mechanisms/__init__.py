"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import (
    agent,
    compressed,
    differential,
    dig,
    dydila,
    edit,
    focused,
    gated,
    lit,
    moh,
    sana,
    softmax,
)

__all__ = [
    "agent",
    "compressed",
    "differential",
    "dig",
    "dydila",
    "edit",
    "focused",
    "gated",
    "lit",
    "moh",
    "sana",
    "softmax",
]
