"""Linear preview of latents: ``rgb = latents @ weights + bias``, fitted to a model's own VAE by least squares.

    python -m wan_common.latent_rgb --model_id DIR      # fits and writes DIR/latent_rgb.json

Convention of the file and of every function here: latents are normalised, as stage 2 stores them
(``(z - latents_mean) / latents_std``); rgb is in -1..1, the VAE's own range; a picture is 1/8 of the video's size; latent
frame 0 shows video frame 0 and latent frame p >= 1 the mean of video frames 4p-3..4p.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wan_common.artifacts import find_model
from wan_common.atomic import write_json
from wan_common.errors import ArtifactError, run_command, setup_logging

logger = logging.getLogger("latent_rgb")

FILE_NAME = "latent_rgb.json"
SCHEMA_VERSION = 1
CONVENTION = "rgb(-1..1) = normalised latents @ weights + bias; latent frame 0 = video frame 0, p >= 1 = mean of frames 4p-3..4p"
RIDGE = 1e-4  # relative to the latents' mean variance: keeps unused channels at zero instead of at noise


@dataclass(frozen=True)
class LatentRGB:
    """``weights`` [channels, 3] and ``bias`` [3], float32; see the module's text for the convention."""

    weights: np.ndarray
    bias: np.ndarray


def load_latent_rgb(model_dir: str | Path) -> LatentRGB:
    """Read ``latent_rgb.json`` of a model folder.

    Raises:
        ArtifactError: the file is missing or does not hold such coefficients; names the command that fits them.
    """
    path = Path(model_dir) / FILE_NAME
    remedy = f"fit it: {fit_command(model_dir)}"
    if not path.is_file():
        raise ArtifactError(f"{path}: no linear preview for this model; {remedy}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        weights = np.asarray(data["weights"], np.float32)
        bias = np.asarray(data["bias"], np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a file of preview coefficients ({error!r}); {remedy}") from error
    finite = np.isfinite(weights).all() and np.isfinite(bias).all()
    if weights.ndim != 2 or weights.shape[1] != 3 or bias.shape != (3,) or not finite:
        found = f"weights {list(weights.shape)} and bias {list(bias.shape)}{'' if finite else ' with NaN or infinity'}"
        raise ArtifactError(f"{path}: {found}, wanted finite [channels, 3] and [3]; {remedy}")
    return LatentRGB(weights, bias)


def fit_command(model_dir: str | Path) -> str:
    """The command that writes ``latent_rgb.json`` of a model folder, ready to be pasted in the repository's folder.

    A folder in the hub's cache holds only what was asked of it, which need not be the VAE; it is named by its hub id, so
    that the command fetches what is missing.
    """
    from huggingface_hub import constants

    folder = Path(model_dir)
    store = folder.parent.parent  # a hub model's folder is CACHE/models--owner--name/snapshots/revision
    cached = folder.parent.name == "snapshots" and store.parent == Path(constants.HF_HUB_CACHE)
    name = store.name.removeprefix("models--").replace("--", "/") if cached else str(folder)
    return f"python -m wan_common.latent_rgb --model_id {shlex.quote(name)}"


def latents_to_rgb(latents: np.ndarray, coefficients: LatentRGB) -> np.ndarray:
    """Pictures of latents.

    Args:
        latents: [channels, F, h, w] float, normalised.
        coefficients: what :func:`load_latent_rgb` returns.

    Returns:
        [F, h, w, 3] uint8.
    """
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 4 or latents.shape[0] != len(coefficients.weights):
        raise ValueError(f"latents are {list(latents.shape)}, wanted [{len(coefficients.weights)}, frames, height, width]")
    rgb = np.einsum("cfhw,ck->fhwk", latents, coefficients.weights) + coefficients.bias
    return np.clip(np.rint((rgb + 1.0) * 127.5), 0, 255).astype(np.uint8)


def pool_frames(frames: np.ndarray) -> np.ndarray:
    """What each latent should show: [4k+1, 8h, 8w, 3] to [k+1, h, w, 3], the mean over its frames and 8x8 pixels."""
    count, height, width, _ = frames.shape
    if count % 4 != 1 or height % 8 or width % 8:
        raise ValueError(f"frames are {list(frames.shape)}, wanted [4k+1, multiple of 8, multiple of 8, 3]")
    small = np.asarray(frames, np.float32).reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4))
    later = small[1:].reshape(-1, 4, *small.shape[1:]).mean(1)
    return np.concatenate([small[:1], later])


