"""Names from outside, such as those of class folders, made fit for a figure: matplotlib warns of or stumbles over some of them."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ft2font import FT2Font

FIRST = "DejaVu Sans"  # comes with matplotlib
DOLLAR = "\\$"  # a bare one begins mathematics
OTHER_SCRIPTS = (
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
    """The fonts for `families`, those of other scripts as far as this machine has them, with the characters that each can draw."""
    installed = set(fontManager.get_font_names())
    fonts = {
        name: get_font(findfont(name))
        for name in (FIRST, *OTHER_SCRIPTS)
        if name == FIRST or name in installed
    }
    return {name: (font, frozenset(font.get_charmap())) for name, font in fonts.items()}


def families() -> list[str]:
    """Font families for a text that `legible` has made: the first that has a letter draws it."""
    return list(_fonts())


def legible(text: str, inches: float, size: float) -> str:
    """`text` on one line, no wider than `inches` at `size` points, without mathematics; what no font has stands as its code (\\u732b)."""
    pieces = [_piece(character) for character in " ".join(text.split())]
    widths = [_width(piece) * size / 72 for piece in pieces]
    if sum(widths) <= inches:
        return "".join(pieces)
    taken, room = 0, inches - _width("…") * size / 72
    while widths[taken] <= room:
        room -= widths[taken]
        taken += 1
    return "".join(pieces[:taken]).rstrip() + "…"


def _piece(character: str) -> str:
    if character == "$":
        return DOLLAR
    if any(ord(character) in known for _, known in _fonts().values()):
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _width(piece: str) -> float:
    """In ems, that is, in units of the letters' size."""
    total = 0.0
    for character in "$" if piece == DOLLAR else piece:
        font = next(font for font, known in _fonts().values() if ord(character) in known)
        font.set_size(100, 72)
        total += font.load_char(ord(character)).linearHoriAdvance / 65536 / 100
    return total
