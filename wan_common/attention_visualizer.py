"""Stored attention maps as pictures and videos: per-word videos, overlays, comparisons, and the analysis report.

What a video shows:

- *attention video*: its time is the denoising. Each picture shows up to six latent frames side by side, with
  ``interpolation_steps`` blended pictures between two steps.
- *overlay* (an original video is given): its time is the clip's. Each video frame carries the mean over all steps (or one
  ``step``) of its latent frame: latent frame 0 is video frame 0, latent frame p >= 1 is video frames 4p-3..4p. It keeps the
  speed of the original.
- *aggregated*: a static picture of the mean over steps for ``static_duration`` seconds.

Colours: ``normalize`` chooses the range: ``global`` over all words of the clip (so that words compare), ``word``, ``frame``
(each picture by itself), ``none`` (0 to 1). A range is the 1st to the 99th percentile, but its top is at least a quarter of
the largest value, so that a small strong spot is not lost in a clipped background. ``over="real"`` divides by the mass of real
words, 1 - pad - eos, because pads often take most of it.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from wan_common.atomic import atomic_path, make_output_dir, write_text
from wan_common.attention_canvas import Canvas, blend, colour_table, number, printable, scale_to_index, set_text
from wan_common.attention_maps import (
    EOS,
    NEGATIVE_SUFFIX,
    PAD,
    SPECIAL_GROUPS,
    AttentionAnalyzer,
    AttentionMap,
    AttentionMetadata,
    VisualizationParams,
    frame_map,
)
from wan_common.errors import ArtifactError, UsageError
from wan_common.latents import latent_frame_of, video_frames_of
from wan_common.video import VideoWriter, probe, read_video

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AttentionAnalyzer", "AttentionVisualizer", "ClipStatistics", "visualize_run"]

logger = logging.getLogger("attention")

NORMALIZE = ("global", "word", "frame", "none")
OVER = ("all", "real")
DPI = 100
MAX_TILES = 6
HEATMAP_ROWS = 480  # image tokens of a step's heat map are averaged to at most about so many rows
VIDEO_QUALITY = 7  # of imageio's 0..10: the hard edges and captions stay clean at 2/3 of the size of 8
VIDEO_PRESET = "veryfast"  # plots are flat: three quarters of the time went into x264's medium preset (docs/LOG.md)
_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a colour scale."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.low)} to {number(self.high)}"


class _Histogram:
    """Percentiles of a stream of weights 0..1 in constant memory: 8192 logarithmic bins from 1e-10, each 0.3% wide."""

    BINS, DECADES = 8192, 10

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        bins = (np.log10(np.maximum(values, 10.0**-self.DECADES)) / self.DECADES + 1) * (self.BINS - 1)
        self.counts += np.bincount(np.clip(bins, 0, self.BINS - 1).astype(np.int32).ravel(), minlength=self.BINS)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def percentile(self, percent: float) -> float:
        cumulative = np.cumsum(self.counts)
        index = int(np.searchsorted(cumulative, percent / 100 * cumulative[-1]))
        return float(10 ** ((min(index, self.BINS - 1) / (self.BINS - 1) - 1) * self.DECADES))

    def merged(self, others: Sequence[_Histogram]) -> _Histogram:
        result = _Histogram()
        for one in (self, *others):
            result.counts += one.counts
            result.low, result.high = min(result.low, one.low), max(result.high, one.high)
        return result

    def range(self, percentile: float) -> Range:
        return _robust(self.percentile(100 - percentile), self.percentile(percentile), self.low, self.high)


def _robust(low: float, high: float, minimum: float, maximum: float) -> Range:
    high = max(high, maximum / 4)
    if high - low < 1e-6 * max(maximum, _TINY):  # constant but for a few: show all there is
        low, high = minimum, maximum
    if high - low < 1e-6 * max(maximum, _TINY):  # constant
        low, high = 0.0, max(maximum, _TINY)
    return Range(low, min(high, maximum) if maximum > low else high)


def robust_range(values: np.ndarray, percentile: float = 99.0) -> Range:
    """Range of a picture's colours (see the module's docstring)."""
    low, high = np.percentile(values, [100 - percentile, percentile])
    return _robust(float(low), float(high), float(values.min()), float(values.max()))


@dataclasses.dataclass(frozen=True)
class ClipStatistics:
    """Numbers of one clip, from one pass over its steps (one step in memory at a time).

    Attributes:
        words: in prompt order. groups: words and the special groups.
        steps, timesteps: of the stored steps.
        mass: [steps, groups]: mean weight over all image tokens.
        share: [steps, words]: mean of weight / (1 - pad - eos); NaN when pads were not stored.
        peak: [steps, words]: largest weight.
        spread: [steps, words]: the fraction of image tokens a word acts on, 2^entropy / tokens: 1 everywhere alike.
        entropy: [steps]: mean entropy in bits of an image token's distribution over the groups.
        frame_mass: [words, latent frames]: mean weight over steps and the frame's tokens.
        histograms: word -> percentiles of its weights. shares: the same of weight / real.
    """

    video_id: str
    words: list[str]
    groups: list[str]
    steps: list[int]
    timesteps: list[float | None]
    mass: np.ndarray
    share: np.ndarray
    peak: np.ndarray
    spread: np.ndarray
    entropy: np.ndarray
    frame_mass: np.ndarray
    histograms: dict[str, _Histogram]
    shares: dict[str, _Histogram]
    metadata: AttentionMetadata

    @property
    def importance(self) -> list[tuple[str, float]]:
        """Words by mean weight, largest first."""
        mean = self.mass[:, : len(self.words)].mean(axis=0)
        return sorted(zip(self.words, map(float, mean), strict=True), key=lambda item: -item[1])

    def strongest(self) -> list[tuple[str, float]]:
        """For each step, the word with the largest mean weight, and that weight."""
        if not self.words:
            return []
        best = self.mass[:, : len(self.words)].argmax(axis=1)
        return [(self.words[column], float(self.mass[row, column])) for row, column in enumerate(best)]


class AttentionVisualizer:
    """Videos and pictures from stored attention maps.

    Args:
        analyzer: the maps.
        figsize: inches (width, height) at 100 dots an inch, of attention videos and figures.
        colormap: a matplotlib colour map.
        fps: of attention videos (overlays keep the speed of their original).
        normalize: global, word, frame or none.
        percentile: upper percentile of a range; the lower is its complement.
        over: ``all``: weights as they are; ``real``: divided by 1 - pad - eos.
        include_colorbar: draw the scale.
        static_duration: seconds of an aggregated video.
        block, head: look at one transformer block or head (stored with store_per_block/store_per_head); None: their mean.
        progress: show progress bars.

    Raises:
        UsageError: an argument that cannot be.
    """

    def __init__(
        self,
        analyzer: AttentionAnalyzer,
        figsize: Sequence[float] = (12, 8),
        colormap: str = "hot",
        fps: int = 10,
        *,
        normalize: str = "global",
        percentile: float = 99.0,
        over: str = "all",
        include_colorbar: bool = True,
        static_duration: float = 3.0,
        block: int | None = None,
        head: int | None = None,
        progress: bool = True,
    ):
        if normalize not in NORMALIZE:
            raise UsageError(f"--normalize {normalize!r}; wanted one of {', '.join(NORMALIZE)}")
        if over not in OVER:
            raise UsageError(f"--over {over!r}; wanted one of {', '.join(OVER)}")
        if not 50 < percentile <= 100:
            raise UsageError(f"--percentile {percentile}; wanted above 50, up to 100")
        params = VisualizationParams(figsize=(figsize[0], figsize[-1]), fps=fps, static_duration=static_duration)
        self.analyzer, self.figsize, self.fps, self.static_duration = analyzer, params.figsize, fps, static_duration
        self.colormap, self.table = colormap, colour_table(colormap)
        self.normalize, self.percentile, self.over = normalize, percentile, over
        self.include_colorbar, self.block, self.head, self.progress = include_colorbar, block, head, progress
        self._statistics: dict[str, ClipStatistics] = {}
        self._mean_ranges: dict[tuple[str, str], Range] = {}

    # -- data

    def _values(self, loaded: AttentionMap) -> np.ndarray:
        return frame_map(loaded, self.block, self.head)

    def _real_mass(self, video_id: str, step: int | None) -> np.ndarray:
        """1 - pad - eos, [F, H, W]."""
        if PAD not in self.analyzer.get_available_tokens(video_id, include_special=True):
            raise UsageError(f"--over real needs the stored {PAD} and {EOS} maps, and {video_id} has none; use --over all")
        pad, eos = (self._values(self._load(video_id, name, step)) for name in (PAD, EOS))
        return np.maximum(1 - pad - eos, _TINY)

    def _load(self, video_id: str, token: str, step: int | None) -> AttentionMap:
        if step is None:
            return self.analyzer.load_aggregated(video_id, token)
        return self.analyzer.load_step(video_id, token, step)

    def _map(self, video_id: str, token: str, step: int | None) -> tuple[np.ndarray, AttentionMetadata]:
        """[F, H, W] as it is to be shown (``step`` None: the mean over steps), and its metadata."""
        loaded = self._load(video_id, token, step)
        values = self._values(loaded)
        if self.over == "real":
            values = np.clip(values / self._real_mass(video_id, step), 0, 1)
        return values, loaded.metadata

    def statistics(self, video_id: str) -> ClipStatistics:
        """Numbers of a clip; computed once."""
        if video_id not in self._statistics:
            self._statistics[video_id] = self._measure(video_id)
        return self._statistics[video_id]

    def _measure(self, video_id: str) -> ClipStatistics:
        words = self.analyzer.get_available_tokens(video_id)
        groups = self.analyzer.get_available_tokens(video_id, include_special=True)
        if not groups:
            raise ArtifactError(
                f"{self.analyzer.attention_dir / video_id}: no maps stored; rerun stage2_transformer.py with --store_attention --force"
            )
        streams = [self.analyzer.iter_steps(video_id, group) for group in groups]
        steps, timesteps, rows = [], [], []
        peaks, spreads, shares, entropies = [], [], [], []
        histograms, share_histograms = ({word: _Histogram() for word in words} for _ in range(2))
        frame_mass: Any = 0
        total = len(self.analyzer.get_available_steps(video_id, groups[0]))
        for group_steps in tqdm(
            _together(streams, groups), total=total, desc=f"{video_id}: statistics", leave=False, disable=not self.progress
        ):
            step, first = group_steps[0]
            maps = np.stack([self._values(loaded) for _, loaded in group_steps])  # [G, F, H, W]
            chosen = maps[: len(words)]
            metadata = first.metadata
            steps.append(step)
            timesteps.append(metadata.timestep)
            rows.append(maps.mean(axis=(1, 2, 3)))
            peaks.append(chosen.max(axis=(1, 2, 3), initial=0))
            spreads.append([2 ** _entropy(one.ravel()) / one.size for one in chosen])
            entropies.append(_entropy(maps.reshape(len(groups), -1)).mean())
            frame_mass = frame_mass + chosen.mean(axis=(2, 3))
            real = np.maximum(1 - maps[groups.index(PAD)] - maps[groups.index(EOS)], _TINY) if PAD in groups and EOS in groups else None
            relative = np.full_like(chosen, np.nan) if real is None else np.clip(chosen / real, 0, 1)
            shares.append(relative.mean(axis=(1, 2, 3)))
            for word, values, share in zip(words, chosen, relative, strict=True):
                histograms[word].add(values)
                if real is not None:
                    share_histograms[word].add(share)
        if len(steps) < metadata.num_inference_steps:
            logger.warning("%s: %d of %d steps are stored so far", video_id, len(steps), metadata.num_inference_steps)
        return ClipStatistics(
            video_id, words, groups, steps, timesteps, np.array(rows), np.array(shares), np.array(peaks), np.array(spreads),
            np.array(entropies), frame_mass / len(steps), histograms, share_histograms, metadata,
        )  # fmt: skip

    def step_range(self, video_id: str, token: str) -> Range:
        """Range of the steps' maps of ``token`` under global or word normalisation."""
        statistics = self.statistics(video_id)
        histograms = statistics.shares if self.over == "real" else statistics.histograms
        if token not in histograms:
            return self._single_range(video_id, token)
        if self.over == "real" and PAD not in statistics.groups:
            self._real_mass(video_id, 0)  # raises
        if self.normalize == "word":
            return histograms[token].range(self.percentile)
        return _Histogram().merged(list(histograms.values())).range(self.percentile)

    def _single_range(self, video_id: str, token: str) -> Range:
        """A special group has a range of its own: pads would drown the words in a common one."""
        histogram = _Histogram()
        for step in self.analyzer.get_available_steps(video_id, token):
            histogram.add(self._map(video_id, token, step)[0])
        return histogram.range(self.percentile)

    def mean_range(self, video_id: str, token: str, step: int | None = None) -> Range:
        """Range of the maps averaged over steps (or of one step)."""
        words = self.analyzer.get_available_tokens(video_id)
        scope = token if self.normalize == "word" or token not in words else ""
        key = (f"{video_id}/{step}", scope)
        if key not in self._mean_ranges:
            histogram = _Histogram()
            for name in [scope] if scope else words:
                histogram.add(self._map(video_id, name, step)[0])
            self._mean_ranges[key] = histogram.range(self.percentile)
        return self._mean_ranges[key]

    def _range(self, shared: Range, values: np.ndarray) -> Range:
        """The range for one picture."""
        if self.normalize == "none":
            return Range(0.0, 1.0)
        return robust_range(values, self.percentile) if self.normalize == "frame" else shared

    def _shared_range(self, video_id: str, token: str, *, evolution: bool, step: int | None = None) -> Range:
        if self.normalize in ("none", "frame"):
            return Range(0.0, 1.0)
        return self.step_range(video_id, token) if evolution else self.mean_range(video_id, token, step)

    # -- videos

    def generate_attention_video(
        self,
        video_id: str,
        token_word: str,
        output_path: str | os.PathLike[str],
        original_video_path: str | os.PathLike[str] | None = None,
        overlay_alpha: float = 0.6,
        interpolation_steps: int = 2,
        include_timestamp: bool = False,
        use_aggregated: bool = False,
        *,
        step: int | None = None,
        fps: float | None = None,
        stretch_time: bool = False,
    ) -> Path:
        """Write the attention video, overlay or aggregated video of a word (the module's docstring says what each shows).

        Args:
            video_id, token_word: which maps.
            output_path: .mp4 or .avi.
            original_video_path: overlay on this video. Another size is fine (the maps are enlarged to it).
            overlay_alpha: opacity of the strongest attention.
            interpolation_steps: blended pictures between two steps (attention videos only).
            include_timestamp: print the time in the video on each frame.
            use_aggregated: the mean over steps: static without an original video.
            step: this step only, instead of the mean over steps.
            fps: overrides the visualizer's, or the original's for an overlay.
            stretch_time: accept an original with another number of frames, its time scaled to the maps'.

        Returns:
            ``output_path``.

        Raises:
            UsageError, ArtifactError: unknown words, missing or damaged maps, an original of another length.
        """
        output_path = Path(output_path)
        params = VisualizationParams(overlay_alpha=overlay_alpha, interpolation_steps=interpolation_steps)
        if output_path.suffix not in (".mp4", ".avi"):
            raise UsageError(f"--output {output_path}: wanted a name that ends in .mp4 or .avi")
        make_output_dir(output_path.parent, "--output")
        token_word = self._spelled(video_id, token_word)
        if original_video_path is not None:
            frames, rate = self._overlay(video_id, token_word, Path(original_video_path), params.overlay_alpha, step, stretch_time)
        elif use_aggregated or step is not None:
            frames, rate = self._static(video_id, token_word, step, fps or self.fps), self.fps
        else:
            frames, rate = self._evolution(video_id, token_word, params.interpolation_steps), self.fps
        rate = fps or rate
        about = {"prompt": self._prompt(video_id), "token": token_word}
        with VideoWriter(output_path, rate, VIDEO_QUALITY, VIDEO_PRESET, metadata=about) as writer:
            for index, (canvas, pictures, status) in enumerate(frames):
                stamp = f"{index / rate:06.2f} s · " if include_timestamp else ""
                writer.append(canvas.render(pictures, stamp + status))
        return output_path

    def _spelled(self, video_id: str, token_word: str) -> str:
        """The stored spelling of ``token_word`` (asked for in another case or by its folder)."""
        names = self.analyzer.get_available_tokens(video_id, include_special=True)
        folder = self.analyzer.get_token_folder(video_id, token_word)
        return next(name for name in names if self.analyzer.get_token_folder(video_id, name) == folder)

    def _prompt(self, video_id: str) -> str:
        return str(self.analyzer.get_video_metadata(video_id).get("clip", {}).get("prompt", ""))

    def _canvas(self, video_id: str, token: str, what: str, metadata: AttentionMetadata, limits: Range, frames: Sequence[int]) -> Canvas:
        captions = [_frames_caption(frame, metadata.video_dimensions.get("frames")) for frame in frames]
        size = (round(self.figsize[0] * DPI), round(self.figsize[1] * DPI))
        return Canvas(size, f"“{token}”: {what}", self._subtitle(video_id), captions, _tile_size(metadata), self.table, self._bar(limits))

    def _bar(self, limits: Range) -> tuple[float, float, str] | None:
        label = "own range" if self.normalize == "frame" else "weight" if self.over == "all" else "of real"
        return (limits.low, limits.high, label) if self.include_colorbar else None

    def _subtitle(self, video_id: str) -> str:
        picked = [f"{name} {index}" for name, index in (("block", self.block), ("head", self.head)) if index is not None]
        averaged = [f"{name}s" for name, index in (("block", self.block), ("head", self.head)) if index is None]
        parts = [video_id, *picked, *([f"mean over {' and '.join(averaged)}"] if averaged else []), f"colours: {self.normalize}"]
        return " · ".join([*parts, self._prompt(video_id)]).rstrip(" ·")

    def _evolution(self, video_id: str, token: str, between: int) -> Iterator[tuple[Canvas, list[np.ndarray], str]]:
        shared = self._shared_range(video_id, token, evolution=True)
        logger.info("%s %s: colours from %s (%s)", video_id, token, shared, self._scale_name())
        steps = self.analyzer.get_available_steps(video_id, token)
        canvas: Canvas | None = None
        previous: np.ndarray | None = None
        for step, _ in tqdm(
            self._checked_steps(video_id, token), total=len(steps), desc=f"{token}: attention", leave=False, disable=not self.progress
        ):
            values, metadata = self._map(video_id, token, step)
            shown = _spread(len(values), MAX_TILES)
            if canvas is None:
                canvas = self._canvas(video_id, token, "attention over the denoising steps", metadata, shared, shown)
            tiles = values[shown]
            for part in range(between + 1):
                if previous is None and part < between:
                    continue
                share = (part + 1) / (between + 1)
                mixed = tiles if previous is None or share == 1 else previous * (1 - share) + tiles * share
                pictures, note = self._colour(mixed, metadata, shared)
                timestep = "" if metadata.timestep is None else f" · t = {metadata.timestep:.0f}"
                place = f"{step}" if share == 1 else f"{step - 1 + share:.2f}"
                yield canvas, pictures, f"step {place} of {steps[-1]}{timestep} · mean {number(float(mixed.mean()))} · {note}"
            previous = tiles

    def _checked_steps(self, video_id: str, token: str) -> Iterator[tuple[int, None]]:
        """Step indices, after the check that none is missing (the maps are loaded by whoever shows them)."""
        steps = self.analyzer.get_available_steps(video_id, token)
        missing = next((expected for expected, step in enumerate(steps) if expected != step), None)
        if not steps or missing is not None:
            self.analyzer.load_step(video_id, token, missing or 0)  # raises, naming the file
        yield from ((step, None) for step in steps)

    def _colour(self, tiles: np.ndarray, metadata: AttentionMetadata, shared: Range) -> tuple[list[np.ndarray], str]:
        """Colour indices of each tile [h, w], and the note of the range."""
        limits = [self._range(shared, tile) for tile in tiles]
        pictures = [scale_to_index(expand(tile, metadata), limit.low, limit.high) for tile, limit in zip(tiles, limits, strict=True)]
        widest = Range(min(limit.low for limit in limits), max(limit.high for limit in limits))
        return pictures, f"range {widest}"

    def _scale_name(self) -> str:
        percent = "" if self.normalize == "none" else f", {self.percentile:g}th percentile"
        return f"--normalize {self.normalize}{percent}, --over {self.over}"

    def _static(self, video_id: str, token: str, step: int | None, fps: float) -> Iterator[tuple[Canvas, list[np.ndarray], str]]:
        shared = self._shared_range(video_id, token, evolution=False, step=step)
        logger.info("%s %s: colours from %s (%s)", video_id, token, shared, self._scale_name())
        values, metadata = self._map(video_id, token, step)
        shown = _spread(len(values), MAX_TILES)
        what = "attention, mean over steps" if step is None else f"attention at step {step}"
        canvas = self._canvas(video_id, token, what, metadata, shared, shown)
        pictures, note = self._colour(values[shown], metadata, shared)
        for _ in range(max(1, round(self.static_duration * fps))):
            yield canvas, pictures, f"mean {number(float(values.mean()))} · {note}"

    def _overlay(
        self, video_id: str, token: str, original: Path, alpha: float, step: int | None, stretch: bool
    ) -> tuple[Iterator[tuple[Canvas, list[np.ndarray], str]], float]:
        values, metadata = self._map(video_id, token, step)
        info = check_original(original, metadata, len(values), stretch)
        return self._overlay_frames(video_id, token, original, info, values, metadata, alpha, step), float(info["fps"])

    def _overlay_frames(
        self, video_id: str, token: str, original: Path, info: dict[str, Any], values: np.ndarray, metadata: AttentionMetadata,
        alpha: float, step: int | None,
    ) -> Iterator[tuple[Canvas, list[np.ndarray], str]]:  # fmt: skip
        shared = self._shared_range(video_id, token, evolution=False, step=step)
        logger.info("%s %s: colours from %s (%s)", video_id, token, shared, self._scale_name())
        width, height = info["size"]
        enlarge = max(1, math.ceil(360 / min(width, height)))  # captions need room beside a tiny clip
        what = "attention, mean over steps" if step is None else f"attention at step {step}"
        canvas = Canvas(
            None, f"“{token}”: {what}", self._subtitle(video_id), [""], (width * enlarge, height * enlarge), self.table, self._bar(shared)
        )
        expected = _frame_count(metadata, len(values))
        for index, frame in enumerate(
            tqdm(read_video(original), total=info["frames"], desc=f"{token}: overlay", leave=False, disable=not self.progress)
        ):
            source = index if info["frames"] == expected else round(index * (expected - 1) / max(1, info["frames"] - 1))
            latent = min(latent_frame_of(source), len(values) - 1)
            limits = self._range(shared, values[latent])
            picture = self.create_overlay(frame, values[latent], metadata, alpha, limits, enlarge)
            yield canvas, [picture], f"frame {index} of {info['frames'] - 1} · latent frame {latent} · range {limits}"

    def create_overlay(
        self, frame: np.ndarray, weights: np.ndarray, metadata: AttentionMetadata, alpha: float = 0.6, limits: Range | None = None,
        enlarge: int = 1,
    ) -> np.ndarray:  # fmt: skip
        """One picture, uint8 [H, W, 3], with one latent frame's weights [h, w] over it; ``enlarge`` times the size."""
        limits = limits or self._range(robust_range(weights, self.percentile), weights)
        if enlarge > 1:
            frame = frame.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        return blend(frame, expand(weights, metadata), self.table, limits.low, limits.high, alpha)

    # -- figures

    def generate_aggregated_attention_map(
        self, video_id: str, token_word: str, aggregate_steps: bool = True, save_path: str | os.PathLike[str] | None = None
    ) -> np.ndarray:
        """The word's map as float32: [F, H, W], the mean over steps; or all steps [steps, F, H, W] without ``aggregate_steps``.

        ``save_path`` also writes the mean as a picture (PNG).
        """
        token_word = self._spelled(video_id, token_word)
        mean, metadata = self._map(video_id, token_word, None)
        if save_path is not None:
            shown = _spread(len(mean), MAX_TILES)
            shared = self._shared_range(video_id, token_word, evolution=False)
            canvas = self._canvas(video_id, token_word, "attention, mean over steps", metadata, shared, shown)
            pictures, note = self._colour(mean[shown], metadata, shared)
            make_output_dir(Path(save_path).parent, "--output_dir")
            save_png(save_path, canvas.render(pictures, f"mean {number(float(mean.mean()))} · {note}"))
        if aggregate_steps:
            return mean
        return np.stack([self._map(video_id, token_word, step)[0] for step, _ in self._checked_steps(video_id, token_word)])

    def generate_temporal_comparison(
        self, video_id: str, tokens: Sequence[str] | None = None, save_path: str | os.PathLike[str] | None = None
    ) -> Figure:
        """Words beside each other: their curves over the steps, and a map of each at up to five steps (mean over frames).

        Returns the matplotlib figure; ``save_path`` also writes it.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        statistics = self.statistics(video_id)
        tokens = [self._spelled(video_id, token) for token in (tokens or statistics.words)]
        if not tokens:
            raise UsageError(f"{video_id} has no words to compare")
        shown = [statistics.steps[index] for index in _spread(len(statistics.steps), 5)]
        height = 2.2 + max(self.figsize[1] - 2.2, 1.3 * len(tokens) + 0.4)
        figure = Figure(figsize=(self.figsize[0], height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(2, 1, height_ratios=[2.2, height - 2.2])
        curves, maps = parts
        panels = (
            ("mean weight", statistics.mass, statistics.groups),
            ("spread (1: everywhere alike)", statistics.spread, statistics.words),
        )
        for axes, (name, rows, names) in zip(curves.subplots(1, 2), panels, strict=True):
            for token in tokens:
                if token in names:
                    axes.plot(
                        statistics.steps, rows[:, names.index(token)], marker="." if len(statistics.steps) < 30 else None, label="word"
                    )
            axes.set_xlabel("step")
            axes.set_title(name, fontsize=10)
        for entry, token in zip(curves.axes[0].legend(fontsize=8).get_texts(), tokens, strict=True):
            set_text(entry, token)
        grid = maps.subplots(len(tokens), len(shown), squeeze=False)
        for row, token in enumerate(tokens):
            limits = self._shared_range(video_id, token, evolution=True)
            for column, step in enumerate(shown):
                values, metadata = self._map(video_id, token, step)
                picture = expand(values.mean(axis=0), metadata)
                own = self._range(limits, picture)
                axes = grid[row, column]
                image = axes.imshow(picture, cmap=self.colormap, vmin=own.low, vmax=own.high)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(f"step {step}", fontsize=9)
                if column == 0:
                    set_text(axes.set_ylabel(""), token)
            if self.include_colorbar and self.normalize == "word":
                maps.colorbar(image, ax=list(grid[row]), fraction=0.02, pad=0.01)
        if self.include_colorbar and self.normalize in ("global", "none"):
            maps.colorbar(image, ax=list(grid.ravel()), fraction=0.02, pad=0.01, label="weight")
        set_text(figure.suptitle("", fontsize=11), f"{video_id}: {self._prompt(video_id)}"[:140])
        if save_path is not None:
            make_output_dir(Path(save_path).parent, "--output_dir")
            with atomic_path(save_path) as temporary:
                figure.savefig(temporary)
        return figure

    def _heatmap(self, video_id: str, step: int) -> tuple[np.ndarray, int]:
        """Image tokens by text tokens of one step: [rows, groups], the image tokens averaged to about 480 rows; rows a frame."""
        columns = []
        for group in self._heatmap_groups(video_id):
            values, _ = self._map(video_id, group, step)
            flat = values.reshape(len(values), -1)
            bins = max(1, min(flat.shape[1], HEATMAP_ROWS // len(flat)))
            edges = np.linspace(0, flat.shape[1], bins, endpoint=False).astype(int)
            sums = np.add.reduceat(flat, edges, axis=1) / np.diff(np.append(edges, flat.shape[1]))
            columns.append(sums.reshape(-1))
        return np.stack(columns, axis=1), bins

    def _heatmap_groups(self, video_id: str) -> list[str]:
        names = self.analyzer.get_available_tokens(video_id, include_special=True)
        return [name for name in names if not (self.over == "real" and name in (EOS, PAD))]

    def save_step_heatmaps(self, video_id: str, output_dir: str | os.PathLike[str]) -> list[Path]:
        """``attention_step_XXX.png`` for each step (text tokens across, image tokens down, brighter is more), the montage
        ``attention_montage.png`` of all and ``attention_animation.gif``. Returns their paths."""
        output_dir = make_output_dir(output_dir)
        statistics = self.statistics(video_id)
        groups = self._heatmap_groups(video_id)
        words = [group for group in groups if group not in SPECIAL_GROUPS] or groups
        limits = self._shared_range(video_id, words[0], evolution=True) if self.normalize != "word" else None
        drawing: _Heatmap | None = None
        montage: list[np.ndarray] = []
        animation: list[Any] = []
        paths = []
        thin = max(1, math.ceil(HEATMAP_ROWS / max(60, 24000 // len(statistics.steps))))  # a montage of at most 24,000 rows
        for step, timestep in tqdm(
            list(zip(statistics.steps, statistics.timesteps, strict=True)), desc=f"{video_id}: step pictures", disable=not self.progress
        ):
            matrix, bins = self._heatmap(video_id, step)
            if self.normalize == "word":
                ranges = [self.step_range(video_id, group) for group in groups]
                low, high = (np.array([getattr(one, side) for one in ranges]) for side in ("low", "high"))
                index = np.clip((matrix - low) / (high - low) * 255 + 0.5, 0, 255).astype(np.uint8)
                scale = Range(0, 1)
            else:
                assert limits is not None
                scale = self._range(limits, matrix)
                index = scale_to_index(matrix, scale.low, scale.high)
            if drawing is None:
                label = (
                    "of each word's range"
                    if self.normalize == "word"
                    else "of this step's range"
                    if self.normalize == "frame"
                    else "weight"
                )
                drawing = _Heatmap(groups, bins, matrix.shape[0] // bins, self.figsize, self.colormap, scale, label, self.include_colorbar)
            at = "" if timestep is None else f" (t = {timestep:.0f})"
            picture = drawing.draw(self.table[index], f"step {step}{at}: text tokens by image tokens, range {scale}")
            path = output_dir / f"attention_step_{step:03d}.png"
            save_png(path, picture)
            paths.append(path)
            montage.append(index[::thin])
            animation.append(_gif_frame(picture))
        paths.append(output_dir / "attention_montage.png")
        self._save_montage(paths[-1], video_id, montage, statistics.steps, scale)
        paths.append(output_dir / "attention_animation.gif")
        with atomic_path(paths[-1]) as temporary:
            animation[0].save(temporary, save_all=True, append_images=animation[1:], duration=max(20, round(1000 / self.fps)), loop=0)
        return paths

    def _save_montage(self, path: Path, video_id: str, cells: Sequence[np.ndarray], steps: Sequence[int], scale: Range) -> None:
        columns = max(1, round(math.sqrt(len(cells) * self.figsize[0] / self.figsize[1])))
        rows = math.ceil(len(cells) / columns)
        size = (max(round(self.figsize[0] * DPI), columns * 110), max(round(self.figsize[1] * DPI), rows * 150))
        canvas = Canvas(
            size, f"all {len(cells)} steps: text tokens across, image tokens down", self._subtitle(video_id),
            [f"step {step}" for step in steps], (90, 110), self.table, self._bar(scale),
        )  # fmt: skip
        save_png(path, canvas.render(cells, "columns: " + ", ".join(self._heatmap_groups(video_id))))

    # -- the analysis report

    def write_analysis_report(self, video_id: str, output_path: str | os.PathLike[str]) -> Path:
        """``attention_analysis_report.md``: token importance, step evolution, entropy, the strongest token of each step."""
        statistics = self.statistics(video_id)
        clip = self.analyzer.get_video_metadata(video_id).get("clip", {})
        dimensions, text = statistics.metadata.video_dimensions, io.StringIO()
        out = lambda line="": print(line, file=text)  # noqa: E731
        out("# Attention analysis\n")
        out(f"- video: {_md(video_id)}")
        if clip.get("prompt"):
            out(f"- prompt: {_md(clip['prompt'])}")
        out(
            f"- size: {dimensions.get('width')}x{dimensions.get('height')}, {dimensions.get('frames')} frames at "
            f"{dimensions.get('fps')} fps; token grid (frames, rows, columns) {_shape(statistics.metadata)}"
        )
        out(
            f"- steps stored: {len(statistics.steps)} of {statistics.metadata.num_inference_steps or len(statistics.steps)}; "
            f"averaged over {', '.join(statistics.metadata.averaged_over) or 'nothing'}"
        )
        out("\nWeights are exact softmax weights of cross-attention, averaged over image tokens. `_other` are the prompt's real tokens "
            "that were not followed, `_eos` its end token, `_pad` all padding after it (Wan masks none of it).\n")  # fmt: skip
        out("## Token importance\n")
        out("| token | mean weight | share of real words | largest weight | strongest at step | spread (1: everywhere alike) |")
        out("| --- | ---: | ---: | ---: | ---: | ---: |")
        order = sorted(
            range(len(statistics.groups)), key=lambda column: (column >= len(statistics.words), -statistics.mass[:, column].mean())
        )
        for column in order:
            mass = statistics.mass[:, column]
            best = statistics.steps[int(mass.argmax())]
            rest = "| | "
            share = ""
            if column < len(statistics.words):
                share = _percent(statistics.share[:, column].mean())
                rest = f"{number(statistics.peak[:, column].max())} | {best} | {statistics.spread[:, column].mean():.3f}"
                out(f"| {_md(statistics.groups[column])} | {number(mass.mean())} | {share} | {rest} |")
            else:
                out(f"| {_md(statistics.groups[column])} | {number(mass.mean())} | | | {best} | |")
        out("\n## Step evolution\n")
        shown = [statistics.steps.index(statistics.steps[index]) for index in _spread(len(statistics.steps), 6)]
        out("| token | " + " | ".join(f"step {statistics.steps[row]}" for row in shown) + " | last / first |")
        out("| --- |" + " ---: |" * (len(shown) + 1))
        for column, group in enumerate(statistics.groups):
            mass = statistics.mass[:, column]
            ratio = mass[-1] / mass[0] if mass[0] > 0 else math.nan
            out(f"| {_md(group)} | " + " | ".join(number(mass[row]) for row in shown) + f" | {ratio:.2f} |")
        out("\n## Attention entropy\n")
        limit = math.log2(max(2, len(statistics.groups)))
        out(f"Mean entropy of an image token's distribution over the {len(statistics.groups)} groups, in bits (at most {limit:.2f}): "
            f"first step {statistics.entropy[0]:.3f}, last step {statistics.entropy[-1]:.3f}, mean {statistics.entropy.mean():.3f}, "
            f"least {statistics.entropy.min():.3f} at step {statistics.steps[int(statistics.entropy.argmin())]}.\n")  # fmt: skip
        out("## Strongest token of each step\n")
        out("| step | t | strongest word | its mean weight | entropy (bits) |")
        out("| ---: | ---: | --- | ---: | ---: |")
        strongest = statistics.strongest() or [("", math.nan)] * len(statistics.steps)
        for row, (word, weight) in enumerate(strongest):
            timestep = statistics.timesteps[row]
            at = "" if timestep is None else f"{timestep:.0f}"
            out(f"| {statistics.steps[row]} | {at} | {_md(word)} | {number(weight)} | {statistics.entropy[row]:.3f} |")
        make_output_dir(Path(output_path).parent)
        write_text(output_path, text.getvalue())
        return Path(output_path)


class _Heatmap:
    """The step picture: axes and labels are drawn once by matplotlib, then only the matrix and the title change."""

    def __init__(
        self,
        groups: Sequence[str],
        bins: int,
        frames: int,
        figsize: tuple[float, float],
        colormap: str,
        scale: Range,
        label: str,
        bar: bool,
    ):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        figure = Figure(figsize=figsize, dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.94 if not bar else 1.0, top=0.92, bottom=0.2)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(bins * frames - 0.5, -0.5)
        axes.set_xticks(range(len(groups)))
        names = [group if len(group) < 24 else group[:23] + "…" for group in groups]
        for tick, name in zip(axes.set_xticklabels([printable(name)[0] for name in names], rotation=40, ha="right"), names, strict=True):
            set_text(tick, name)
        shown = _spread(frames, 12)
        axes.set_yticks([frame * bins for frame in shown])
        axes.set_yticklabels([f"latent {frame}" for frame in shown], fontsize=8)
        axes.set_xlabel("text tokens (context)")
        axes.set_ylabel("image tokens (query), by latent frame")
        if bar:
            figure.colorbar(ScalarMappable(Normalize(scale.low, scale.high), cmap=colormap), ax=axes, label=label)
        canvas.draw()
        self._pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        height = self._pixels.shape[0]
        box = axes.get_window_extent()
        self._box = (round(box.x0), height - round(box.y1), round(box.x1), height - round(box.y0))

    def draw(self, colours: np.ndarray, title: str) -> np.ndarray:
        """uint8 [rows, groups, 3] into the axes, under ``title``."""
        import cv2
        from PIL import Image, ImageDraw

        from wan_common.attention_canvas import fit_text

        x0, y0, x1, y1 = self._box
        frame = self._pixels.copy()
        shrink = colours.shape[0] > y1 - y0
        frame[y0:y1, x0:x1] = cv2.resize(colours, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_NEAREST)
        picture = Image.fromarray(frame)
        text, font = fit_text(title, 15, frame.shape[1] - x0 - 10)
        ImageDraw.Draw(picture).text((x0, max(2, y0 - 28)), text, (0, 0, 0), font)
        return np.asarray(picture)


def _gif_frame(picture: np.ndarray) -> Any:
    """A GIF frame of at most 720 pixels' width: 50 steps stay below some 5 MB."""
    from PIL import Image

    image = Image.fromarray(picture)
    if image.width > 720:
        image = image.resize((720, round(image.height * 720 / image.width)), Image.Resampling.BOX)
    return image.quantize(128, dither=Image.Dither.NONE)


