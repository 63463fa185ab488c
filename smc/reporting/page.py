"""One self-contained HTML page: facts, tables and pictures, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO

from matplotlib.figure import Figure

__all__ = ["facts", "figure", "page", "png", "table"]


def page(title: str, *parts: str) -> str:
    """The page. `title` is text, the parts are HTML."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<title>{html.escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: 3px 10px; border-bottom: 1px solid #ddd; white-space: nowrap }}
.text {{ text-align: left }}
.small {{ font-size: 12px; color: #555 }}
.good {{ color: #176f2c }} .bad {{ color: #b00020; font-weight: bold }}
.wide {{ overflow-x: auto }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: 2px 16px }}
dd {{ margin: 0; overflow-wrap: anywhere }}
figure {{ margin: 2.5em 0 }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are, as text."""
    rows = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in values.items())
    return f"<dl>{rows}</dl>"


def table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text. `columns` gives each one's class: '' for numbers, 'text', 'text small'."""

    def line(cells: Sequence[str], kind: str) -> str:
        styles = (f' class="{style}"' if style else "" for style in columns.values())
        shown = (f"<{kind}{style}>{html.escape(cell)}</{kind}>" for cell, style in zip(cells, styles, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(list(columns), "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def figure(name: str, caption: str, image: bytes) -> str:
    """A PNG with what is to be said of it."""
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    alt = html.escape(name, quote=True)
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def png(drawn: Figure) -> bytes:
    """The figure as a file."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
