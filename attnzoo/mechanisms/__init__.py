"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import (  # noqa: F401
    agent,
    compressed,
    differential,
    dig,
    dydila,
    edit,
    efficient,
    fixation,
    focused,
    gated,
    linfusion,
    lit,
    mala,
    mhla,
    moh,
    rala,
    sana,
    softmax,
)
