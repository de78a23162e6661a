"""attnzoo: interchangeable attention mechanisms for diffusion transformers."""

from attnzoo import mechanisms
from attnzoo.contract import (
    Attention,
    AttentionConfig,
    AttentionContext,
    auxiliary_loss,
    heads_of_width,
)
from attnzoo.errors import InvalidType, InvalidValue, UsageError
from attnzoo.registry import (
    build_attention,
    get_attention,
    import_mechanisms,
    list_attention,
    register_attention,
    source_of,
)

__version__ = "0.2.0"

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionContext",
    "InvalidType",
    "InvalidValue",
    "UsageError",
    "auxiliary_loss",
    "build_attention",
    "get_attention",
    "heads_of_width",
    "import_mechanisms",
    "list_attention",
    "mechanisms",
    "register_attention",
    "source_of",
]
