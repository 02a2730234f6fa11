"""Fonts for names in any script: matplotlib's own has Latin, Greek, Cyrillic, Arabic and Hebrew, and draws boxes for others."""

import functools
import unicodedata
from collections.abc import Iterable

import matplotlib
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

OWN = "DejaVu Sans"
REGULAR = (400, "normal", "regular", "book")
NOT_FONTS = "Last Resort"  # it has a box for every character
# Since 3.11, matplotlib joins, reorders and turns letters as these scripts need it. Without that, names are misspelled.
SHAPES_TEXT = tuple(matplotlib.__version_info__[:2]) >= (3, 11)


def families_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return font families that together have all characters of the texts, matplotlib's own first.

    Returns:
        The families, and the characters that no installed font can draw.
    """
    families = [OWN]
    letters, own = set("".join(texts)), str(findfont(FontProperties(family=OWN)))
    missing = {letter for letter in letters if not _has(own, letter)}
    undrawable = set() if SHAPES_TEXT else {letter for letter in letters if _needs_shaping(letter)}
    regular = {
        font.name: font.fname for font in fontManager.ttflist if font.style == "normal" and font.weight in REGULAR
    }
    for name, file in sorted(regular.items()) if missing else ():
        if NOT_FONTS not in name and (found := {letter for letter in missing if _has(file, letter)}):
            families.append(name)
            missing -= found
    return families, missing | undrawable


def escaped(text: str, letters: Iterable[str] = ()) -> str:
    """Return a text with control characters, bytes that are no text, and these letters as Python's escapes."""
    unprintable = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")}
    return "".join(_escape(letter) if letter in unprintable | {*letters} else letter for letter in text)


def drawable(text: str) -> tuple[str, list[str]]:
    """Return a text with escapes for what no font can draw, and the font families to draw it with."""
    families, missing = families_for([escaped(text)])
    return escaped(text, missing), families


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@functools.cache
def _has(file: str, letter: str) -> bool:
    """Return whether a font has an outline for a letter; those of colored pictures have none."""
    if letter.isspace() or unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f":  # nothing is drawn
        return True
    try:
        font = get_font(file)
        if not font.get_char_index(ord(letter)):
            return False
        font.load_char(ord(letter))
        return len(font.get_path()[0]) > 0
    except (RuntimeError, ValueError, OSError):  # not scalable, not there, damaged
        return False


def _needs_shaping(letter: str) -> bool:
    """Return whether a letter is of a script that is written from the right or joins its letters."""
    return unicodedata.bidirectional(letter) in ("R", "AL") or "\u0900" <= letter <= "\u109f"
