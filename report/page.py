# SPDX-License-Identifier: Apache-2.0
"""The HTML of a self-contained page: sections, tables and figures."""

import base64
import html
from collections.abc import Sequence

from report.canvas import Picture

CSS = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
body.wide{max-width:1700px}table{border-collapse:collapse;margin:1em 0}
th,td{padding:.3em .9em;text-align:left;vertical-align:top;border-bottom:1px solid #ddd;overflow-wrap:anywhere}
thead th{border-bottom:2px solid #888}td{font-variant-numeric:tabular-nums}td:first-child{min-width:11em}
.marked{background:#fff3d6}h2{margin-top:2em}h3{margin:.5em 0;font-size:1em}
.side{display:grid;gap:0 2em;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
figure{margin:1em 0 2em}img{max-width:100%}figcaption{color:#555;font-size:.92em;max-width:60em}
pre{background:#f5f5f5;padding:1em;overflow:auto}"""


def section(title: str, *parts: str) -> str:
    """Returns a heading with the parts below it, or nothing if they are empty."""
    body = "\n".join(filter(None, parts))
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def table(rows: Sequence[Sequence[str]], mark: bool = False) -> str:
    """Returns a table whose head is the first row, or nothing if no other row follows.

    `mark` highlights the rows whose cells differ, apart from the first and the last cell.
    """
    if len(rows) < 2:
        return ""
    head, *body = rows
    lines = [_row("td", row, mark and len(set(row[1:-1])) > 1) for row in body]
    return f"<table><thead>{_row('th', head)}</thead><tbody>{''.join(lines)}</tbody></table>"


def _row(tag: str, cells: Sequence[str], marked: bool = False) -> str:
    opening = '<tr class="marked">' if marked else "<tr>"
    return opening + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def figure(picture: Picture) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    caption = html.escape(picture.caption)
    return f'<figure><img alt="{picture.name}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def side_by_side(pictures: Sequence[tuple[str, Picture]]) -> str:
    """Returns labelled figures in columns."""
    cells = [f"<div><h3>{html.escape(label)}</h3>{figure(picture)}</div>" for label, picture in pictures]
    return f'<div class="side">{"".join(cells)}</div>'


def page(title: str, body: Sequence[str], wide: bool = False) -> bytes:
    title = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
    opening = '<body class="wide">' if wide else "<body>"
    lines = ["<!doctype html>", '<html lang="en">', head, f"{opening}<h1>{title}</h1>", *body, "</body></html>"]
    return "\n".join(filter(None, lines)).encode()
