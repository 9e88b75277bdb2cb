"""The files of ``visualize_frames.py`` (names of seed 000): pictures a step, videos, contact sheets, curves, an index.

Everything is drawn step by step: memory does not grow with the number of steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from wan_common.atomic import make_output_dir, remove_temporaries, write_json
from wan_common.errors import UsageError
from wan_common.frame_figures import SIGMA_BAR, PanelFigure, cell_size, contact_sheet, fit, plot_curves, value_bar
from wan_common.frame_views import (
    Curves,
    Decoder,
    Entry,
    Pictures,
    entries,
    evenly,
    measure,
    tensor_stats,
    write_png,
)
from wan_common.latents import latent_frame_of
from wan_common.step_latents import BackgroundWriter, StepLatents
from wan_common.video import VideoWriter

PICTURES = "frame_debug"
DENOISING_VIDEO = "wan_visualization_denoising_process.mp4"
NOISE_VIDEO = "wan_visualization_noise_evolution.mp4"
SIDE_BY_SIDE_VIDEO = "wan_visualization_side_by_side.mp4"
CONTACT_SHEET = "wan_visualization_contact_sheet.png"
STATISTICS_PLOT = "wan_visualization_statistics.png"
CLIPS_VIDEO = "wan_visualization_clips.mp4"
CLIPS_SHEET = "wan_visualization_clips_contact_sheet.png"
CLIPS_PLOT = "wan_visualization_clips_statistics.png"
INDEX = "index.json"

NOISE_SIZE = (10.0, 8.0)  # inches, seed 000's figures
IMAGE_SIZE = (10.0, 10.0)
LATENT_AXES = ("x (latent pixels, 8 video pixels each)", "y (latent pixels)")
PIXEL_AXES = ("x (video pixels)", "y (video pixels)")
MAX_PANELS = 12  # frames shown together in a video; evenly chosen beyond
MAX_ROWS, MAX_COLUMNS = 26, 6  # of a contact sheet; evenly chosen beyond
MAX_CLIPS = 8  # side by side
BLANK = 225  # grey where there is nothing to show: x0 before the first step
_OURS = re.compile(r"(noise|current_image|predicted_x0|final)_[\w.-]+\.(png|json)")


@dataclasses.dataclass(frozen=True)
class ViewOptions:
    """``frames``: video frames, "all", or None for frame 0's pictures and a contact sheet over the whole clip."""

    frames: tuple[int, ...] | Literal["all"] | None = None
    channel: int = 0
    fps: float = 4.0  # seed 000
    save_tensor_stats: bool = False


def video_frames(options: ViewOptions, clip: StepLatents) -> tuple[int, ...]:
    """The video frames whose pictures are wanted, ascending.

    Raises:
        UsageError: the clip has no such frame.
    """
    if options.frames == "all":
        return tuple(range(clip.frames))
    frames = tuple(sorted(set(options.frames or (0,))))
    if frames[0] < 0 or frames[-1] >= clip.frames:
        wanted = " ".join(map(str, frames))
        raise UsageError(f"--frames {wanted}: the clip in {clip.directory} has the video frames 0 to {clip.frames - 1}")
    return frames


def check_request(clips: Mapping[str, StepLatents], options: ViewOptions) -> None:
    """Refuse, before anything is drawn, what cannot be drawn.

    Raises:
        UsageError: a clip has no such frame or channel, or several clips differ in size.
    """
    for clip in clips.values():
        video_frames(options, clip)
        if not 0 <= options.channel < clip.shape[1]:
            found = f"the latents in {clip.directory} have the channels 0 to {clip.shape[1] - 1}"
            raise UsageError(f"--channel {options.channel}: {found}")
    if len({clip.shape for clip in clips.values()}) > 1:
        found = ", ".join(f"{name} has {c.frames} frames {c.width}x{c.height}" for name, c in clips.items())
        raise UsageError(f"--step_latents: clips of one size can be set side by side, but {found}; draw one at a time")


