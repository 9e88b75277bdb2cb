"""Stage 2: embeddings become latents. Loads the transformer and the scheduler only.

Reads stage1_embeddings.safetensors from --input_dir; writes stage2_latents.safetensors and generation_config.json into
--output_dir (and, when asked, step latents, attention maps and a preview). A rerun goes on from the last checkpoint.
"""

from __future__ import annotations

import sys

from wan_common import stages
from wan_common.config import (
    AttentionFlags,
    BenchOptions,
    DenoiseOptions,
    FpsOptions,
    InputOptions,
    MeshOptions,
    RunOptions,
    VideoOptions,
    parse_options,
)  # fmt: skip
from wan_common.errors import run_command
from wan_common.signals import StopSignals

GROUPS = (RunOptions, InputOptions, VideoOptions, FpsOptions, AttentionFlags, MeshOptions, DenoiseOptions, BenchOptions)


def main(argv: list[str] | None = None) -> None:
    """Parse, see whether the outputs are current, else load, shard, run, save."""
    options = parse_options(argv, "stage2_transformer.py", __doc__, GROUPS)
    plan = stages.plan_denoise(options)
    if plan.is_current():
        return
    with StopSignals() as stop:
        plan.start_devices(batch=2 if plan.guidance else 1)
        runner = stages.load_denoiser(plan, stop)
        stages.denoise(plan, runner)


if __name__ == "__main__":
    sys.exit(run_command(main))
