"""Text of models as HTML that can only be read: escaped, with what is invisible or turns the line made visible.

Control characters (NUL, ANSI's escape, bidirectional overrides, zero-width signs, soft hyphens) stand as their names,
so no text can reorder or hide what is beside it. What is very long is cut, and says how long it was; what was looked
for is marked. Everything returns `markupsafe.Markup`.

Example::

    plain("<b>\\u202e", None).html        # '&lt;b&gt;<span class="ctl" title="...">U+202E</span>'
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from markupsafe import Markup, escape

SHOWN_CHARACTERS = 20_000
"""Of one text; the whole can be fetched as a file of its own."""
_HIGHLIGHTED_CHARACTERS = 20_000
_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000d\u000e-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_PICTURES = {chr(i): chr(0x2400 + i) for i in range(32)} | {"\x7f": "\u2421"}
_MOST_COMBINING = 4
"""Signs upon one letter; more of them would cover the lines around."""
_STACKED = re.compile(
    f"([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{{{_MOST_COMBINING}}})"
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A text, ready to be put into a page."""

    html: Markup
    length: int
    """Characters of the whole."""
    cut: bool

    def __bool__(self) -> bool:
        return self.length > 0


def plain(text: str, marked: re.Pattern[str] | None = None, *, limit: int = SHOWN_CHARACTERS) -> Shown:
    """A text as it is."""
    part = _STACKED.sub(r"\1", text[:limit])
    if marked is None:
        html = _visible(escape(part))
    else:
        pieces, at = [], 0
        for found in marked.finditer(part):
            pieces.append(_visible(escape(part[at : found.start()])))
            pieces.append(Markup("<mark>%s</mark>") % _visible(escape(found.group())))
            at = found.end()
        pieces.append(_visible(escape(part[at:])))
        html = Markup("").join(pieces)
    return Shown(html=html, length=len(text), cut=len(text) > limit)


def line(text: str | None, marked: re.Pattern[str] | None = None, *, limit: int = 240) -> Markup:
    """A text on one line, for lists."""
    return plain(" ".join((text or "")[: 2 * limit].split()), marked, limit=limit).html


def code(text: str, *, language: str = "python") -> Shown:
    """Highlighted, by classes (`static/viewer.css` has their colours)."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    part = _STACKED.sub(r"\1", text[:_HIGHLIGHTED_CHARACTERS])
    lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    # What pygments leaves is escaped: no control character is a part of its own tags.
    html = _visible(Markup(highlight(part, lexer, HtmlFormatter(nowrap=True))))
    return Shown(html=html, length=len(text), cut=len(text) > _HIGHLIGHTED_CHARACTERS)


def _visible(html: Markup) -> Markup:
    """Hidden characters of escaped text by name."""
    return Markup(_HIDDEN.sub(lambda found: _named(found.group()), str(html)))


def _named(character: str) -> str:
    point = f"U+{ord(character):04X}"
    name = unicodedata.name(character, "")
    return f'<span class="ctl" title="{point} {name}">{_PICTURES.get(character, point)}</span>'
