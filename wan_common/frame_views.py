"""A denoising as pictures and numbers: decoded frames, previews, statistics, step by step from the step latents.

Frames are counted in video frames; video frame i lies in latent frame ``(i + 3) // 4``. Entry 0 of a clip is its initial
noise, entry k + 1 is what step k left. Light enough to be imported by stage 2 (no matplotlib): the figures are in
``frame_figures.py``, the files of ``visualize_frames.py`` in ``frame_debug.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from wan_common.atomic import atomic_path
from wan_common.latent_rgb import latents_to_rgb
from wan_common.latents import latent_frame_of
from wan_common.step_latents import INITIAL_NOISE, Step, StepLatents

logger = logging.getLogger("frame_views")

PREVIEW_WIDTH = 960  # pixels, about
BAD = (255, 0, 255)  # NaN and infinity are drawn in magenta, which no colour map here and no clip of ours has

Pictures = dict[int, np.ndarray]
"""Video frame -> uint8 [H, W, 3]."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How latents become pictures: ``frames(latents [1, 16, F, h, w] of any float dtype, video frames) -> Pictures``."""

    name: str
    frames: Callable[[np.ndarray, Sequence[int]], Pictures]


def rgb_decoder(coefficients: Any) -> Decoder:
    """Linear preview by ``coefficients`` (``latent_rgb.load_latent_rgb``), 1/8 of the video's size, no VAE.

    All video frames of one latent frame share a picture. Latents that are not finite become magenta.
    """

    def frames(latents: np.ndarray, wanted: Sequence[int]) -> Pictures:
        kept = sorted({latent_frame_of(i) for i in wanted})
        part = latents[0][:, kept].astype(np.float32)
        finite = np.isfinite(part)
        pictures = latents_to_rgb(np.where(finite, part, 0), coefficients)
        pictures[~finite.all(axis=0)] = BAD
        return {i: pictures[kept.index(latent_frame_of(i))] for i in wanted}

    return Decoder("rgb", frames)


def vae_decoder(vae: Any) -> Decoder:
    """Through the VAE as stage 3 does; ``vae`` is ``vae.load_vae_decoder``'s. Latent frames after the last wanted are not decoded.

    Latents that are not finite give magenta pictures, for a causal decoder would spread them anyhow.
    """

    def frames(latents: np.ndarray, wanted: Sequence[int]) -> Pictures:
        last = latent_frame_of(max(wanted))
        part = np.ascontiguousarray(latents[:, :, : last + 1], dtype=np.float32)
        if not np.isfinite(part).all():
            height, width = 8 * latents.shape[3], 8 * latents.shape[4]
            return dict.fromkeys(wanted, np.full((height, width, 3), BAD, np.uint8))
        pictures: Pictures = {}
        number = 0
        for chunk in vae.decode(part):
            for picture in chunk:
                if number in wanted:
                    pictures[number] = np.array(picture)
                number += 1
        return pictures

    return Decoder("vae", frames)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A clip at one point of its denoising: ``x`` [1, C, F, h, w] and the ``x0`` predicted there (None for the initial noise).

    ``key`` stands in file names (``t999``), ``title`` in figures, ``sigma`` is the noise level of ``x``.
    """

    step: Step | None
    key: str
    title: str
    sigma: float
    x: np.ndarray
    x0: np.ndarray | None

    @property
    def file(self) -> str:
        """The name of the file it was read from."""
        return INITIAL_NOISE if self.step is None else self.step.path.name


def step_keys(clip: StepLatents) -> list[str]:
    """``t{timestep}`` for each step, as in seed 000; steps that share one become ``t{timestep}_step{index}``."""
    keys = [f"t{step.timestep:.6g}" for step in clip.steps]
    return [f"{key}_step{index}" if keys.count(key) > 1 else key for index, key in enumerate(keys)]


def entries(clip: StepLatents) -> Iterator[Entry]:
    """The initial noise and every step of ``clip``, read one by one."""
    first = clip.steps[0]
    yield Entry(None, "initial", f"initial noise  (σ = {first.sigma:.3f})", first.sigma, clip.initial_noise(), None)
    for step, key in zip(clip.steps, step_keys(clip), strict=True):
        levels = f"t = {step.timestep:.6g}, σ {step.sigma:.3f} → {step.sigma_next:.3f}"
        title = f"after step {step.index + 1} of {clip.num_inference_steps}  ({levels})"
        x, x0 = clip.read(step)
        yield Entry(step, key, title, step.sigma_next, x, x0)


def tensor_stats(tensor: np.ndarray) -> dict[str, Any]:
    """Shape, dtype, mean, (population) std, min, max, nan and inf counts; the numbers are over the finite values, in float64.

    With no finite value they are None.
    """
    finite = np.isfinite(tensor) if tensor.dtype.kind != "u" else np.ones(tensor.shape, bool)
    values = tensor[finite].astype(np.float64)
    numbers = dict.fromkeys(("mean", "std", "min", "max"))
    if values.size:
        numbers = {name: float(getattr(values, name)()) for name in numbers}
    nan_count = int(np.isnan(tensor).sum()) if tensor.dtype.kind != "u" else 0
    return {
        "shape": list(tensor.shape), "dtype": str(tensor.dtype), **numbers,
        "nan_count": nan_count, "inf_count": int(tensor.size - finite.sum()) - nan_count,
    }  # fmt: skip


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly chosen, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def encode_png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB as a PNG file's bytes."""
    return cv2.imencode(".png", picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()


def write_png(picture: np.ndarray, *paths: Path) -> None:
    """Write uint8 [H, W, 3] RGB to each of ``paths``, atomically."""
    data = encode_png(picture)
    for path in paths:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)


