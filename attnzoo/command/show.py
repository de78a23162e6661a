"""``attnzoo show NAME``: what a mechanism is, its options, its cost, and what runs here."""

from __future__ import annotations

import dataclasses
import inspect
import io
import shlex
import sys
import textwrap
import tokenize
import typing
import warnings

import attnzoo
from attnzoo.command import Parser, add_import_flag
from attnzoo.command.doctor import here, in_short, why_not
from attnzoo.command.listing import DIM, GRIDS, source_of_class, summary
from attnzoo.console import aligned
from attnzoo.contract import Attention, alternatives, as_tuples, stated_parts, words_of
from attnzoo.registry import offered

WIDTH = 96


def main(arguments: list[str]) -> None:
    """Prints a mechanism."""
    parser = Parser("attnzoo show", description=__doc__)
    parser.add_argument("name", help="of attnzoo list")
    add_import_flag(parser)
    given = parser.parse_args(arguments)
    for source in given.imports:
        attnzoo.import_mechanisms(source)
    cls = attnzoo.get_attention(given.name)
    paper, link = source_of_class(cls)
    print(f"{given.name}: {summary(cls)}".removesuffix(": ") + "\n")
    if paper:
        print(f"from {paper}{f', {link}' if link else ''}")
    if origin := attnzoo.source_of(given.name):
        print(f"registered by {origin}")
    if said := inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""):
        print(f"\n{said}")
    growth = f"core grows as {cls.complexity}; " if cls.complexity else ""
    print(f"\n{growth}one layer of width {DIM}, per sample, MMACs:")
    print(textwrap.indent(cost(given.name), "  "))
    print(f"\noptions, as build_attention({given.name!r}, dim, ...) or --set takes them:")
    print(options(cls) or "  none")
    print(f"\nwhat runs here, called once on {here()[0]}:")
    for impl, reason in implementations(given.name):
        print(f"  {impl:9}  {in_short(reason)}")
    if not origin and given.name not in offered():
        page = given.name.removesuffix("-map")
        print(f"\nits page in the repository: docs/mechanisms/{page}.md")


def cost(name: str) -> str:
    """Multiply-accumulates by part at two sizes, as a table."""
    cls = attnzoo.get_attention(name)
    if cls.macs_parts is Attention.macs_parts:
        origin = None if name in offered() else attnzoo.source_of(name)
        more = f" --import {shlex.quote(origin)}" if origin else ""
        return f"no closed form is stated; attnzoo count --attn {name}{more} measures it"
    layer = attnzoo.build_attention(name, DIM)
    counted = [stated_parts(layer, grid) for grid in GRIDS]
    heading = ["tokens", *(f"{height}x{width}" for height, width in GRIDS)]
    rows = [heading]
    for part in counted[0]:
        rows.append([part, *(f"{parts[part] / 1e6:,.2f}" for parts in counted)])
    rows.append(["all", *(f"{sum(parts.values()) / 1e6:,.2f}" for parts in counted)])
    return aligned(rows)


def options(cls: type[Attention]) -> str:
    """Every option with its default, its values, and the reason that its code gives."""
    hints = typing.get_type_hints(cls.Config)
    reasons: dict[str, str] = {}
    for owner in reversed(cls.Config.__mro__):
        reasons |= {name: text for name, text in _comments(owner).items() if text}
    lines = []
    for field in dataclasses.fields(cls.Config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = as_tuples(default, in_words=True)  # as it is taken
        has_none = default is dataclasses.MISSING
        lines.append(f"  {field.name}{', to be given' if has_none else f' = {default!r}'}")
        values = _values(hints[field.name])
        for text in (reasons.get(field.name, ""), f"takes {values}" if values else ""):
            lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _values(hint: object) -> str:
    """The words that an option takes, and what else beside them."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    others = [getattr(kind, "__name__", str(kind)) for kind in kinds if not words_of(kind)]
    words = ", ".join(map(repr, dict.fromkeys(z for kind in kinds for z in words_of(kind))))
    return f"{' or '.join(others)}, or {words}" if others and words else words


def _comments(owner: type) -> dict[str, str]:
    """By field, the comment beside it or in the lines above it."""
    if "__annotations__" not in vars(owner):
        return {}
    try:
        code = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):  # made without a file
        return {}
    found: dict[str, str] = {}
    above: list[str] = []
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT:
            continue
        text, line = token.string.lstrip("# ").strip(), lines[token.start[0] - 1].strip()
        if text.startswith("fmt:"):
            continue
        if line.startswith("#"):
            above.append(text)
            following = lines[token.start[0]].strip() if token.start[0] < len(lines) else ""
            if following.startswith("#"):
                continue
            name, text = following.partition(":")[0], " ".join(above)
        else:
            name = line.partition(":")[0]
            # A comment above a field goes with it, and so does the one beside it.
            text = f"{found[name]} {text}" if name in found else text
        above = []
        if name in vars(owner)["__annotations__"]:
            found[name] = text
    return found


def implementations(name: str) -> list[tuple[str, str | None]]:
    """Each value of ``impl``, and why it does not run here or None."""
    hint = typing.get_type_hints(attnzoo.get_attention(name).Config).get("impl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hint is None:
            return [("auto", why_not(name, None))]
        return [(impl, why_not(name, impl)) for impl in typing.get_args(hint)]
