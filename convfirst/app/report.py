"""Reports: Markdown from tables and pictures, and the same as one HTML file that holds its pictures."""

import base64
import html
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convfirst.training.checkpoint import write_atomically

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 0.2em; }
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers get three significant digits, None a dash."""
    lines = [headings, ["---"] * len(headings), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell: 1234.5 -> "1,234" (rounded half to even), 0.12345 -> "0.123", None -> a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def figure(picture: Path, folder: Path, caption: str) -> str:
    """A picture in a report that will stand in ``folder``."""
    return f"![{caption}]({Path(os.path.relpath(picture, folder)).as_posix()})"


def write_report(parts: Iterable[str], folder: Path, name: str) -> Path:
    """Write the parts as ``folder/name.md`` and as ``name.html``; return the first."""
    from markdown_it import MarkdownIt  # of the extra `analysis`

    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    body = MarkdownIt("commonmark").enable("table").render(text)
    page = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
    page += f"<style>{_STYLE}</style></head>\n<body>\n{_inline_pictures(body, folder)}</body></html>\n"
    for suffix, content in ((".html", page), (".md", text)):
        write_atomically(folder / f"{name}{suffix}", lambda file, content=content: file.write(content.encode()))
    return folder / f"{name}.md"


def _inline_pictures(body: str, folder: Path) -> str:
    def embed(match: re.Match) -> str:
        data = base64.b64encode((folder / html.unescape(match[1])).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}"'

    return re.sub(r'<img src="([^"]+\.png)"', embed, body)
