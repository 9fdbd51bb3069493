"""The report's own sentences and tables as HTML."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup


def html(markdown: str, places: Collection[str] = ()) -> Markup:
    """A section of the report without its heading and pictures.

    places: addresses that a link may lead to here, such as `#latents` or `results.csv`; of others only the words stay.
    """
    tokens = _parser().parse(re.sub(r"\A\s*## .*\n", "", markdown).replace("<br>", " "))
    for token in tokens:
        if token.type == "inline" and token.children:
            token.children = _kept(token.children, places)
        if token.type == "heading_open" or token.type == "heading_close":
            token.tag = f"h{min(6, int(token.tag[1:]) + 1)}" if token.tag != "h2" else "h3"
    shown = _parser().renderer.render(tokens, _parser().options, {})
    box = '<div class="scroller" tabindex="0" role="group" aria-label="Table"><table>'
    return Markup(shown.replace("<table>", box).replace("</table>", "</table></div>"))


def title(markdown: str) -> str:
    """The heading of a section; empty where it has none."""
    found = re.match(r"\s*## (.*)", markdown)
    return found[1] if found else ""


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _kept(tokens: list[Token], places: Collection[str]) -> list[Token]:
    kept, opened = [], []
    for token in tokens:
        if token.type == "image":
            continue
        if token.type == "link_open":
            opened.append(token.attrGet("href") in places)
        if token.type in ("link_open", "link_close") and not opened[-1]:
            if token.type == "link_close":
                opened.pop()
            continue
        if token.type == "link_close":
            opened.pop()
        kept.append(token)
    return kept