def write_preview(path: str | os.PathLike[str], predicted_x0: Any, coefficients: Any, step: int, total: int) -> None:
    """Write a small PNG of where the denoising is going: ``predicted_x0`` [1, 16, F, h, w] by the linear preview.

    Up to four frames of the clip with a caption; ``step`` is 0-based, as in the step latents. Cheap enough to run beside
    the denoising (no matplotlib); hand it to a ``BackgroundWriter`` with a ``snapshot`` of the array.
    """
    x0 = np.asarray(predicted_x0)
    frames = evenly(range(4 * x0.shape[2] - 3), 4)
    pictures = rgb_decoder(coefficients).frames(x0, frames)
    columns = min(2, len(frames))
    scale = max(1, PREVIEW_WIDTH // (columns * x0.shape[4]))
    cells = [np.pad(pictures[i].repeat(scale, axis=0).repeat(scale, axis=1), ((0, 4), (0, 4), (0, 0))) for i in frames]
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    picture = np.concatenate(rows)
    caption = np.zeros((26, picture.shape[1], 3), np.uint8)
    text = f"step {step + 1}/{total}   frames {' '.join(map(str, frames))}"
    cv2.putText(caption, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    write_png(np.concatenate([caption, picture]), Path(path))


@dataclasses.dataclass(frozen=True)
class Curves:
    """What changes from entry to entry of one clip; entry 0 is the initial noise, where x0 and changes are NaN.

    ``mean, std, change`` are of x, ``x0_*`` of the predicted x0, each [S + 1]; ``change`` is the RMS of the difference to the
    entry before. ``channel_mean, channel_std`` are of x, [S + 1, C].
    """

    sigma: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    change: np.ndarray
    x0_mean: np.ndarray
    x0_std: np.ndarray
    x0_change: np.ndarray
    channel_mean: np.ndarray
    channel_std: np.ndarray


def _mean_square(values: np.ndarray) -> np.ndarray:
    """Mean of the squares of each row of [C, n]."""
    return (values[:, None, :] @ values[:, :, None])[:, 0, 0] / values.shape[1]


def measure(clip: StepLatents, channel: int) -> tuple[Curves, float]:
    """One pass over a clip: its curves, and the value that bounds 99.9 % of ``channel`` at every step (the colour range)."""
    rows, channel_means, channel_stds, bad = [], [], [], []
    limit = 0.0
    before: dict[str, np.ndarray] = {}
    for entry in tqdm(entries(clip), total=len(clip.steps) + 1, desc=f"{clip.directory.name}: measuring", unit="step"):
        row = [entry.sigma]
        for name, tensor in (("x", entry.x), ("x0", entry.x0)):
            if tensor is None:
                row += [np.nan] * 3
                continue
            # fp32 with BLAS sums: numpy's float64 reductions take three times as long at 720p, for digits no plot shows
            values = tensor[0].astype(np.float32).reshape(tensor.shape[1], -1)
            with np.errstate(invalid="ignore"):  # NaN and infinity are what one may be here to find
                means, squares = values.mean(axis=1), _mean_square(values)
                change = float(np.sqrt(_mean_square(values - before[name]).mean())) if name in before else np.nan
            if not np.isfinite(squares).all():
                bad.append(f"{entry.file} ({name})")
            mean = float(means.mean())
            row += [mean, float(np.sqrt(max(squares.mean() - mean**2, 0))), change]
            before[name] = values
            if name == "x":
                channel_means.append(means)
                channel_stds.append(np.sqrt(np.maximum(squares - means**2, 0)))
                shown = np.abs(values[channel])
                shown = shown[np.isfinite(shown)]
                limit = max(limit, float(np.quantile(shown, 0.999)) if shown.size else 0.0)
        rows.append(row)
    if bad:
        more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
        logger.warning("%s: NaN or infinity in %s%s; drawn in magenta", clip.directory, ", ".join(bad[:6]), more)
    sigma, mean, std, change, x0_mean, x0_std, x0_change = np.array(rows).T
    channels = (np.array(channel_means), np.array(channel_stds))
    return Curves(sigma, mean, std, change, x0_mean, x0_std, x0_change, *channels), limit or 1.0
