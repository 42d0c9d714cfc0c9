"""One self-contained HTML page from the report's Markdown: pictures inside, no scripts, no network; for phones and dark rooms too."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["render_page"]

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--quiet:#666;--line:#ddd;--code:#f3f3f3}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181b;--quiet:#9a9a9a;--line:#3a3d42;--code:#24272c}}
body{font:16px/1.55 system-ui,sans-serif;max-width:58rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2.4rem}h3{font-size:1rem}
img{max-width:100%;height:auto;background:#fff;border-radius:4px}em{color:var(--quiet)}
code{font:.85em ui-monospace,monospace;background:var(--code);padding:.05rem .25rem;border-radius:3px;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;text-align:left;font-variant-numeric:tabular-nums}
"""


def render_page(markdown: Callable[[Callable[[Path], str]], str]) -> str:
    """The page.

    Args:
        markdown: gives the text, told how to refer to a picture (``Report.markdown``); its first heading is the title.
    """
    pictures: dict[str, Path] = {}

    def link(path: Path) -> str:
        pictures[name := f"picture-{len(pictures)}.png"] = path
        return name

    text = markdown(link)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    title = re.sub(r"\\(.)", r"\1", text.splitlines()[0].removeprefix("# "))  # without Markdown's escapes
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
