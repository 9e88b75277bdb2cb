"""``attention_report.html``: one offline file to look at a clip's attention: every word over the video, any step, side by side.

Everything is inside the file: the video's frames as JPEG (drawn on a canvas, so no codec is needed and overlay and frame never
drift apart), the maps as 8-bit PNG atlases with a scale of their own each, the numbers as JSON. A content security policy in the
page forbids any network access. Text goes through Jinja2's autoescaping, JSON through its HTML-safe ``tojson``.
"""

from __future__ import annotations

import base64
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tqdm import tqdm

from wan_common.atomic import make_output_dir, write_text
from wan_common.attention_canvas import colour_table, number
from wan_common.attention_maps import EOS, OTHER, PAD, SPECIAL_GROUPS, VisualizationParams, frame_map
from wan_common.video import read_video

if TYPE_CHECKING:
    from wan_common.attention_visualizer import AttentionVisualizer, ClipStatistics

logger = logging.getLogger("attention")

MAP_BYTES = 24_000_000  # raw 8-bit weights in the file; beyond it steps are left out evenly, and the page says so
FRAME_WIDTH, FRAME_COUNT = 640, 161  # the video is shown at most so wide; longer ones are thinned to at most so many frames
JPEG_QUALITY = 85
COLOUR_MAPS = ("hot", "viridis", "magma", "turbo", "gray")
EXPLAINED = {
    OTHER: "the prompt's real tokens that were not followed",
    EOS: "the end token of the prompt",
    PAD: "all padding after the prompt: Wan masks none of it",
}


