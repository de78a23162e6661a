"""The project's one color and one marker per mechanism, in every picture.

The colors are Okabe and Ito's and Paul Tol's "muted", told apart with every kind of color
blindness; the markers say the same once more, for print in gray.
"""

from __future__ import annotations

import hashlib

# From https://jfly.uni-koeln.de/color/ and https://personal.sron.nl/~pault/.
_COLORS = {
    "softmax": "#000000",
    "sana": "#0072B2",
    "dydila": "#D55E00",
    "dydila-map": "#CC79A7",
    "focused": "#56B4E9",
    "gated": "#E69F00",
    "compressed": "#009E73",
    "agent": "#332288",
    "differential": "#DDCC77",
    "dig": "#882255",
    "edit": "#999933",
    "lit": "#44AA99",
    "moh": "#117733",
    # What lies between Sana and DyDiLA in the paper's Table 4, and its Tables 5 and 6.
    "+focused kernel": "#4A7BB7",
    "+dynamic measure kernel": "#6EA6CD",
    "+dynamic projection module": "#FEDA8B",
    "+token differential operator": "#F67E4B",
    "map-wise, no convolution": "#762A83",
    "increasing factors": "#A50026",
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
        name: "sana", "DyDi-LiT", "DyDi-LiT-S/2", or a name that a user registered, whose color
            depends on the name alone.
    """
    name = _mechanism(name)
    return _COLORS[name] if name in _COLORS else _OTHERS[_number(name) % len(_OTHERS)]


def marker_of(name: str) -> str:
    """The matplotlib marker of a name; see ``color_of``."""
    name = _mechanism(name)
    number = list(_COLORS).index(name) if name in _COLORS else _number(name)
    return _MARKERS[number % len(_MARKERS)]


def _mechanism(name: str) -> str:
    model, dash, size = name.rpartition("-")
    if dash and "/" in size:
        name = model
    return _MODELS.get(name, name)


def _number(name: str) -> int:
    # Python's own hash of a string differs from process to process.
    return hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=1).digest()[0]
