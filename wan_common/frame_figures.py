"""Figures of a denoising, drawn with matplotlib into uint8 pictures of constant size: image panels, curves, contact sheets.

Most of what matplotlib draws is axes and text that never change, so a :class:`PanelFigure` draws those once and then only
blits pictures and its title: a fifth of the time, 25 ms a picture (``benchmarks/bench_visualize_frames.py``).
Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from wan_common.frame_views import BAD, Curves

_BAD_COLOUR = (BAD[0] / 255, BAD[1] / 255, BAD[2] / 255)
DPI = 100  # 10x8 inches are 1000x800 pixels, seed 000's figures
VALUE_MAP = "RdBu_r"  # latents are signed and zero means something
PAPER = 255


def rendered(figure: Figure) -> np.ndarray:
    """Draw ``figure`` and return its pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@dataclasses.dataclass(frozen=True)
class Bar:
    """The colour bar of a :class:`PanelFigure`: the scale of latent values, or the noise level with a mark at the present one."""

    label: str
    low: float
    high: float
    colours: str = VALUE_MAP
    marked: bool = False


def value_bar(limit: float) -> Bar:
    """A bar for latent values in [-limit, limit]."""
    return Bar("latent value", -limit, limit)


SIGMA_BAR = Bar("noise level σ", 0.0, 1.0, "gray_r", marked=True)


class PanelFigure:
    """A figure of one or more image panels whose canvas never changes size.

    Args:
        size: inches (width, height) at :data:`DPI`.
        titles: one a panel, row by row.
        bar: its colours apply to 2D pictures; RGB pictures are shown as they are.
        extent: (width, height) that the axes count, in the unit of ``axis_labels``, whatever the picture's own resolution.
        axis_labels: (x, y).
        columns: panels a row; by default what gives the largest pictures.
    """

    def __init__(
        self,
        size: tuple[float, float],
        titles: Sequence[str],
        bar: Bar,
        extent: tuple[int, int],
        axis_labels: tuple[str, str],
        columns: int | None = None,
    ):
        self._figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        self._canvas = FigureCanvasAgg(self._figure)
        columns = columns or max(
            range(1, len(titles) + 1),
            key=lambda c: min(size[0] / c, (size[1] / math.ceil(len(titles) / c) - 0.7) * extent[0] / extent[1]),
        )
        rows = math.ceil(len(titles) / columns)
        grid = self._figure.subplots(rows, columns, squeeze=False)
        colours = colormaps[bar.colours].with_extremes(bad=_BAD_COLOUR)
        norm = Normalize(bar.low, bar.high)
        self._panels: list[tuple[Axes, AxesImage]] = []
        width, height = extent
        for index, axes in enumerate(grid.flat):
            if index >= len(titles):
                axes.set_axis_off()
                continue
            axes.set_title(titles[index], fontsize=11)
            if index + columns >= len(titles):
                axes.set_xlabel(axis_labels[0])
            if index % columns == 0:
                axes.set_ylabel(axis_labels[1])
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
            bounds = (0, width, height, 0)
            image = axes.imshow(np.zeros((2, 2)), cmap=colours, norm=norm, extent=bounds, aspect="equal", animated=True)
            self._panels.append((axes, image))
        scale = self._figure.colorbar(
            self._panels[0][1],
            ax=grid,
            label=bar.label,
            extend="neither" if bar.marked else "both",
            fraction=0.045,
            extendfrac=0.02,
            pad=0.02,
        )
        self._bar_axes = scale.ax
        self._mark = scale.ax.axhline(bar.high, color="red", linewidth=3, animated=True) if bar.marked else None
        self._title = self._figure.suptitle("first line\nsecond line", fontsize=13)
        self._canvas.draw()  # lays out once, with room for the two-line title; then the layout is frozen
        self._figure.set_layout_engine("none")
        self._title.set_animated(True)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._figure.bbox)

    def draw(self, pictures: Sequence[np.ndarray], title: str, sigma: float | None = None) -> np.ndarray:
        """Show one picture a panel (float [h, w], or uint8 [H, W, 3]) under a title of at most two lines.

        Returns a new uint8 [H, W, 3].
        """
        self._canvas.restore_region(self._background)
        for (axes, image), picture in zip(self._panels, pictures, strict=True):
            image.set_data(picture if picture.ndim == 3 else np.ma.masked_invalid(picture))
            axes.draw_artist(image)
            for spine in axes.spines.values():
                axes.draw_artist(spine)
        self._title.set_text(title)
        self._figure.draw_artist(self._title)
        if self._mark is not None and sigma is not None:
            self._mark.set_ydata([sigma, sigma])
            self._bar_axes.draw_artist(self._mark)
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