def save_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """uint8 [H, W, 3] to a PNG, atomically."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def expand(weights: np.ndarray, metadata: AttentionMetadata) -> np.ndarray:
    """A stored [h, w] map on the token grid [H, W]: cells of a spatial_downsample_factor repeated, the cut ones at the edge cut."""
    factor = metadata.spatial_downsample_factor
    if factor == 1 or len(metadata.latent_grid) != 3:
        return weights
    _, height, width = metadata.latent_grid
    return weights.repeat(factor, axis=-2).repeat(factor, axis=-1)[..., :height, :width]


def _shape(metadata: AttentionMetadata) -> list[int]:
    return list(metadata.latent_grid) or list(metadata.shape[-3:])


def _tile_size(metadata: AttentionMetadata) -> tuple[int, int]:
    """Aspect ratio of the video, or of the grid when its size is not known."""
    width, height = (metadata.video_dimensions.get(side) for side in ("width", "height"))
    grid = _shape(metadata)
    return (int(width), int(height)) if width and height else (grid[-1], grid[-2])


def _frame_count(metadata: AttentionMetadata, latent_frames: int) -> int:
    return int(metadata.video_dimensions.get("frames") or 4 * (latent_frames - 1) + 1)


def _frames_caption(latent: int, total: int | None) -> str:
    frames = video_frames_of(latent)
    if total is not None and frames[-1] >= total:
        frames = range(frames[0], max(total, frames[0] + 1))
    return f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]} to {frames[-1]}"


def check_original(path: Path, metadata: AttentionMetadata, latent_frames: int, stretch: bool = False) -> dict[str, Any]:
    """``probe`` of the original video, checked against the maps.

    Raises:
        ArtifactError: missing, unreadable, or of another number of frames (unless ``stretch``).
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such video; make it with stage3_vae_decoder.py, or leave --original-video out")
    info = probe(path)
    expected = _frame_count(metadata, latent_frames)
    if info["frames"] != expected and not stretch:
        raise ArtifactError(
            f"{path}: {info['frames']} frames, the maps belong to a video of {expected}; pass that run's video, or "
            "--stretch_time to scale its time"
        )
    if info["frames"] != expected:
        logger.warning("%s: %d frames stretched over the %d of the maps", path, info["frames"], expected)
    width, height = _tile_size(metadata)
    if abs(info["size"][0] / info["size"][1] / (width / height) - 1) > 0.02:
        logger.warning("%s: %dx%d has another shape than the maps' %dx%d; they are stretched to it", path, *info["size"], width, height)
    return info


