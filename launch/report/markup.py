"""Text as HTML that does nothing but show: escaped, cut to a length, and with every character made visible that could
hide or reorder what is around it.

`Markup` is a string that is HTML already; everything else that goes into a page is text and is escaped. Models write
whatever they like, so terminal escapes, null bytes, bidirectional overrides and halves of surrogate pairs are replaced
by what names them (https://www.unicode.org/reports/tr36/, https://trojansource.codes).

Example::

    tag("p", "1 < 2", class_="note")                  # Markup('<p class="note">1 &lt; 2</p>')
    visible("a\\x1b[31mb\\u202e")                        # 'a␛[31mb⟨U+202E⟩'
    clipped("x" * 2_000_000, 1000)                    # 1000 characters and how many more there are
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

ELLIPSIS = "…"


class Markup(str):
    """HTML that was made here."""

    __slots__ = ()


Text = str | Markup
"""What may be put into a tag: `Markup` goes as it is, any other string is escaped."""

_UNSEEN = re.compile(
    # controls but tab and newline; bidi marks, embeddings, overrides and isolates; zero-width characters but the
    # joiners that scripts need; separators that are line ends to some; tags; interlinear marks; halves of pairs
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """`text` without characters that cannot be seen: each is replaced by a sign or its code point."""
    text = text.replace("\r\n", "\n")
    return _UNSEEN.sub(_named, text)


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters of it, and a note of how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}{ELLIPSIS} ({len(text) - limit:,} more characters)"


def html(text: object) -> Markup:
    """Escaped, unless it is `Markup`."""
    return text if isinstance(text, Markup) else Markup(escape(visible(str(text))))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. `class_` is `class`, other underscores are hyphens; None and False leave an attribute out, True is
    one without a value."""
    return Markup(f"<{name}{_attributes(attributes)}>{''.join(html(each) for each in content)}</{name}>")


def void(name: str, **attributes: object) -> Markup:
    """An element without content, closed in itself, as SVG's shapes are."""
    return Markup(f"<{name}{_attributes(attributes)}/>")


def joined(parts: Iterable[object], by: str = "") -> Markup:
    return Markup(by.join(html(each) for each in parts))


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[int] = (), class_: str | None = None
) -> Markup:
    """`numeric`: columns that are set to the right. It scrolls by itself where the page is narrow."""
    right = set(numeric)

    def cells(name: str, values: Sequence[object]) -> Markup:
        return joined(tag(name, value, class_="n" if i in right else None) for i, value in enumerate(values))

    body = joined(tag("tr", cells("td", row)) for row in rows)
    whole = tag("table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body), class_=class_)
    return tag("div", whole, class_="wide", tabindex="0", role="region", aria_label=", ".join(head[:3]))


def details(summary: object, *content: object, opened: bool = False, class_: str | None = None) -> Markup:
    return tag("details", tag("summary", summary), *content, open=opened, class_=class_)


def _attributes(attributes: dict[str, object]) -> str:
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{escape(visible(str(value)))}"')
    return "".join(parts)


def _named(match: re.Match[str]) -> str:
    character = match.group()
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
