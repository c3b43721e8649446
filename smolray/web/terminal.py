"""What a command prints for a terminal, as HTML: colours become classes, all text is escaped.

In: text with ANSI escape sequences. Out: markup.
"""

import re

from markupsafe import Markup, escape

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
CLASSES = {1: "t-bold", 2: "t-dim", 31: "t-red", 32: "t-green", 33: "t-yellow", 36: "t-cyan"}


def terminal_html(text: str) -> Markup:
    """The text with its colours; other control sequences are left out."""
    written, classes, position = Markup(), list[str](), 0
    for found in SEQUENCE.finditer(text):
        written += _span(text[position : found.start()], classes)
        position = found.end()
        if found[2] != "m":
            continue
        for code in (int(part or 0) for part in found[1].split(";") if part.isdigit() or not part):
            classes = [] if code == 0 else [*classes, CLASSES[code]] if code in CLASSES else classes
    return written + _span(text[position:], classes)


def _span(text: str, classes: list[str]) -> Markup:
    if not text or not classes:
        return escape(text)
    return Markup('<span class="{}">{}</span>').format(" ".join(dict.fromkeys(classes)), text)