def _together(streams: Sequence[Iterator[tuple[int, AttentionMap]]], groups: Sequence[str]) -> Iterator[list[tuple[int, AttentionMap]]]:
    """The groups' streams side by side; an error when one has other steps."""
    for entries in itertools.zip_longest(*streams):
        steps = {None if entry is None else entry[0] for entry in entries}
        if len(steps) != 1:
            lacking = next(group for group, entry in zip(groups, entries, strict=True) if entry is None)
            present = next(entry for entry in entries if entry is not None)
            raise ArtifactError(
                f"{lacking}: step {present[0]} is missing, others have it; rerun stage2_transformer.py with --store_attention --force"
            )
        yield list(entries)


def _entropy(values: np.ndarray) -> np.ndarray:
    """Entropy in bits over the first axis, which is normalised to 1."""
    values = np.maximum(values.astype(np.float64), 1e-30)
    shares = values / values.sum(axis=0)
    return -(shares * np.log2(shares)).sum(axis=0)


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly, first and last included."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def _md(text: str) -> str:
    """Text for a Markdown table: its control characters and HTML shown, not acted on."""
    text = " ".join(str(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|!$~])", r"\\\1", text)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2f}%"


# --------------------------------------------------------------------------------------------------------------- all at once


def visualize_run(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    attention_dir: str | os.PathLike[str] | None = None,
    video_ids: Sequence[str] | None = None,
    params: VisualizationParams | None = None,
    normalize: str = "global",
    percentile: float = 99.0,
    over: str = "all",
    original_video: str | os.PathLike[str] | None = None,
    stretch_time: bool = False,
    videos: bool = True,
    figures: bool = True,
    report: bool = True,
    include_timestamp: bool = False,
    block: int | None = None,
    head: int | None = None,
) -> list[Path]:
    """Everything there is to see of a run: videos of every word, step pictures, montage, animation, both reports.

    Args:
        input_dir: the run directory; its ``attention_maps`` unless ``attention_dir`` is given, its ``output_video*.mp4`` for
            overlays unless ``original_video`` is given. Without a video the overlays are left out, with a warning.
        output_dir: for one clip everything lies there, videos in ``attention_videos/``; for several, the pictures and reports
            lie in a folder each (``output_dir/<video_id>/``).
        params: looks; colour map, sizes, speeds.
        videos, figures, report: what to make (``figures``: 002's pictures and the Markdown report; ``report``: the HTML report).

    Returns:
        The files written.

    Raises:
        UsageError, ArtifactError: see :class:`AttentionVisualizer`.
    """
    from wan_common.attention_report import build_report

    params = params or VisualizationParams()
    input_dir, output_dir = Path(input_dir), make_output_dir(output_dir)
    analyzer = AttentionAnalyzer(attention_dir or input_dir / "attention_maps")
    available = analyzer.get_available_videos()
    chosen = list(video_ids or available)
    if not chosen:
        raise ArtifactError(f"{analyzer.attention_dir}: no clip in it; rerun stage2_transformer.py with --store_attention")
    clips = [video for video in chosen if not (video.endswith(NEGATIVE_SUFFIX) and video.removesuffix(NEGATIVE_SUFFIX) in chosen)]
    if original_video is not None and len(clips) > 1:
        raise UsageError(f"--original-video belongs to one clip, and there are {len(clips)}: choose with --video-id {clips[0]}")
    visualizer = AttentionVisualizer(
        analyzer, params.figsize, params.colormap, params.fps, normalize=normalize, percentile=percentile, over=over,
        include_colorbar=params.include_colorbar, static_duration=params.static_duration, block=block, head=head,
    )  # fmt: skip
    written: list[Path] = []
    for video_id in chosen:
        original = _original(analyzer, video_id, input_dir, original_video)
        target = output_dir if len(chosen) == 1 or (len(clips) == 1 and video_id in clips) else make_output_dir(output_dir / video_id)
        if figures:
            written += visualizer.save_step_heatmaps(video_id, target)
            written.append(visualizer.write_analysis_report(video_id, target / "attention_analysis_report.md"))
            if visualizer.statistics(video_id).words:
                visualizer.generate_temporal_comparison(video_id, save_path=target / "temporal_comparison.png")
                written.append(target / "temporal_comparison.png")
        if videos:
            folder = make_output_dir(output_dir / "attention_videos")
            written += _all_videos(visualizer, video_id, folder, params, original, stretch_time, include_timestamp)
        if report and video_id in clips:
            negative = video_id + NEGATIVE_SUFFIX
            written.append(
                build_report(visualizer, video_id, target / "attention_report.html", original=original, params=params,
                             negative_id=negative if negative in available else None, stretch_time=stretch_time)
            )  # fmt: skip
    return written


