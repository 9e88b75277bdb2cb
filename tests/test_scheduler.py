"""The step table gives what diffusers' UniPC gives, for every setting that changes its update."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from wan_common.errors import ArtifactError, UsageError
from wan_common.scheduler import advance, initial_state, load_scheduler, step_table

SHAPE = (1, 16, 2, 3, 4)
RELATIVE = 2e-5  # observed 2e-6 after 50 steps: the same products summed in another order, in fp32
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SETTINGS = {
    "published": {}, "720p": {"flow_shift": 5.0}, "order 1": {"solver_order": 1}, "order 3": {"solver_order": 3},
    "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "full order to the end": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "no corrector at 0 and 1": {"disable_corrector": [0, 1]},
}  # fmt: skip


def model_output(sample: np.ndarray, step: int) -> np.ndarray:
    """Stands for the transformer: depends on the sample, so that errors would feed back."""
    return np.tanh(sample * (0.5 + 0.05 * step)).astype(np.float32) - 0.1 * step / 10


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_equals_diffusers_step_by_step(settings: str, steps: int) -> None:
    options = {**WAN, **SETTINGS[settings]}
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    stock = UniPCMultistepScheduler(**options)
    stock.set_timesteps(steps)
    stock.set_begin_index(0)
    table = step_table(UniPCMultistepScheduler(**options), steps)
    assert len(table) == steps and table.order == stock.config.solver_order
    np.testing.assert_array_equal(table.timesteps, stock.timesteps.numpy())
    np.testing.assert_allclose(table.sigmas, stock.sigmas.numpy(), rtol=1e-7)

    theirs, state = torch.from_numpy(noise), initial_state(noise, table.order)
    jitted = jax.jit(advance)
    for i, timestep in enumerate(stock.timesteps):
        rows = {name: getattr(table, name)[i] for name in ("predicted_x0", "corrected", "next_sample")}
        state, x0 = jitted(state, model_output(np.asarray(state["sample"]), i), **rows)
        before = theirs
        theirs = stock.step(torch.from_numpy(model_output(theirs.numpy(), i)), timestep, theirs, return_dict=False)[0]
        scale = np.abs(theirs.numpy()).max()
        np.testing.assert_allclose(state["sample"], theirs.numpy(), rtol=0, atol=RELATIVE * scale, err_msg=f"step {i}")
        np.testing.assert_allclose(x0, stock.model_outputs[-1].numpy(), rtol=0, atol=RELATIVE * scale, err_msg=f"x0 of step {i}")
        # flow matching: x0 = x - sigma v, with the v predicted at the uncorrected sample
        direct = before.numpy() - stock.sigmas[i].item() * model_output(before.numpy(), i)
        np.testing.assert_allclose(x0, direct, rtol=0, atol=RELATIVE * scale)
    assert all(value.dtype == np.float32 for value in state.values())


def test_flow_shift_moves_the_sigmas() -> None:
    tables = [step_table(UniPCMultistepScheduler(**{**WAN, "flow_shift": shift}), 10) for shift in (1.0, 3.0, 5.0)]
    middle = [table.sigmas[5] for table in tables]
    assert middle[0] < middle[1] < middle[2]
    assert all(table.sigmas[-1] == 0 for table in tables)


def test_load_scheduler_takes_the_flag_not_the_folder(demo_model: Path) -> None:
    assert load_scheduler(demo_model / "scheduler", 7.5).config.flow_shift == 7.5


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"), ({"prediction_type": "epsilon"}, "epsilon"),
        ({"use_flow_sigmas": False}, "False"), ({"thresholding": True}, "no thresholding"),
    ],
)  # fmt: skip
def test_other_schedulers_are_refused(demo_model: Path, tmp_path: Path, change: dict[str, object], found: str) -> None:
    config = json.loads((demo_model / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ArtifactError, match="wanted UniPCMultistepScheduler with flow_prediction") as error:
        load_scheduler(tmp_path, 3.0)
    assert found in str(error.value) and "--model_id" in str(error.value)


def test_missing_config_and_impossible_steps(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"scheduler_config\.json: not readable .* --model_id"):
        load_scheduler(tmp_path, 3.0)
    with pytest.raises(UsageError, match="--num_inference_steps 0"):
        step_table(UniPCMultistepScheduler(**WAN), 0)


def test_a_solver_that_ends_in_nan_is_refused() -> None:
    """diffusers' bh1 is inf * 0 in the last step, to sigma 0."""
    stock = UniPCMultistepScheduler(**WAN, solver_type="bh1")
    stock.set_timesteps(1)
    assert stock.step(torch.ones(SHAPE), stock.timesteps[0], torch.ones(SHAPE), return_dict=False)[0].isnan().all()
    with pytest.raises(UsageError, match="coefficients are not finite"):
        step_table(UniPCMultistepScheduler(**WAN, solver_type="bh1"), 4)
