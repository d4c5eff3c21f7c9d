"""Makes names from outside, such as those of class folders, fit for a figure.

matplotlib takes a dollar sign for mathematics and warns of letters that a font does not have.
"""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ft2font import FT2Font

DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib
DOLLAR = "\\$"  # a bare one begins mathematics
FONTS_OF_OTHER_SCRIPTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans CJK KR",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "NanumGothic",
    "Hiragino Sans",
    "PingFang HK",
    "Heiti TC",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Noto Sans Thai",
    "Arial Unicode MS",
)


@cache
def _fonts() -> dict[str, tuple[FT2Font, frozenset[int]]]:
    """The installed fonts by family, the default first, with the code points that each can draw."""
    installed = set(fontManager.get_font_names())
    fonts = {
        name: get_font(findfont(name))
        for name in (DEFAULT_FONT, *FONTS_OF_OTHER_SCRIPTS)
        if name == DEFAULT_FONT or name in installed
    }
    return {name: (font, frozenset(font.get_charmap())) for name, font in fonts.items()}


def font_families() -> list[str]:
    """The font families for a text made by `fit_text`: the first that has a character draws it."""
    return list(_fonts())


def fit_text(text: str, inches: float, size: float) -> str:
    """`text` on one line, cut to `inches` at `size` points, and safe for matplotlib.

    Dollar signs are escaped. A character that no font has becomes its code, such as \\u732b.
    """
    pieces = [_piece(character) for character in " ".join(text.split())]
    widths = [_width(piece) * size / 72 for piece in pieces]
    if sum(widths) <= inches:
        return "".join(pieces)
    taken, room = 0, inches - _width("…") * size / 72
    while widths[taken] <= room:
        room -= widths[taken]
        taken += 1
    return "".join(pieces[:taken]).rstrip() + "…"


def text_width(text: str, size: float) -> float:
    """The inches that `text` takes on one line at `size` points."""
    return sum(_width(_piece(character)) for character in text) * size / 72


def _piece(character: str) -> str:
    if character == "$":
        return DOLLAR
    if any(ord(character) in known for _, known in _fonts().values()):
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _width(piece: str) -> float:
    """The width of `piece` in ems, that is, in units of the font size."""
    total = 0.0
    for character in "$" if piece == DOLLAR else piece:
        font = next(font for font, known in _fonts().values() if ord(character) in known)
        font.set_size(100, 72)
        total += font.load_char(ord(character)).linearHoriAdvance / 65536 / 100
    return total