def fit_latent_rgb(latents: Sequence[np.ndarray], frames: Sequence[np.ndarray]) -> tuple[LatentRGB, float]:
    """Least-squares fit over clips.

    Args:
        latents: one array a clip, [channels, k+1, h, w], normalised.
        frames: one array a clip, [4k+1, 8h, 8w, 3] in -1..1.

    Returns:
        The coefficients, and the root-mean-square error of the preview in 0..255.
    """
    x = np.concatenate([np.moveaxis(np.asarray(z, np.float64), 0, -1).reshape(-1, z.shape[0]) for z in latents])
    y = np.concatenate([pool_frames(f).reshape(-1, 3) for f in frames]).astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram, centred.T @ (y - mean_y) / len(x))
    bias = mean_y - mean_x @ weights
    error = 127.5 * float(np.sqrt(np.mean((x @ weights + bias - y) ** 2)))
    return LatentRGB(weights.astype(np.float32), bias.astype(np.float32)), error


def sample_clips(count: int, frames: int = 9, size: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Clips to fit on, [frames, size, size, 3] in -1..1: coloured discs and boxes moving over flat and shaded backgrounds."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) / size
    clips = []
    for index in range(count):
        shading = rng.uniform(-0.5, 0.5, (2, 3)) * (index % 2)
        background = rng.uniform(-1, 1, 3) + xs[..., None] * shading[0] + ys[..., None] * shading[1]
        clip = np.repeat(background[None], frames, 0)
        for _ in range(3):
            colour, centre, step = rng.uniform(-1, 1, 3), rng.uniform(0, 1, 2), rng.uniform(-0.03, 0.03, 2)
            radius, disc = rng.uniform(0.1, 0.3), rng.random() < 0.5
            for t in range(frames):
                dy, dx = np.abs(ys - centre[0] - step[0] * t), np.abs(xs - centre[1] - step[1] * t)
                clip[t][(np.hypot(dx, dy) if disc else np.maximum(dx, dy)) < radius] = colour
        clips.append(np.clip(clip, -1, 1).astype(np.float32))
    return clips


def fit_model(model_dir: Path, count: int = 24) -> tuple[LatentRGB, float]:
    """Fit the coefficients of ``model_dir``'s VAE on :func:`sample_clips` (posterior means), in float32 on the CPU."""
    import torch
    from diffusers import AutoencoderKLWan
    from tqdm import tqdm

    vae = AutoencoderKLWan.from_pretrained(model_dir, subfolder="vae", torch_dtype=torch.float32)
    mean = np.asarray(vae.config["latents_mean"], np.float32).reshape(-1, 1, 1, 1)
    std = np.asarray(vae.config["latents_std"], np.float32).reshape(-1, 1, 1, 1)
    clips = sample_clips(count)
    latents = []
    with torch.no_grad():
        for clip in tqdm(clips, desc="encode", unit="clip"):
            z = vae.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]).latent_dist.mode()[0].numpy()
            latents.append((z - mean) / std)
    return fit_latent_rgb(latents, clips)


def main(argv: list[str] | None = None) -> None:
    """Command line: fit and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="model folder or hub id; its VAE is fitted")
    parser.add_argument("--output", type=Path, help=f"file to write; default {FILE_NAME} in the model's folder")
    args = parser.parse_args(argv)
    setup_logging()
    folder = find_model(args.model_id, ("vae",)).path
    path = args.output or folder / FILE_NAME
    coefficients, error = fit_model(folder)
    weights = [[round(float(v), 5) for v in row] for row in coefficients.weights]
    bias = [round(float(v), 5) for v in coefficients.bias]
    head = {"schema_version": SCHEMA_VERSION, "convention": CONVENTION, "rms_error_of_255": round(error, 2)}
    write_json(path, {**head, "weights": weights, "bias": bias})
    logger.info("%s: preview error %.1f of 255 (root mean square over the clips it was fitted on)", path, error)


if __name__ == "__main__":
    sys.exit(run_command(main))
