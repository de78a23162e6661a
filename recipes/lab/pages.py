"""Pages of HTML and of Markdown: a common look, and what users name is text in all of them."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from recipes.lab.console import one_line

# Charts stay on white, which a dark page dims: turned over, their light colors would be lost.
_STYLE = """:root{color-scheme:light dark;--line:#ddd;--head:#f4f4f4;--bad:#a50026;--soft:#555}
@media (prefers-color-scheme:dark){:root{--line:#444;--head:#2b2b30;--bad:#ff8a80;--soft:#aaa}
img{filter:brightness(.85)}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;
overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto;margin:.6em 0;
overflow-wrap:normal}
td,th{padding:3px 6px;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left;white-space:nowrap}
th{background:var(--head);vertical-align:bottom}
img{max-width:100%;background:#fff}td img{max-width:none;vertical-align:middle}
code{background:var(--head)}.bad{color:var(--bad)}
figure{margin:1.5em 0}figcaption{color:var(--soft)}"""
# Should a name ever escape its quotes, nothing of it runs or is fetched.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, body: str) -> str:
    """One HTML file that needs no other, for light and dark screens.

    Args:
        title: Of the window; any text.
        body: HTML, in which every text has gone through ``html_text``.
    """
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv="
        f'"Content-Security-Policy" content="{_POLICY}"><meta name=viewport content="width='
        f'device-width"><title>{html_text(title)}</title><style>{_STYLE}</style>'
        f"<body>{body}</body></html>\n"
    )


def html_text(value: Any) -> str:
    """Text that HTML shows as it is, also inside an attribute; "" where there is none."""
    if isinstance(value, float):
        value = f"{value:.4g}" if value == value else None
    return "" if value is None else html.escape(one_line(str(value)))


def html_paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, of a class of the style sheet if given."""
    return f"<p{f' class={kind}' if kind else ''}>{html_text(text)}</p>"


def html_table(headings: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table of plain values."""
    # Long names of metrics may be broken before their extractor.
    head = "".join(f"<th>{html_text(name).replace('[', '<wbr>[')}</th>" for name in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{html_text(value)}</td>' for value in row)}</tr>" for row in rows
    ).replace("± ", "±&nbsp;")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_image(png: bytes, alternative: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html_text(alternative)}" src="data:image/png;base64,{data}">'


def markdown_text(value: Any) -> str:
    """Text that Markdown shows as it is, also inside a table; keeps line breaks."""
    if value is None or value != value:
        return ""
    lines = [html.escape(one_line(line), quote=False) for line in str(value).split("\n")]
    return "<br>".join(re.sub(r"([|`\\*])|(?<=\])(\()", r"\\\g<0>", line) for line in lines)


def markdown_table(
    headings: Iterable[Any], rows: Iterable[Sequence[Any]], padded: bool = False
) -> str:
    """A table of plain values.

    Args:
        headings: Of the columns.
        rows: As long as the headings.
        padded: Whether columns have one width, to be read as text too.
    """
    lines = [[markdown_text(value) for value in row] for row in (list(headings), *rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]
    shown = [
        f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |"
        for line in lines
    ]
    rule = "|".join("-" * (width + 2 if padded else 3) for width in widths)
    return "\n".join([shown[0], f"|{rule}|", *shown[1:]])
