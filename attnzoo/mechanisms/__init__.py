"""The mechanisms, one file each; importing this package registers them all."""

from attnzoo.mechanisms import (  # noqa: F401
    agent,
    compressed,
    conv,
    differential,
    dig,
    dydila,
    edit,
    focused,
    gated,
    linformer,
    lit,
    local,
    moh,
    pvt,
    sana,
    softmax,
)
