"""The project's one color and one marker per mechanism, in every picture.

A mechanism's class states its own. The colors are Okabe and Ito's and Paul Tol's "muted", told
apart with every kind of color blindness; the markers say the same once more, for print in gray.
"""

from __future__ import annotations

import hashlib

from attnzoo import get_attention, list_attention
from backbones.pattern import canonical_pattern

# From https://jfly.uni-koeln.de/color/ and https://personal.sron.nl/~pault/.
_STYLES = {
    # What lies between Sana and DyDiLA in the paper's Table 4, and its Tables 5 and 6.
    "+focused kernel": ("#4A7BB7", "o"),
    "+dynamic measure kernel": ("#6EA6CD", "s"),
    "+dynamic projection module": ("#FEDA8B", "D"),
    "+token differential operator": ("#F67E4B", "^"),
    "map-wise, no convolution": ("#762A83", "v"),
    "increasing factors": ("#A50026", "P"),
}
# The paper's models, by the mechanism that each is built on.
_MODELS = {
    "DiT": "softmax",
    "DiG": "dig",
    "PixArt-Sigma": "compressed",
    "EDiT": "edit",
    "Sana": "sana",
    "DyDi-LiT": "dydila",
    "DyDi-LiT-map": "dydila-map",
    "MoH-DiT": "moh",
    "LiT": "lit",
    "+reparameterization": "dydila",
}
_OTHERS = ("#AA4499", "#661100", "#6699CC", "#AA7744", "#777777", "#4B6A53", "#B0547A", "#5D5FA6")
_MARKERS = "osD^vP*X<>phd"


def color_of(name: str) -> str:
    """The color of a mechanism, of a model of the paper, or of any other name, as "#RRGGBB".

    Args:
        name: "sana", "DyDi-LiT", "DyDi-LiT-S/2", or another name, such as a pattern's, whose
            color depends on the name alone.
    """
    return _style(name)[0]


def marker_of(name: str) -> str:
    """The matplotlib marker of a name; see ``color_of``."""
    return _style(name)[1]


def _style(name: str) -> tuple[str, str]:
    name = _mechanism(name)
    if name in _STYLES:
        return _STYLES[name]
    if name in list_attention() and (style := get_attention(name).plot_style):
        return style
    number = _number(name)
    return _OTHERS[number % len(_OTHERS)], _MARKERS[number % len(_MARKERS)]


def _mechanism(name: str) -> str:
    model, dash, size = name.rpartition("-")
    if dash and "/" in size:
        name = model
    return _MODELS.get(name, canonical_pattern(name))


def _number(name: str) -> int:
    # Python's own hash of a string differs from process to process.
    return hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=1).digest()[0]