class _Folder:
    """``frame_debug/``: pictures and statistics written behind the caller's back, an index of them, nothing stale.

    Pictures that an earlier run left here (its index names them) and this one does not write again are removed at the end.
    """

    def __init__(self, path: Path, clip: StepLatents, save_tensor_stats: bool, writer: BackgroundWriter):
        self._path = make_output_dir(path)
        remove_temporaries(path)
        self._clip, self._save_stats, self._writer = clip, save_tensor_stats, writer
        self._entries: dict[str, dict[str, Any]] = {}
        self._names: set[str] = set()

    def save(self, kind: str, entry: Entry, group: Sequence[int], drawn: np.ndarray, shown: np.ndarray, tensor: str | None) -> None:
        """Save ``drawn`` as the picture of each video frame of ``group``.

        The statistics are of the entry's ``tensor`` with those of what is ``shown`` of it; of ``shown`` alone for None.
        """
        record = self._entries.setdefault(
            entry.key,
            {
                "step": entry.step.index if entry.step else None,
                "timestep": entry.step.timestep if entry.step else None,
                "sigma": entry.sigma,
                "source": f"{self._clip.directory.name}/{entry.file}",
                "files": {},
            },
        )
        names = {i: f"{kind}_{entry.key}_frame{i}" for i in group}
        record["files"].setdefault(kind, {}).update({str(i): f"{name}.png" for i, name in names.items()})
        self._write_pngs(drawn, [f"{name}.png" for name in names.values()])
        if not self._save_stats:
            return
        stats = {"source": record["source"], "tensor": tensor or "decoded picture"}
        whole = {"latents": entry.x, "predicted_x0": entry.x0}.get(tensor or "")
        stats |= tensor_stats(shown) if whole is None else tensor_stats(whole) | {"shown": tensor_stats(shown)}
        for name in names.values():
            self._names.add(f"{name}_stats.json")
            self._writer.submit(write_json, self._path / f"{name}_stats.json", stats)

    def save_final(self, pictures: Pictures) -> None:
        """Save what the last x0 decodes to, pixel for pixel, as ``final_frame{i}.png``."""
        for i, picture in pictures.items():
            self._write_pngs(picture, [f"final_frame{i}.png"])

    def _write_pngs(self, picture: np.ndarray, names: list[str]) -> None:
        self._names.update(names)
        self._writer.submit(write_png, picture, *(self._path / name for name in names))

    def finish(self, about: dict[str, Any]) -> None:
        """Wait for the pictures, remove stale ones, write the index."""
        self._writer.flush()
        for name in _listed(self._path / INDEX) - self._names:
            (self._path / name).unlink(missing_ok=True)
        write_json(self._path / INDEX, about | {"entries": [*self._entries.values()], "names": sorted(self._names)})


def _listed(index: Path) -> set[str]:
    """The files that an earlier run's index names; an index that is not ours names none."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["names"]
        return {name for name in names if _OURS.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


class _View:
    """One kind of picture: each wanted frame as a figure of its own, and all of them together as a frame of ``video``.

    Args:
        figure: makes a figure of panels with the given titles.
        shared: the video frames of one latent frame look the same, and are drawn once.
        caption: the first line of a figure's title, for the video frames it shows.
    """

    def __init__(
        self,
        kind: str,
        figure: Callable[[Sequence[str]], PanelFigure],
        frames: Sequence[int],
        shared: bool,
        caption: Callable[[Sequence[int]], str],
        folder: _Folder,
        video: VideoWriter | None = None,
    ):
        self._kind, self._caption, self._folder, self._video = kind, caption, folder, video
        self._single = figure([""])
        self._together = evenly(frames, MAX_PANELS)
        several = video is not None and len(frames) > 1
        self._grid = figure([f"frame {i}" for i in self._together]) if several else None
        groups: dict[int, list[int]] = {}
        for i in frames:
            groups.setdefault(latent_frame_of(i) if shared else i, []).append(i)
        self._groups = list(groups.values())

    def show(self, entry: Entry, pictures: Pictures, tensor: str | None) -> None:
        """Draw the entry's ``pictures`` and append them to the video; ``tensor`` as in :meth:`_Folder.save`."""
        for group in self._groups:
            shown = pictures[group[0]]
            drawn = self._single.draw([shown], f"{self._caption(group)}\n{entry.title}", entry.sigma)
            self._folder.save(self._kind, entry, group, drawn, shown, tensor)
        if self._grid is not None:
            title = f"{self._caption(self._together)}\n{entry.title}"
            drawn = self._grid.draw([pictures[i] for i in self._together], title, entry.sigma)
        if self._video is not None:
            self._video.append(drawn)


