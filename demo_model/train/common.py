"""What both trainings share: checkpoints that survive a kill at any moment, weight averages, schedules, logs."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORK_DIR = Path("~/.cache/wan_demo_training")  # outside the work tree: checkpoints and encoded clips are large
CHECKPOINT_SECONDS = 60.0  # a kill loses at most about this much work


def work_dir(path: Path | None) -> Path:
    """The folder of checkpoints, latents and logs, created if missing."""
    folder = (path or WORK_DIR).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device() -> torch.device:
    """A GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` always holds a whole checkpoint."""
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none yet. Loading runs no code (`weights_only`)."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def flat_learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float = 0.2, floor: float = 0.02) -> float:
    """Linear warm-up, constant, then linear to `floor * peak` over the last `decay` of the steps.

    A run can be made longer later without having wasted a decay.
    """
    left = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / warmup, max(floor, left))


class WeightAverage:
    """Exponential moving average of parameters, with a short memory at the start: decay = min(decay, (1+n)/(10+n))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take one training step's parameters in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.values)
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n].float() for n in names], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.values


class Log:
    """Appends one JSON line per event, with seconds of training so far (across restarts)."""

    def __init__(self, path: Path, seconds_before: float) -> None:
        self.path, self.before, self.start = path, seconds_before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        return self.before + time.monotonic() - self.start

    def write(self, **values: Any) -> None:
        """Append `values` as one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": round(self.seconds, 1), **values}) + "\n")
