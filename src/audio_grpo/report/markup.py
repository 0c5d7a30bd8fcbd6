"""Markup whose text is escaped by construction."""

import re
from html import escape


class Html(str):
    """Markup that goes into a page as it is; every plain `str` is escaped on its way in."""

    __slots__ = ()


Content = str | None
"""Text to escape, finished markup, or nothing."""


def tag(name: str, /, *children: Content, **attributes: str | float | bool | None) -> Html:
    """An element, e.g. `tag("p", "1 < 2", class_="note", data_step=3)` is `<p class="note" data-step="3">1 &lt; 2</p>`.

    An attribute that is None or False is left out, one that is True has no value.
    """
    words = [_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False]
    return Html(f"<{' '.join([name, *words])}>{join(*children)}</{name}>")


def join(*children: Content) -> Html:
    """Pieces of a page one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def breakable(name: str) -> Html:
    """A long name that may go on in a new line after "/", "_", ":" and "."."""
    first, *others = re.split(r"(?<=[/_:.])", name)
    return join(first, *(join(Html("<wbr>"), part) for part in others))


def table(head: list[Content], rows: list[list[Content]], *, text_columns: int = 1) -> Html:
    """A table that scrolls sideways where it is too wide; columns after the first `text_columns` are numbers."""

    def row(cells: list[Content], cell_name: str) -> Html:
        classes = [None if column < text_columns else "number" for column in range(len(cells))]
        return tag("tr", *(tag(cell_name, cell, class_=kind) for cell, kind in zip(cells, classes, strict=True)))

    body = tag("tbody", *(row(cells, "td") for cells in rows))
    return tag("div", tag("table", tag("thead", row(head, "th")), body), class_="scroll")


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return name if value is True else f'{name}="{escape(str(value))}"'
