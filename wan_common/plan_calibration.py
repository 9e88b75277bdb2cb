"""The yardstick: what this planner predicts for the plain program that seed 001 measured on a v6e-8."""

from __future__ import annotations

import dataclasses
from typing import Any

from wan_common.plan import Request, assumptions, compiled_stage, plan_stage
from wan_common.plan_baseline import BLOCKS, MEASURED_SECONDS, MESH
from wan_common.published import WAN_14B
from wan_common.tpu_topology import topology

DEPTHS = (1, 2, 3)  # unrolled blocks that are compiled; the third checks that a block adds the same each time


def baseline(use_cache: bool = True) -> dict[str, Any]:
    """Predict a step of the plain program, and how far it is from the measured one. ``lines`` is what to print.

    The unrolled program of all 40 blocks takes minutes to compile; it is extrapolated from depths 1 and 2, and depth 3 says
    how equal the blocks are.
    """
    request = Request(topology("v6e-8"), WAN_14B, mesh=MESH, fsdp=False, blocks=BLOCKS, baseline=True)
    plans = [plan_stage(dataclasses.replace(request, layers=depth), "denoise_step", use_cache) for depth in DEPTHS]
    seconds = [plan.predicted_seconds or 0.0 for plan in plans]
    layers = WAN_14B.transformer["num_layers"]
    block, next_block = seconds[1] - seconds[0], seconds[2] - seconds[1]
    predicted = seconds[0] + (layers - 1) * block
    outside = (plans[1].fusion_cycles - plans[0].fusion_cycles) / 1e6
    ratio = predicted / MEASURED_SECONDS
    stage = dataclasses.asdict(plans[0]) | {"predicted_seconds": predicted}
    for field in ("hbm_args_bytes", "hbm_peak_bytes"):
        stage[field] += (layers - 1) * (getattr(plans[1], field) - getattr(plans[0], field))
    stage["fits"] = stage["hbm_peak_bytes"] <= stage["hbm_capacity_bytes"]
    stage["compile_seconds"] = sum(
        compiled_stage(dataclasses.replace(request, layers=depth), "denoise_step").compile_seconds for depth in DEPTHS
    )
    lines = [
        f"plain program (seed 001's layout: {MESH}, unscanned stock modules, blocks {BLOCKS}), 14B, 1280x720, 81 frames, v6e-8",
        f"a block: {block:.4f} s predicted ({outside:.1f}M cycles outside attention); the next one: {next_block:.4f} s",
        f"{layers} blocks: {predicted:.2f} s a step predicted, {MEASURED_SECONDS} s measured by seed 001: {100 * (ratio - 1):+.0f}%",
        f"extrapolated from depths {DEPTHS[0]} and {DEPTHS[1]}; nothing is fitted",
        "", "assumed:", *(f"- {line}" for line in assumptions(request)),
    ]  # fmt: skip
    return {
        "topology": "v6e-8", "chips": 8, "model": WAN_14B.name, "height": request.height, "width": request.width, "frames": request.frames,
        "stages": {"denoise_step": stage}, "clip": {"predicted_seconds": None, "steps": request.steps},
        "baseline": {"predicted_seconds": predicted, "measured_seconds": MEASURED_SECONDS, "ratio": ratio},
        "assumptions": assumptions(request), "lines": lines,
    }  # fmt: skip
