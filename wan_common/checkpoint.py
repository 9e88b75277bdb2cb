"""``stage2_checkpoint.safetensors``: the solver's whole memory between two steps, so that a killed run goes on bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from wan_common.errors import ArtifactError
from wan_common.scheduler import State
from wan_common.tensor_io import load_tensors, save_tensors

logger = logging.getLogger("checkpoint")


def save_checkpoint(path: Path, state: State, next_step: int, fingerprint: str) -> None:
    """Write the state [fp32, exact] that step ``next_step`` starts from, atomically."""
    save_tensors(path, dict(state), {"format": "wan_tpu.checkpoint", "next_step": str(next_step), "fingerprint": fingerprint})


def load_checkpoint(path: Path, fingerprint: str, shape: tuple[int, ...], order: int) -> tuple[State, int] | None:
    """The state and the step to go on with; None when there is no checkpoint of this very clip.

    A checkpoint of other settings, or one that cannot be read, is left out with a message that says so: the run starts anew.
    """
    if not path.is_file():
        return None
    try:
        tensors, header = load_tensors(path, "it is left out")
    except ArtifactError as error:
        logger.warning("%s", error)
        return None
    if header.get("format") != "wan_tpu.checkpoint" or header.get("fingerprint") != fingerprint:
        logger.warning("%s: of other settings or inputs; not used, this run starts from step 0", path)
        return None
    wanted = {"sample": shape, "last_sample": shape, "model_outputs": (order, *shape)}
    found = {name: array.shape for name, array in tensors.items()}
    next_step = header.get("next_step", "")
    if found != wanted or not next_step.isdigit() or not all(np.isfinite(a).all() and a.dtype == np.float32 for a in tensors.values()):
        logger.warning("%s: holds %s, wanted finite float32 %s; not used, this run starts from step 0", path, found, wanted)
        return None
    return tensors, int(next_step)
