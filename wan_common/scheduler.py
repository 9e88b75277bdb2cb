"""The UniPC step as data: the stock scheduler's linear update, read off once, applied inside the jitted denoising step.

UniPC (https://huggingface.co/papers/2302.04867) maps (sample, model output, history) to the next sample linearly, with
coefficients that depend on the step only. Instead of writing the solver again, :func:`step_table` runs the stock diffusers
scheduler on unit vectors and keeps the coefficients it applied: every solver setting that diffusers supports comes along,
and one compiled step serves all steps, its row of coefficients being an input.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from wan_common.errors import ArtifactError, UsageError

State = dict[str, Any]
"""``sample`` and ``last_sample`` [1, C, F, h, w] fp32, ``model_outputs`` [order, 1, C, F, h, w] fp32, oldest first: with
the index of the next step, all that UniPC remembers."""


@dataclasses.dataclass(frozen=True)
class StepTable:
    """What each of S steps does, with K = 3 + solver order: history entries are sample, model output, last sample, outputs.

    Attributes:
        timesteps: [S] int64, as the transformer is told.
        sigmas: [S + 1] fp32, the noise level before each step and after the last.
        predicted_x0: [S, K] fp32: x0 = row . (sample, model_output, last_sample, *model_outputs).
        corrected: [S, K]: the sample after UniC, which becomes ``last_sample``.
        next_sample: [S, K]: the sample after UniP.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    predicted_x0: np.ndarray
    corrected: np.ndarray
    next_sample: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def order(self) -> int:
        """Number of model outputs that the solver remembers."""
        return self.next_sample.shape[1] - 3


def load_scheduler(folder: Path, flow_shift: float) -> Any:
    """The stock scheduler described by ``folder/scheduler_config.json``, with ``flow_shift`` in place of its own.

    Raises:
        ArtifactError: no such file, or not a UniPC flow-matching scheduler.
    """
    from diffusers import UniPCMultistepScheduler

    path = folder / "scheduler_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); choose a Wan 2.1 diffusers folder with --model_id") from error
    found = (config.get("_class_name"), config.get("prediction_type"), config.get("use_flow_sigmas"))
    if found != ("UniPCMultistepScheduler", "flow_prediction", True) or config.get("thresholding"):
        raise ArtifactError(
            f"{path}: found {found}, wanted UniPCMultistepScheduler with flow_prediction, use_flow_sigmas and no thresholding; "
            "choose a Wan 2.1 diffusers folder with --model_id"
        )
    return UniPCMultistepScheduler.from_config(config, flow_shift=flow_shift)


def step_table(scheduler: Any, num_inference_steps: int) -> StepTable:
    """Read the coefficients of every step off the stock ``scheduler`` (a diffusers UniPCMultistepScheduler).

    Before each step its memory is replaced by unit vectors of R^K and it is stepped once, in fp32 as in diffusers' pipeline.

    Raises:
        UsageError: the schedule cannot be built for this number of steps.
    """
    import torch

    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"--num_inference_steps {num_inference_steps}: the scheduler refuses it ({error})") from error
    scheduler.set_begin_index(0)
    order = scheduler.config.solver_order
    basis = torch.eye(3 + order).reshape(3 + order, 1, 3 + order)
    rows: dict[str, list[np.ndarray]] = {"predicted_x0": [], "corrected": [], "next_sample": []}
    timesteps = scheduler.timesteps.clone()
    for timestep in timesteps:
        if scheduler.last_sample is not None:
            scheduler.last_sample = basis[2]
        remembered = [m is not None for m in scheduler.model_outputs]
        scheduler.model_outputs = [basis[3 + i] if known else None for i, known in enumerate(remembered)]
        (following,) = scheduler.step(basis[1], timestep, basis[0], return_dict=False)
        rows["predicted_x0"].append(scheduler.model_outputs[-1][0].numpy().copy())
        corrected: Any = scheduler.last_sample
        rows["corrected"].append(corrected[0].numpy().copy())
        rows["next_sample"].append(following[0].numpy().copy())
    table = {name: np.stack(values).astype(np.float32) for name, values in rows.items()}
    if not all(np.isfinite(values).all() for values in table.values()):
        raise UsageError(f"--num_inference_steps {num_inference_steps}: the scheduler's coefficients are not finite; use more steps")
    return StepTable(timesteps.numpy(), scheduler.sigmas.numpy().astype(np.float32), **table)


def initial_state(noise: np.ndarray, order: int) -> State:
    """The solver's memory before step 0; history that does not exist yet is zero and its coefficients are zero too."""
    zeros = np.zeros_like(noise)
    return {"sample": noise, "last_sample": zeros, "model_outputs": np.stack([zeros] * order)}


def advance(state: State, model_output: Any, predicted_x0: Any, corrected: Any, next_sample: Any) -> tuple[State, Any]:
    """One solver step in JAX: ``(next state, predicted x0)``; the last three arguments are a step's rows [K] of the table.

    fp32 throughout, as diffusers keeps its samples.
    """
    import jax.numpy as jnp

    outputs = state["model_outputs"]
    history = [state["sample"], model_output.astype(jnp.float32), state["last_sample"], *outputs]

    def combine(row: Any) -> Any:
        return sum(row[k] * entry for k, entry in enumerate(history))

    x0 = combine(predicted_x0)
    following = {
        "sample": combine(next_sample),
        "last_sample": combine(corrected),
        "model_outputs": jnp.concatenate([outputs[1:], x0[None]]),
    }
    return following, x0
