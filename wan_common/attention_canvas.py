"""Drawing for attention maps: colour tables, fonts for any script, and a canvas that is laid out once and then only filled.

A matplotlib figure takes 0.1 to 0.3 s to draw; a clip's attention videos have thousands of frames. So titles, captions and
the colour bar are drawn once with PIL, and each frame pastes colour-mapped pictures and one line of text: 4 ms at 1200x800.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wan_common.errors import UsageError

logger = logging.getLogger("attention")

PAPER, INK, FAINT = (18, 18, 22), (240, 240, 240), (150, 150, 160)
MARGIN, TITLE, CAPTION, STATUS, BAR = 16, 44, 22, 30, 92  # pixels


@functools.lru_cache
def colour_table(name: str) -> np.ndarray:
    """A matplotlib colour map as uint8 [256, 3].

    Raises:
        UsageError: no such map; names similar ones.
    """
    from matplotlib import colormaps

    if name not in colormaps:
        similar = difflib.get_close_matches(name, list(colormaps), 4) or ["hot", "viridis", "magma", "gray"]
        raise UsageError(f"--colormap {name!r}: matplotlib has no such colour map; similar: {', '.join(similar)}")
    return (np.asarray(colormaps[name](np.arange(256)))[:, :3] * 255 + 0.5).astype(np.uint8)


@functools.lru_cache
def _font_files() -> list[str]:
    """DejaVu, which matplotlib carries, then every font of the system (for scripts that DejaVu lacks, such as Chinese)."""
    import matplotlib
    from matplotlib import font_manager

    own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    fonts = {entry.fname for entry in font_manager.fontManager.ttflist if "lastresort" not in entry.fname.lower()}
    return [own, *sorted(fonts - {own})]  # the Last Resort font has a box for every character of Unicode


@functools.lru_cache
def _covered(font_file: str) -> frozenset[int]:
    from matplotlib import ft2font

    return frozenset(ft2font.FT2Font(font_file).get_charmap())


@functools.lru_cache(maxsize=256)
def printable(text: str) -> tuple[str, str]:
    """``text`` and the path of a font that has all its characters.

    Without such a font the characters that DejaVu lacks become their code points, ``\\u7ea2``: never empty boxes. (The HTML
    report shows every script, with the reader's fonts.)
    """
    text = " ".join(text.split())
    needed = {ord(character) for character in text if not character.isspace()}
    for font_file in _font_files():
        try:
            if needed <= _covered(font_file):
                return text, font_file
        except (OSError, RuntimeError):  # a damaged font of the system is not our concern
            continue
    font_file = _font_files()[0]
    missing = sorted(chr(code) for code in needed - _covered(font_file))
    _warn_missing(" ".join(missing))
    return "".join(c if ord(c) in _covered(font_file) or c.isspace() else f"\\u{ord(c):04x}" for c in text), font_file


@functools.lru_cache
def _warn_missing(characters: str) -> None:
    """Once for each set of characters."""
    logger.warning("no installed font has %s; pictures show code points (install a font such as Noto Sans CJK)", characters)


@functools.lru_cache(maxsize=256)
def _font(font_file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file, size)


def fit_text(text: str, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """Text and font; cut with an ellipsis to ``width`` pixels."""
    text, font_file = printable(text)
    font = _font(font_file, size)
    if font.getlength(text) <= width:
        return text, font
    while text and font.getlength(text + "…") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "…", font


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def scale_to_index(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to 0..255, ``low`` to 0 and ``high`` to 255, clipped."""
    return np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8)