def cell_size(rows: int, columns: int, picture: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a contact sheet's cells for pictures of (height, width), so that the sheet stays near 2,400 x 2,000.

    A small picture is enlarged by a whole number, a large one is reduced.
    """
    scale = min(160 / picture[0], 2300 / rows / picture[0], 1800 / columns / picture[1])
    scale = float(int(scale)) if scale >= 1 else scale
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))


def fit(picture: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """``picture`` [h, w, 3] at the size of a ``cell`` of :func:`cell_size`: pixels repeated, or averaged by area."""
    repeats = cell[0] // picture.shape[0]
    if repeats >= 1:
        return picture.repeat(repeats, axis=0).repeat(repeats, axis=1)
    return cv2.resize(picture, cell[::-1], interpolation=cv2.INTER_AREA)


def contact_sheet(
    blocks: Mapping[str, Sequence[Sequence[np.ndarray]]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    axis_labels: tuple[str, str],
    title: str,
) -> np.ndarray:
    """Blocks of cells side by side, pixel for pixel: ``blocks[name][row][column]`` is a uint8 [h, w, 3], all of one size.

    Returns uint8 [H, W, 3].
    """
    gap, left, right, top, bottom = 4, 225, 20, 80, 55
    height, width = next(iter(blocks.values()))[0][0].shape[:2]
    rows, columns = len(row_labels), len(column_labels)
    block_height, block_width = rows * (height + gap) - gap, columns * (width + gap) - gap
    block_width_drawn = max(block_width, 110)  # room for the block's name
    total_width = left + len(blocks) * (block_width_drawn + 30) - 30 + right
    total_height = top + block_height + bottom
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    for number, (name, cells) in enumerate(blocks.items()):
        sheet = np.full((block_height, block_width, 3), PAPER, np.uint8)
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                y, x = row * (height + gap), column * (width + gap)
                sheet[y : y + height, x : x + width] = cell
        x = left + number * (block_width_drawn + 30)
        axes = figure.add_axes((x / total_width, bottom / total_height, block_width / total_width, block_height / total_height))
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=12)
        axes.set_xticks([c * (width + gap) + width / 2 for c in range(columns)], column_labels, fontsize=9)
        axes.set_xlabel(axis_labels[0])
        if number == 0:
            axes.set_yticks([r * (height + gap) + height / 2 for r in range(rows)], row_labels, fontsize=9)
            axes.set_ylabel(axis_labels[1])
        else:
            axes.set_yticks([])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.text(0.5, 1 - 14 / total_height, title, ha="center", va="top", fontsize=12, wrap=False)
    return rendered(figure)


_PLOTS = (
    ("sigma", None, "noise level σ", "σ"),
    ("mean", "x0_mean", "mean of the latents", "mean"),
    ("std", "x0_std", "standard deviation of the latents", "standard deviation"),
    ("change", "x0_change", "change from the step before", "RMS difference"),
)


def plot_curves(clips: Mapping[str, Curves], title: str) -> np.ndarray:
    """σ, mean, standard deviation and step-to-step change over the steps; for a single clip also its channels as heat maps.

    Returns uint8 [H, W, 3].
    """
    single = len(clips) == 1
    figure = Figure(figsize=(16, 9) if single else (12, 9), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=14)
    grid = figure.subplots(2, 3 if single else 2)
    palette = colormaps["tab10"]
    for axes, (x_name, x0_name, name, unit) in zip(grid[:, :2].flat, _PLOTS, strict=True):
        for number, (clip, curves) in enumerate(clips.items()):
            values = getattr(curves, x_name)
            entries, colour = np.arange(len(values)), palette(number % 10)
            label = "x after the step" if single else clip
            axes.plot(entries, values, "-o", markersize=3, color=colour, label=label if x0_name or not single else None)
            if x0_name:
                x0_colour = palette(1) if single else colour
                x0_label = "predicted x0" if single else f"{clip}, x0"
                axes.plot(entries, getattr(curves, x0_name), "--s", markersize=3, color=x0_colour, label=x0_label)
        axes.set(title=name, xlabel="steps done (0 is the initial noise)", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        if x0_name or not single:
            axes.legend(fontsize=9)
    if single:
        (curves,) = clips.values()
        heat_maps = (
            (curves.channel_mean, "mean of each channel of x", VALUE_MAP),
            (curves.channel_std, "standard deviation of each channel of x", "viridis"),
        )
        for axes, (values, name, colours) in zip(grid[:, 2], heat_maps, strict=True):
            finite = values[np.isfinite(values)]
            high = float(np.abs(finite).max()) if finite.size else 1.0
            low = -high if colours == VALUE_MAP else float(finite.min()) if finite.size else 0.0
            image = axes.imshow(
                np.ma.masked_invalid(values.T),
                cmap=colormaps[colours].with_extremes(bad=_BAD_COLOUR),
                vmin=low, vmax=high, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            axes.set(title=name, xlabel="steps done (0 is the initial noise)", ylabel="latent channel")
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
            figure.colorbar(image, ax=axes, label="latent value")
    return rendered(figure)