def _original(analyzer: AttentionAnalyzer, video_id: str, input_dir: Path, given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        return Path(given)
    suffix = analyzer.get_video_metadata(video_id).get("clip", {}).get("suffix", "")
    path = input_dir / f"output_video{suffix}.mp4"
    batch = re.sub(r"^(prompt_\d+)_vid_(\d+)(_negative)?$", r"videos/\1/video_\2.mp4", video_id)  # where generate.py puts a batch
    for candidate in (path, input_dir / batch):
        if candidate.is_file():
            return candidate
    logger.warning("%s: no such video, so no overlays; run stage3_vae_decoder.py first, or pass --original-video", path)
    return None


def _all_videos(
    visualizer: AttentionVisualizer, video_id: str, folder: Path, params: VisualizationParams, original: Path | None, stretch: bool,
    include_timestamp: bool,
) -> list[Path]:  # fmt: skip
    written = []
    for token in visualizer.analyzer.get_available_tokens(video_id):
        name = f"{video_id}_{visualizer.analyzer.get_token_folder(video_id, token)}"
        path = folder / f"{name}_attention.{params.video_format}"
        written.append(
            visualizer.generate_attention_video(
                video_id, token, path, interpolation_steps=params.interpolation_steps, include_timestamp=include_timestamp
            )
        )
        path = folder / f"{name}_aggregated.{params.video_format}"
        written.append(visualizer.generate_attention_video(video_id, token, path, use_aggregated=True, include_timestamp=include_timestamp))
        if original is not None:
            path = folder / f"{name}_overlay.{params.video_format}"
            written.append(
                visualizer.generate_attention_video(
                    video_id, token, path, original, params.overlay_alpha, include_timestamp=include_timestamp, stretch_time=stretch
                )
            )
    return written
