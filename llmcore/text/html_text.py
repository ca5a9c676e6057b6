"""Text out of HTML pages: of a whole page, or of each element that has an id."""

import re
from html.parser import HTMLParser

_SILENT = {"script", "style", "head", "nav", "title"}
_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source",
          "track", "wbr"}  # fmt: skip
_LINES = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre"}


def page_text(page: str) -> str:
    """What a reader sees of the page, a line for each paragraph."""
    parser = _Reader()
    parser.feed(page)
    lines = ("".join(parser.text).replace("\xa0", " ")).split("\n")
    return "\n".join(line for line in (_one_line(line) for line in lines) if line)


def texts_by_id(page: str, pattern: str) -> dict[str, str]:
    """The text, on one line, of each paragraph or heading whose id matches the pattern whole.

    Elements inside of one that matches belong to its text; those that are hidden don't.
    """
    parser = _Reader(re.compile(pattern))
    parser.feed(page)
    found = ((name, _one_line("".join(parts))) for name, parts in parser.by_id.items())
    return {name: text for name, text in found if text}


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Reader(HTMLParser):
    """Collects the text outside of silent and hidden elements."""

    def __init__(self, wanted: re.Pattern[str] | None = None) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.by_id: dict[str, list[str]] = {}
        self._wanted = wanted
        self._open: list[tuple[str, bool]] = []  # the element, and whether it silences
        self._silent = 0
        self._current: tuple[str, int] | None = None  # id, and how deep its element stands

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _LINES:
            self._break()
        if tag in _EMPTY:
            return
        attributes = dict(attrs)
        silences = tag in _SILENT or "hidden" in attributes
        self._open.append((tag, silences))
        self._silent += silences
        name = attributes.get("id")
        if self._wanted and self._current is None and name and self._wanted.fullmatch(name):
            self._current = name, len(self._open)
            self.by_id[name] = []

    def handle_endtag(self, tag: str) -> None:
        if all(tag != name for name, _ in self._open):
            return  # closes what was never opened
        while True:
            name, silences = self._open.pop()
            self._silent -= silences
            if self._current is not None and len(self._open) < self._current[1]:
                self._current = None
            if name == tag:
                break
        if tag in _LINES:
            self._break()

    def _break(self) -> None:
        self.text.append("\n")
        if self._current is not None:
            self.by_id[self._current[0]].append(" ")

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.text.append(data.replace("\n", " "))
        if self._current is not None:
            self.by_id[self._current[0]].append(data)
