"""What the site needs beyond plain Markdown, so that the pages can stay plain.

CONTRIBUTING.md and CHANGELOG.md become pages; links to files outside docs/ lead there, or to the
repository's address; lists and folded parts get the form that Python-Markdown reads.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Files of the repository's root, and the pages of the site that show them.
SHOWN = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
         "README.md": "index.md"}  # fmt: skip
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of files in the repository's root."""
    for name, page in SHOWN.items():
        if not (ROOT / "docs" / page).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links for the site; nested lists by four spaces; Markdown inside folded parts."""
    shown = {page_path: name for name, page_path in SHOWN.items() if name != "README.md"}
    here = posixpath.dirname(shown.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    start = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        inside = SHOWN.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside) and (path in SHOWN or path.startswith("docs/")):
            return f"[{text}]({posixpath.relpath(inside, start or '.')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # mkdocs warns
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    markdown = _LINK.sub(link, markdown)
    markdown = re.sub(r"^  (?=[-*] )", "    ", markdown, flags=re.MULTILINE)
    # A figure with its spread stays on one line, however narrow its column is.
    markdown = re.sub(r"(?<=[✓✗~]) (?=[+-]\d)| (?=± )|(?<=±) ", "\N{NO-BREAK SPACE}", markdown)
    return markdown.replace("<details>", '<details markdown="1">')
