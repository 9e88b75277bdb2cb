"""Initial noise, and ``stage2_latents.safetensors``: what stage 2 hands to stage 3, self-describing and checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from wan_common.artifacts import CONFIG_NAME, EMBEDDINGS_NAME, STAGE1, STAGE2, Job, RunDir, sha256_file
from wan_common.errors import ArtifactError, NumericalError
from wan_common.tensor_io import SafetensorsReader, load_tensors, save_tensors

REMEDY = "rerun stage2_transformer.py"


def draw_noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The initial latents [1, 16, F, h, w] fp32, drawn on the CPU from ``torch.Generator(seed)``: diffusers' own."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32).numpy()


def video_frames_of(latent_frame: int) -> range:
    """Video frames of a latent frame: 0 -> 0; p -> 4p-3..4p (the VAE is causal in time and compresses by 4)."""
    return range(1) if latent_frame == 0 else range(4 * latent_frame - 3, 4 * latent_frame + 1)


def latent_frame_of(video_frame: int) -> int:
    """The inverse of :func:`video_frames_of`."""
    return (video_frame + 3) // 4


@dataclasses.dataclass(frozen=True)
class Latents:
    """One clip's final latents.

    Attributes:
        values: [1, 16, F, h, w] fp32, normalised as the transformer sees them.
        settings: what stage 2 ran with. inputs: hashes of what it read.
    """

    values: np.ndarray
    settings: dict[str, Any]
    inputs: dict[str, str]
    model: dict[str, Any]
    prompt: str
    negative_prompt: str
    sha256: str


def save_latents(path: Path, values: np.ndarray, job: Job, prompt: str, negative_prompt: str) -> None:
    """Write one clip's latents, atomically.

    Raises:
        NumericalError: they are not finite; nothing is written.
    """
    if not np.isfinite(values).all():
        raise NumericalError(f"{path}: the final latents hold NaN or infinity; nothing was written; try --dtype float32")
    record = {key: json.dumps(value, ensure_ascii=False) for key, value in job.as_record().items()}
    header = {"format": "wan_tpu.latents", "fingerprint": job.fingerprint, "prompt": prompt, "negative_prompt": negative_prompt, **record}
    save_tensors(path, {"latents": values}, header)


def has_latents(path: Path, job: Job, recorded: str | None = None) -> bool:
    """Whether ``path`` already holds this very clip, and is still the file whose sha256 was ``recorded``, if one was."""
    if not path.is_file() or (recorded is not None and sha256_file(path) != recorded):
        return False
    try:
        with SafetensorsReader(path, REMEDY) as reader:
            return reader.metadata.get("fingerprint") == job.fingerprint
    except ArtifactError:
        return False


def load_latents(run: RunDir, path: Path, force: bool = False) -> Latents:
    """Read and check one clip's latents.

    Raises:
        ArtifactError: missing, truncated, foreign; or not what the folder's config describes (unless ``force``).
        NumericalError: NaN or infinity in them; names the latent frame.
    """
    tensors, header = load_tensors(path, REMEDY)
    try:
        if header.get("format") != "wan_tpu.latents":
            raise ValueError(f"format is {header.get('format')!r}")
        values = tensors["latents"]
        if values.ndim != 5 or values.shape[0] != 1 or values.dtype != np.float32:
            raise ValueError(f"latents is {values.dtype} {list(values.shape)}, wanted float32 [1, C, F, h, w]")
        record = {key: json.loads(header[key]) for key in ("settings", "inputs", "model")}
        latents = Latents(values, **record, prompt=header["prompt"], negative_prompt=header["negative_prompt"], sha256=sha256_file(path))
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: not a latents file of stage 2 ({error}); {REMEDY}") from error
    finite = np.isfinite(values).all(axis=(0, 1, 3, 4))
    if not finite.all():
        raise NumericalError(f"{path}: NaN or infinity in latent frame {int(np.argmin(finite))}; {REMEDY} --force")
    if not force:
        _check_provenance(run, path, latents)
    return latents


def making_command(run: RunDir) -> str:
    """``run stage2_transformer.py`` with the folders it read and wrote, as far as ``run`` remembers them."""
    return f"run stage2_transformer.py --input_dir {run.record(STAGE2).get('read_from', run.path)} --output_dir {run.path}"


def _check_provenance(run: RunDir, path: Path, latents: Latents) -> None:
    record = run.record(STAGE2)
    mend = f"re{making_command(run)}, or decode it as it is with --force"
    entry = record.get("outputs", {}).get(path.name)
    if entry is None:
        raise ArtifactError(f"{path}: {CONFIG_NAME} beside it does not know this file; {mend}")
    if entry["sha256"] != latents.sha256:
        raise ArtifactError(f"{path}: not the file that {CONFIG_NAME} beside it describes; {mend}")
    embeddings = run.record(STAGE1).get("outputs", {}).get(EMBEDDINGS_NAME, {}).get("sha256")
    if embeddings is not None and latents.inputs.get("embeddings") != embeddings:
        raise ArtifactError(f"{path}: made from other embeddings than the folder's {EMBEDDINGS_NAME} (stage 1 ran again since); {mend}")
