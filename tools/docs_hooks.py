"""For mkdocs: what this project's pages and docstrings need to become a site.

Links from a page to a file outside docs/ become its name, for the site does not hold it. Docstrings put several arguments on one line
(``x: what it is. y: another.``); as a griffe extension, this file makes lists of them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:[ \t]+.*\n?)+)", re.MULTILINE)
ITEM = re.compile(r"(?:^|(?<=[.;)]) )(\*{0,2}\w+(?:, \*{0,2}\w+)*): ")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for the text of every page."""
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2].removeprefix('../')}`)", markdown)


def as_list(section: re.Match[str]) -> str:
    """A section of a docstring as Markdown."""
    text = " ".join(section[2].split())
    parts = ITEM.split(text)
    items = [f"- `{name}`: {what.strip()}" for name, what in zip(parts[1::2], parts[2::2])]
    if parts[0].strip():
        items.insert(0, parts[0].strip() + ("\n" if items else ""))
    return f"**{section[1]}**\n\n" + "\n".join(items) + "\n\n"


class Docstrings(Extension):
    """Rewrites every docstring's sections."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = SECTION.sub(as_list, obj.docstring.value + "\n").rstrip()
