"""Stage 3: latents become a video. Loads the VAE only.

Reads stage2_latents*.safetensors and generation_config.json from --input_dir; writes an H.264 mp4 for each.
"""

from __future__ import annotations

import sys

from wan_common import stages
from wan_common.config import BenchOptions, DecodeOptions, FpsOptions, InputOptions, RunOptions, parse_options
from wan_common.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Parse, see whether the outputs are current, else load, shard, run, save."""
    options = parse_options(
        argv, "stage3_vae_decoder.py", __doc__, (RunOptions, InputOptions, FpsOptions, DecodeOptions, BenchOptions)
    )
    plan = stages.plan_decode(options)
    if plan.is_current():
        return
    plan.start_devices(batch=1)
    decoder = stages.load_vae(plan)
    stages.decode_all(plan, decoder)


if __name__ == "__main__":
    sys.exit(run_command(main))