class _Sheet:
    """Collects the cells of a contact sheet: rows are evenly chosen entries, columns frames or clips, blocks x and x0."""

    def __init__(self, entry_count: int, columns: Sequence[str], column_name: str, title: str):
        self._rows = set(evenly(range(entry_count), MAX_ROWS))
        self._columns, self._axes, self._title = columns, (column_name, "denoising step"), title
        self._blocks: dict[str, list[list[np.ndarray]]] = {"x (noisy latents)": [], "predicted x0": []}
        self._labels: list[str] = []

    def add(self, number: int, label: str, x: Sequence[np.ndarray], x0: Sequence[np.ndarray]) -> None:
        """Offer entry ``number``'s pictures, one a column; kept if its row was chosen. No ``x0`` leaves grey cells."""
        if number not in self._rows:
            return
        self._labels.append(label)
        cell = cell_size(len(self._rows), 2 * len(self._columns), x[0].shape[:2])
        blank = np.full((*cell, 3), BLANK, np.uint8)
        for cells, pictures in zip(self._blocks.values(), (x, x0), strict=True):
            cells.append([fit(picture, cell) for picture in pictures] or [blank] * len(self._columns))

    def write(self, path: Path) -> Path:
        """Write the sheet as a PNG. Returns ``path``."""
        write_png(contact_sheet(self._blocks, self._labels, self._columns, self._axes, self._title), path)
        return path


def _row_label(entry: Entry) -> str:
    if entry.step is None:
        return "initial noise"
    return f"step {entry.step.index + 1}   t {entry.step.timestep:.6g}   σ {entry.sigma:.3f}"


def _span(frames: Sequence[int]) -> str:
    if len(frames) == 1:
        return f"video frame {frames[0]}"
    return f"video frames {', '.join(map(str, frames))}"


def _panel_size(rows: int, columns: int, aspect: float) -> tuple[float, float]:
    """Inches for ``rows`` x ``columns`` pictures of ``aspect`` (width / height), at most 18 x 12; even in pixels."""
    panel = min(4.6, 17 / columns, (11 / rows - 0.7) * aspect)
    width, height = max(6.0, columns * (panel + 0.4) + 1), rows * (panel / aspect + 0.7) + 1
    return round(width * 50) / 50, round(height * 50) / 50


def draw_clip(clip: StepLatents, decoder: Decoder, options: ViewOptions, output_dir: Path) -> tuple[Curves, list[Path]]:
    """Write every view of one clip into ``output_dir`` (made when missing) and its ``frame_debug/``.

    Returns the clip's curves and the files other than single pictures.
    """
    frames = video_frames(options, clip)
    curves, limit = measure(clip, options.channel)
    make_output_dir(output_dir)
    remove_temporaries(output_dir)
    height, width = clip.shape[3:]
    count = len(clip.steps) + 1
    sheet_frames = evenly(frames if options.frames is not None else range(clip.frames), MAX_COLUMNS)
    needed = sorted({*frames, *sheet_frames})
    about = {
        "clip": clip.directory.name, "seed": clip.seed, "decoder": decoder.name, "num_inference_steps": clip.num_inference_steps,
        "channel": options.channel, "noise_colour_range": [-limit, limit], "frames": list(frames),
    }  # fmt: skip

    def noise_figure(titles: Sequence[str]) -> PanelFigure:
        return PanelFigure(NOISE_SIZE, titles, value_bar(limit), (width, height), LATENT_AXES)

    def image_figure(titles: Sequence[str]) -> PanelFigure:
        return PanelFigure(IMAGE_SIZE, titles, SIGMA_BAR, (8 * width, 8 * height), PIXEL_AXES)

    def noise_caption(group: Sequence[int]) -> str:
        planes = sorted({latent_frame_of(i) for i in group})
        where = f"latent frame {planes[0]} ({_span(group)})" if len(planes) == 1 else _span(group)
        return f"x: latent channel {options.channel}, {where}"

    beside = evenly(frames, 3)
    finished = "final" if len(clip.steps) == clip.num_inference_steps else "last step so far"
    beside_titles = [f"{what}, frame {i}" for i in beside for what in ("x", "predicted x0", finished)]
    beside_size = _panel_size(len(beside), 3, width / height)
    beside_figure = PanelFigure(beside_size, beside_titles, SIGMA_BAR, (8 * width, 8 * height), PIXEL_AXES, columns=3)
    nothing = np.full((height, width, 3), BLANK, np.uint8)

    sheet_columns = [f"{i}" for i in sheet_frames]
    name = f"{clip.directory.name}: {len(clip.steps)} steps, seed {clip.seed}"
    title = f"{name}, decoded by {decoder.name}"
    sheet = _Sheet(count, sheet_columns, "video frame", title)
    final = decoder.frames(_last(clip), sorted({*frames, *beside}))
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(BackgroundWriter(depth=8))
        denoising, evolution, side_by_side = (
            stack.enter_context(VideoWriter(output_dir / name, options.fps, metadata=about))
            for name in (DENOISING_VIDEO, NOISE_VIDEO, SIDE_BY_SIDE_VIDEO)
        )
        folder = _Folder(output_dir / PICTURES, clip, options.save_tensor_stats, writer)
        shared = decoder.name == "rgb"
        by = f"decoded by {decoder.name}"
        noise = _View("noise", noise_figure, frames, True, noise_caption, folder, evolution)
        images = _View("current_image", image_figure, frames, shared, lambda g: f"x {by}, {_span(g)}", folder, denoising)
        predictions = _View("predicted_x0", image_figure, frames, shared, lambda g: f"predicted x0 {by}, {_span(g)}", folder)
        for number, entry in enumerate(tqdm(entries(clip), total=count, desc=f"{clip.directory.name}: drawing", unit="step")):
            x = decoder.frames(entry.x, needed)
            noise.show(entry, {i: entry.x[0, options.channel, latent_frame_of(i)] for i in frames}, "latents")
            images.show(entry, x, None)
            x0 = {} if entry.x0 is None else decoder.frames(entry.x0, needed)
            if x0:
                predictions.show(entry, x0, "predicted_x0")
            panels = [picture for i in beside for picture in (x[i], x0.get(i, nothing), final[i])]
            side_by_side.append(beside_figure.draw(panels, f"{title}\n{entry.title}", entry.sigma))
            sheet.add(number, _row_label(entry), [x[i] for i in sheet_frames], [x0[i] for i in sheet_frames if x0])
        folder.save_final({i: x0[i] for i in frames})
        folder.finish(about | {"curves": _curves_record(curves)})
    files = [output_dir / name for name in (DENOISING_VIDEO, NOISE_VIDEO, SIDE_BY_SIDE_VIDEO)]
    files.append(sheet.write(output_dir / CONTACT_SHEET))
    files.append(output_dir / STATISTICS_PLOT)
    write_png(plot_curves({clip.directory.name: curves}, name), files[-1])
    return curves, files