def build_report(
    visualizer: AttentionVisualizer,
    video_id: str,
    path: str | os.PathLike[str],
    *,
    original: str | os.PathLike[str] | None = None,
    params: VisualizationParams | None = None,
    negative_id: str | None = None,
    stretch_time: bool = False,
) -> Path:
    """Write the HTML report of one clip.

    Args:
        visualizer: its analyzer's maps, colour map, normalisation, percentile and view are where the page starts.
        video_id: the clip. negative_id: the maps of its negative prompt, if stored.
        path: the file to write.
        original: the clip's video; without one the page shows the maps alone and says how to get the video.
        params: overlay_alpha, fps.
        stretch_time: see :meth:`AttentionVisualizer.generate_attention_video`.

    Raises:
        ArtifactError: as the visualizer's.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    params = params or VisualizationParams()
    statistics = [visualizer.statistics(name) for name in (video_id, negative_id) if name is not None]
    first = statistics[0]
    video, frames = _frames(visualizer, first, original, stretch_time)
    raw = sum(_raw_bytes(one) for one in statistics)
    most_steps = max(1, MAP_BYTES // max(1, raw))
    clips = [_clip(visualizer, one, label, most_steps) for one, label in zip(statistics, ("prompt", "negative prompt"), strict=False)]
    names = list(dict.fromkeys((visualizer.colormap, *COLOUR_MAPS)))
    data = {
        "video": video,
        "frames": frames,
        "clips": clips,
        "tables": {name: base64.b64encode(colour_table(name).tobytes()).decode() for name in names},
        "start": {
            "normalize": visualizer.normalize, "over": visualizer.over, "opacity": params.overlay_alpha,
            "percentile": visualizer.percentile, "colormap": visualizer.colormap,
        },
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("wan_common", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    assert environment.loader is not None
    style, script = (Markup(environment.loader.get_source(environment, f"attention_report.{kind}")[0]) for kind in ("css", "js"))
    clip = visualizer.analyzer.get_video_metadata(video_id).get("clip", {})
    text = environment.get_template("attention_report.html.j2").render(
        title=video_id, prompt=clip.get("prompt", ""), facts=_facts(visualizer, first, clip), tables=[_table(one) for one in statistics],
        labels=[one["label"] for one in clips], strongest=_strongest(first), data=data, style=style, script=script,
        explained=EXPLAINED, has_video=original is not None, negative=negative_id is not None,
    )  # fmt: skip
    path = Path(path)
    make_output_dir(path.parent)
    write_text(path, text)
    logger.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return path


def _raw_bytes(statistics: ClipStatistics) -> int:
    """Bytes a step takes: a map for each group and the mass of real words."""
    return (len(statistics.groups) + 1) * math.prod(statistics.metadata.latent_grid or statistics.metadata.shape[-3:])


def _frames(
    visualizer: AttentionVisualizer, statistics: ClipStatistics, original: str | os.PathLike[str] | None, stretch: bool
) -> tuple[dict[str, Any], list[str]]:
    """What the page needs of the video, and its frames as base64 JPEG."""
    from wan_common.attention_visualizer import _frame_count, _tile_size, check_original

    metadata = statistics.metadata
    latent = metadata.shape[-3] if len(metadata.shape) > 2 else 1
    mapped = _frame_count(metadata, latent)
    if original is None:
        width, height = _tile_size(metadata)
        scale = min(1.0, FRAME_WIDTH / width)
        fps = float(metadata.video_dimensions.get("fps") or 16)
        sides = {"width": max(2, round(width * scale)), "height": max(2, round(height * scale))}
        return {**sides, "fps": fps, "count": mapped, "stride": 1, "mapped": mapped}, []
    info = check_original(Path(original), metadata, latent, stretch)
    width, height = info["size"]
    scale = min(1.0, FRAME_WIDTH / width)
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    stride = max(1, math.ceil(info["frames"] / FRAME_COUNT))
    frames = []
    for index, frame in enumerate(
        tqdm(read_video(original), total=info["frames"], desc="report: frames", leave=False, disable=not visualizer.progress)
    ):
        if index % stride == 0:
            small = frame if scale == 1.0 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            frames.append(_encode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]))
    video = {"width": size[0], "height": size[1], "fps": info["fps"], "count": info["frames"], "stride": stride, "mapped": mapped}
    return video, frames


def _encode(kind: str, picture: np.ndarray, options: list[int]) -> str:
    done, buffer = cv2.imencode(kind, picture, options)
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {picture.shape} picture as {kind}")
    return base64.b64encode(buffer.tobytes()).decode()


def _clip(visualizer: AttentionVisualizer, statistics: ClipStatistics, label: str, most_steps: int) -> dict[str, Any]:
    """Maps, ranges and curves of one prompt."""
    from wan_common.attention_visualizer import _Histogram, _spread, expand

    video_id, metadata = statistics.video_id, statistics.metadata
    rows = _spread(len(statistics.steps), min(most_steps, len(statistics.steps)))
    if len(rows) < len(statistics.steps):
        logger.warning("report: %d of %d steps shown (%d MB of maps at most)", len(rows), len(statistics.steps), MAP_BYTES // 1_000_000)
    shown: list[int | None] = [statistics.steps[row] for row in rows]
    shown.append(None)  # the mean over all steps
    maps: list[list[dict[str, Any]]] = [[] for _ in statistics.groups]
    real: list[dict[str, Any]] = []
    complete = PAD in statistics.groups and EOS in statistics.groups
    means: dict[str, dict[str, Any]] = {"all": {}, "real": {}}
    columns = 1
    for step in tqdm(shown, desc=f"{video_id}: report", leave=False, disable=not visualizer.progress):
        values = {}
        for group in statistics.groups:
            loaded = visualizer._load(video_id, group, step)
            values[group] = expand(frame_map(loaded, visualizer.block, visualizer.head), metadata)
        for entries, group in zip(maps, statistics.groups, strict=True):
            picture, columns = _atlas(values[group])
            entries.append(picture)
        if complete:
            rest = np.maximum(1 - values[PAD] - values[EOS], 1e-9)
            real.append(_atlas(rest)[0])
        if step is None:
            for over in ("all", "real") if complete else ("all",):
                for word in statistics.words:
                    means[over][word] = _Histogram()
                    means[over][word].add(values[word] if over == "all" else np.clip(values[word] / rest, 0, 1))
    ranges: dict[str, Any] = {}
    for over, histograms in (("all", statistics.histograms), ("real", statistics.shares)):
        if over == "real" and not complete:
            continue
        ranges[over] = {
            kind: {
                "global": _limits(_Histogram().merged(list(source.values())), visualizer.percentile) if source else [0.0, 1.0],
                "word": {word: _limits(source[word], visualizer.percentile) for word in statistics.words},
            }
            for kind, source in (("steps", histograms), ("mean", means[over]))
        }
    grid = list(values[statistics.groups[0]].shape)
    return {
        "id": video_id, "label": label, "steps": shown[:-1], "timesteps": [statistics.timesteps[row] for row in rows],
        "all_steps": statistics.steps, "grid": grid, "columns": columns, "maps": maps, "real": real, "ranges": ranges,
        "groups": [{"name": name, "special": name in SPECIAL_GROUPS} for name in statistics.groups],
        "mass": _rounded(statistics.mass), "entropy": _rounded(statistics.entropy), "spread": _rounded(statistics.spread),
        "share": _rounded(statistics.share) if complete else [],
    }  # fmt: skip


def _limits(histogram: Any, percentile: float) -> list[float]:
    limits = histogram.range(percentile)
    return [float(f"{limits.low:.6g}"), float(f"{limits.high:.6g}")]


def _rounded(values: np.ndarray) -> Any:
    return np.vectorize(lambda value: float(f"{value:.5g}"))(values).tolist() if values.size else []


def _atlas(values: np.ndarray) -> tuple[dict[str, Any], int]:
    """[F, H, W] as one 8-bit PNG, frames in rows of ``columns``; value = low + pixel / 255 * (high - low)."""
    frames, height, width = values.shape
    columns = max(1, round(math.sqrt(frames * height / width)))
    rows = math.ceil(frames / columns)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    sheet = np.zeros((rows * columns, height, width), np.uint8)
    sheet[:frames] = scaled + 0.5
    sheet = sheet.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    return {"png": _encode(".png", sheet, [cv2.IMWRITE_PNG_COMPRESSION, 6]), "low": low, "high": high}, columns


def _facts(visualizer: AttentionVisualizer, statistics: ClipStatistics, clip: dict[str, Any]) -> list[tuple[str, str]]:
    metadata = statistics.metadata
    dimensions = metadata.video_dimensions
    facts = [
        (
            "video",
            f"{dimensions.get('width')}×{dimensions.get('height')}, {dimensions.get('frames')} frames at {dimensions.get('fps')} fps",
        ),
        ("token grid", " × ".join(map(str, metadata.latent_grid or metadata.shape[-3:])) + " (frames, rows, columns)"),
        ("steps", f"{len(statistics.steps)} of {metadata.num_inference_steps or len(statistics.steps)}"),
        ("averaged over", ", ".join(name + "s" for name in metadata.averaged_over if name != "step") or "nothing"),
    ]
    if visualizer.block is not None or visualizer.head is not None:
        facts.append(("shown", f"block {visualizer.block}, head {visualizer.head}".replace("None", "mean")))
    facts += [(str(key), str(value)) for key, value in clip.get("extra", {}).items() if isinstance(value, (str, int, float))]
    return facts


def _table(statistics: ClipStatistics) -> list[dict[str, str]]:
    """Rows of the word table, by mean weight, special groups last."""
    rows = []
    for column, group in enumerate(statistics.groups):
        mass, word = statistics.mass[:, column], column < len(statistics.words)
        share = statistics.share[:, column].mean() if word else math.nan
        rows.append({
            "name": group, "special": "" if word else EXPLAINED.get(group, ""), "weight": f"{mass.mean():.5f}", "order": -mass.mean(),
            "share": "" if math.isnan(share) else f"{100 * share:.2f} %", "peak": number(statistics.peak[:, column].max()) if word else "",
            "best": str(statistics.steps[int(mass.argmax())]), "spread": f"{statistics.spread[:, column].mean():.3f}" if word else "",
        })  # fmt: skip
    return sorted(rows, key=lambda row: (bool(row["special"]), row["order"]))


def _strongest(statistics: ClipStatistics) -> list[dict[str, str]]:
    strongest = statistics.strongest() or [("", math.nan)] * len(statistics.steps)
    return [
        {
            "step": str(step), "timestep": "" if timestep is None else f"{timestep:.0f}", "word": word,
            "weight": "" if math.isnan(weight) else f"{weight:.5f}", "entropy": f"{entropy:.3f}",
        }
        for step, timestep, (word, weight), entropy in zip(
            statistics.steps, statistics.timesteps, strongest, statistics.entropy, strict=True
        )
    ]  # fmt: skip