class Canvas:
    """A picture of constant, even size with a title, captioned tiles, a colour bar and a line of status.

    Args:
        size: (width, height) in pixels of the whole; or None: just large enough for tiles of ``tile_size``.
        title, subtitle: one line each.
        captions: one a tile.
        tile_size: (width, height) of a tile's content: its aspect ratio; exact pixels when ``size`` is None.
        table: colours, uint8 [256, 3].
        bar: (low, high, label) of the colour bar, or None for no bar.
    """

    def __init__(
        self,
        size: tuple[int, int] | None,
        title: str,
        subtitle: str,
        captions: Sequence[str],
        tile_size: tuple[int, int],
        table: np.ndarray,
        bar: tuple[float, float, str] | None,
    ):
        self.table = table
        side = BAR if bar else 0
        if size is None:
            columns, width, height = 1, *tile_size
            size = (max(width + 2 * MARGIN + side, 320), height + TITLE + CAPTION + STATUS + MARGIN)
        else:
            inner = (size[0] - MARGIN - side, size[1] - TITLE - STATUS)
            columns, width, height = _best_grid(len(captions), inner, tile_size)
        self.width, self.height = size[0] + size[0] % 2, size[1] + size[1] % 2
        picture = Image.new("RGB", (self.width, self.height), PAPER)
        draw = ImageDraw.Draw(picture)
        text, font = fit_text(title, 18, self.width - 2 * MARGIN)
        draw.text((MARGIN, 4), text, INK, font)
        text, font = fit_text(subtitle, 12, self.width - 2 * MARGIN)
        draw.text((MARGIN, 27), text, FAINT, font)
        rows = math.ceil(len(captions) / columns)
        left = max(MARGIN, (self.width - side - columns * (width + MARGIN) - MARGIN) // 2 + MARGIN)
        top = TITLE + max(0, (self.height - TITLE - STATUS - rows * (height + CAPTION)) // 2)
        self.boxes: list[tuple[int, int, int, int]] = []  # x, y, width, height of each tile
        for index, caption in enumerate(captions):
            x = left + index % columns * (width + MARGIN)
            y = top + index // columns * (height + CAPTION) + CAPTION
            text, font = fit_text(caption, 12, width)
            draw.text((x, y - 17), text, INK, font)
            self.boxes.append((x, y, width, height))
        if bar:
            self._draw_bar(picture, draw, bar)
        self._background = np.asarray(picture)
        self._status: tuple[str, np.ndarray] | None = None

    def _draw_bar(self, picture: Image.Image, draw: ImageDraw.ImageDraw, bar: tuple[float, float, str]) -> None:
        low, high, label = bar
        top, bottom = self.boxes[0][1], self.boxes[-1][1] + self.boxes[-1][3]
        x = self.width - BAR + 8
        ramp = np.repeat(self.table[np.linspace(255, 0, bottom - top).astype(np.uint8)][:, None], 16, axis=1)
        picture.paste(Image.fromarray(ramp), (x, top))
        draw.rectangle((x - 1, top - 1, x + 16, bottom), outline=FAINT)
        text, font = fit_text(label, 11, BAR - 10)
        draw.text((x, top - 17), text, INK, font)
        ticks = max(2, min(6, (bottom - top) // 40))
        for tick in range(ticks):
            y = bottom - 1 - tick * (bottom - top - 1) / (ticks - 1)
            text, font = fit_text(number(low + (high - low) * tick / (ticks - 1)), 11, BAR - 30)
            draw.text((x + 22, y - 7), text, INK, font)

    def render(self, pictures: Sequence[np.ndarray], status: str) -> np.ndarray:
        """Fill the tiles: uint8 [h, w] colour indices (enlarged with hard edges) or [h, w, 3] RGB; returns uint8 [H, W, 3]."""
        frame = self._background.copy()
        for (x, y, width, height), picture in zip(self.boxes, pictures, strict=True):
            if picture.ndim == 2:
                frame[y : y + height, x : x + width] = cv2.resize(self.table[picture], (width, height), interpolation=cv2.INTER_NEAREST)
            elif picture.shape[:2] == (height, width):
                frame[y : y + height, x : x + width] = picture
            else:
                frame[y : y + height, x : x + width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        if self._status is None or self._status[0] != status:
            strip = Image.new("RGB", (self.width - 2 * MARGIN, STATUS - 8), PAPER)
            text, font = fit_text(status, 13, strip.width)
            ImageDraw.Draw(strip).text((0, 1), text, INK, font)
            self._status = (status, np.asarray(strip))
        strip_pixels = self._status[1]
        frame[self.height - STATUS + 4 : self.height - 4, MARGIN : self.width - MARGIN] = strip_pixels
        return frame


def _best_grid(count: int, inner: tuple[int, int], tile_size: tuple[int, int]) -> tuple[int, int, int]:
    """(columns, tile width, tile height) of the largest tiles of that aspect ratio that fit."""
    best = (1, 0, 0)
    for columns in range(1, count + 1):
        rows = math.ceil(count / columns)
        width = inner[0] / columns - MARGIN
        height = inner[1] / rows - CAPTION
        scale = min(width / tile_size[0], height / tile_size[1])
        if scale * tile_size[0] > best[1]:
            best = (columns, int(scale * tile_size[0]), int(scale * tile_size[1]))
    if best[1] < 2 or best[2] < 2:
        raise UsageError(f"--figsize: {inner[0]}x{inner[1]} pixels hold no {count} pictures; make it larger")
    return best


def blend(frame: np.ndarray, weights: np.ndarray, table: np.ndarray, low: float, high: float, alpha: float) -> np.ndarray:
    """Attention over a picture: colour by value, opacity ``alpha`` times the value in its range, so that low weights hide nothing.

    Args:
        frame: uint8 [H, W, 3].
        weights: [h, w] float on the token grid; enlarged bilinearly, cell centres on cell centres.
        table: uint8 [256, 3].
        low, high: the range of the colours.
        alpha: 0..1.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = frame.shape[:2]
    scaled = np.clip((weights.astype(np.float32) - low) / (high - low), 0, 1)
    scaled = cv2.resize(scaled, (width, height), interpolation=cv2.INTER_LINEAR)
    colours = cv2.LUT(cv2.merge([(scaled * 255 + 0.5).astype(np.uint8)] * 3), table[None])
    opacity = scaled * np.float32(alpha)
    return cv2.blendLinear(colours, frame, opacity, 1 - opacity)


def set_text(artist: Any, text: str) -> None:
    """Text for a matplotlib artist: a font that has its characters, and no TeX (a prompt may hold ``$``)."""
    text, font_file = printable(text)
    size = artist.get_fontsize()
    artist.set_parse_math(False)
    artist.set_fontproperties(_font_properties(font_file))
    artist.set_fontsize(size)
    artist.set_text(text)


@functools.lru_cache
def _font_properties(font_file: str) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=font_file)
