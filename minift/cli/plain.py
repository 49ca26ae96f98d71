"""Terminals that know no Greek: what their encoding lacks is written with letters that it has.

A pipe in the C locale is ASCII, an old console Latin-1. An encoder that meets × or α there raises; with this error
handler it writes x or alpha, and whatever has no such form as \\u....
"""

from __future__ import annotations

import codecs
import contextlib
import sys
import unicodedata

SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "÷": "/", "…": "...", "→": "->", "←": "<-", "↔": "<->",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "±": "+-", "∞": "inf", "√": "sqrt", "∂": "d", "∇": "grad ", "‖": "||",
    "⟨": "<", "⟩": ">", "∈": "in", "⌈": "ceil(", "⌉": ")", "⌊": "floor(", "⌋": ")", "⊙": "*", "✓": "ok", "✗": "no",
    "“": '"', "”": '"', "„": '"', "’": "'", "‘": "'", "ᵀ": "'", "Σ": "sum", "∑": "sum", "Π": "prod", "∏": "prod",
    "─": "-", "━": "-", "═": "-", "│": "|", "┃": "|", "║": "|", "▌": "|", "█": "#", "•": "*", "●": "*", "▸": ">",
    "▶": ">", "≪": "<<", "⁄": "/", "′": "'",
}  # fmt: skip
ERRORS = "minift.plain"


def plain(text: str) -> str:
    """The same in ASCII, as a person would type it."""
    return "".join(_plain(character) for character in text)


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if character in SIGNS:
        return SIGNS[character]
    words = unicodedata.name(character, "").split()
    if words[:1] == ["GREEK"] and "LETTER" in words:  # GREEK SMALL LETTER ALPHA WITH TONOS
        letter = words[words.index("LETTER") + 1]
        return letter.capitalize() if "CAPITAL" in words else letter.lower()
    if words[:2] == ["BOX", "DRAWINGS"]:
        return "+"
    if unicodedata.combining(character):
        return ""
    parts = unicodedata.normalize("NFKD", character)  # ŵ is w and a circumflex, ² is 2
    if parts == character:
        return character.encode("ascii", "backslashreplace").decode()
    letters = plain(parts)
    return f"^{letters}" if "SUPERSCRIPT" in words else letters


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def speak_plainly() -> None:
    """From now on stdout and stderr write what their encoding lacks in letters that it has."""
    codecs.register_error(ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by something without an encoding
            stream.reconfigure(errors=ERRORS)  # type: ignore[union-attr]