def _curves_record(curves: Curves) -> dict[str, list[float | None]]:
    """The numbers of the plot for the index: entry by entry, None where there is none."""
    names = ("sigma", "mean", "std", "change", "x0_mean", "x0_std", "x0_change")
    return {name: [float(v) if np.isfinite(v) else None for v in getattr(curves, name)] for name in names}


def _last(clip: StepLatents) -> np.ndarray:
    return clip.read(clip.steps[-1])[0]


def compare_clips(
    clips: Mapping[str, StepLatents],
    curves: Mapping[str, Curves],
    decoder: Decoder,
    options: ViewOptions,
    output_dir: Path,
) -> list[Path]:
    """Write several clips (seeds) side by side: a video and a contact sheet of x and x0, and their curves in one plot.

    A clip of fewer steps stays at its last one. Shows the first wanted frame, of at most :data:`MAX_CLIPS` clips of one size.
    """
    count = max(len(clip.steps) for clip in clips.values()) + 1
    height, width = next(iter(clips.values())).shape[3:]
    aspect = width / height
    frame = video_frames(options, next(iter(clips.values())))[0]
    titles = [*clips, *(f"{name}, x0" for name in clips)]
    size = _panel_size(2, len(clips), aspect)
    figure = PanelFigure(size, titles, SIGMA_BAR, (8 * width, 8 * height), PIXEL_AXES, columns=len(clips))
    title = f"video frame {frame}, decoded by {decoder.name}"
    sheet = _Sheet(count, list(clips), "clip", title)
    streams = {name: entries(clip) for name, clip in clips.items()}
    latest: dict[str, Entry] = {}
    cells: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with VideoWriter(output_dir / CLIPS_VIDEO, options.fps) as video:
        for number in tqdm(range(count), desc="side by side", unit="step"):
            for name, stream in streams.items():
                if (entry := next(stream, None)) is None:
                    continue
                x = decoder.frames(entry.x, [frame])[frame]
                x0 = np.full_like(x, BLANK)
                if entry.x0 is not None:
                    x0 = decoder.frames(entry.x0, [frame])[frame]
                latest[name], cells[name] = entry, (x, x0)
            one, same = next(iter(latest.values())), len({entry.title for entry in latest.values()}) == 1
            x_row, x0_row = zip(*cells.values(), strict=True)
            when, row = (one.title, _row_label(one)) if same else (f"after step {number}", f"step {number}")
            video.append(figure.draw([*x_row, *x0_row], f"{title}\n{when}", one.sigma if same else None))
            sheet.add(number, row, x_row, x0_row)
    write_png(plot_curves(curves, "all clips"), output_dir / CLIPS_PLOT)
    return [output_dir / CLIPS_VIDEO, sheet.write(output_dir / CLIPS_SHEET), output_dir / CLIPS_PLOT]
