"""The text of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["html_to_text"]

_HIDDEN = {"script", "style", "template", "noscript", "title"}
_OF_HEAD = {*_HIDDEN, "html", "head", "base", "link", "meta"}
_BLOCKS = {
    "p",
    "div",
    "br",
    "li",
    "tr",
    "pre",
    "dt",
    "dd",
    "table",
    "section",
    "blockquote",
    "hr",
    *(f"h{n}" for n in range(1, 7)),
}


def html_to_text(page: str) -> str:
    """What a reader sees, one line per block; white space is kept in ``<pre>`` alone."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip("\n")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = self._preformatted = 0
        self._in_head = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "head":
            self._in_head = True
        elif tag == "body":
            self._show()
        elif tag not in _OF_HEAD and not self._hidden:  # HTML may leave out both the end of <head> and <body>
            self._in_head = False
        self._hidden += tag in _HIDDEN
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("body", "head"):
            self._show()
        elif tag in _HIDDEN and self._hidden:
            self._hidden -= 1
        if tag == "pre" and self._preformatted:
            self._preformatted -= 1
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden or (self._in_head and data.isspace()):
            return
        self._in_head = False
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def _show(self) -> None:
        """Leave the head; what was left open in it must not hide the page."""
        self._hidden, self._in_head = 0, False

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS and not self._hidden and self.parts and not self.parts[-1].endswith("\n\n"):
            self.parts.append("\n")
