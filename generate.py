"""The single-process mode: all three stages in one command, for one prompt or many, with warm-up, benchmark runs and profiler.

Writes what the three scripts write into --output_dir; with --prompts_file or several videos a prompt, the videos go to
videos/prompt_001/video_001.mp4 and so on, each as soon as its clip is denoised.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from wan_common import stages
from wan_common.artifacts import video_name
from wan_common.config import GROUPS, BatchOptions, DecodeOptions, InputOptions, Options, VideoOptions, parse_options, read_model_defaults
from wan_common.errors import UsageError, run_command
from wan_common.signals import StopSignals

logger = logging.getLogger("generate")


def main(argv: list[str] | None = None) -> None:
    """Encode, then denoise each clip and decode it at once."""
    options = parse_options(argv, "generate.py", __doc__, (group for group in GROUPS if group is not InputOptions))
    text = stages.plan_text(options)
    options = single_folder(options, text)
    if not text.is_current():
        text.start_devices()
        text.save(stages.encode(text, stages.load_text_encoder(text)))
    plan = stages.plan_denoise(options)
    batch = len(plan.clips()) > 1
    video_of = {clip.suffix: video_path(plan, clip, batch, options.get(DecodeOptions)) for clip in plan.clips()}
    if plan.is_current() and all(path.is_file() for path in video_of.values()) and stages.plan_decode(options, video_of).is_current():
        return
    with StopSignals() as stop:
        plan.start_devices(batch=2 if plan.guidance else 1)
        runner = stages.load_denoiser(plan, stop)
        decoder = stages.load_vae(plan)
        stages.denoise(plan, runner, lambda clip, path: stages.decode_clip(plan, decoder, path, video_of[clip.suffix], options))
    decode = stages.plan_decode(options, video_of)
    decode.use_mesh(decoder.mesh)
    decode.save({})
    stages.draw_batch_attention(plan.output.path, plan.analysis)


def single_folder(options: Options, text: stages.TextPlan) -> Options:
    """The options of the later stages: they read what was just written; seeds count up with ``--videos_per_prompt``.

    Raises:
        UsageError: several seeds and several videos a prompt at once.
    """
    given: dict[str, Any] = {**options.given, "input_dir": str(text.output.path), "output_dir": str(text.output.path)}
    count = options.get(BatchOptions).videos_per_prompt
    seeds = options.get(VideoOptions, read_model_defaults(text.model.path)).seed
    if count < 1 or (count > 1 and len(seeds) > 1):
        raise UsageError(f"--videos_per_prompt {count} with --seed {' '.join(map(str, seeds))}: give a count, or the seeds themselves")
    if count > 1:
        given["seed"] = tuple(seeds[0] + i for i in range(count))
    return Options(options.groups, given, options.flags, options.yaml)


def video_path(plan: stages.DenoisePlan, clip: Any, batch: bool, decode: DecodeOptions) -> Path:
    """Seed 003's folders for a batch, else ``--output_video`` or the run directory's own name.

    Raises:
        UsageError: one ``--output_video`` for several clips.
    """
    if not batch:
        return Path(decode.output_video) if decode.output_video else plan.output / video_name("")
    if decode.output_video:
        raise UsageError(f"--output_video {decode.output_video}: there are {len(plan.clips())} clips; leave it out")
    number = plan.video.seed.index(clip.seed) + 1
    return plan.output / "videos" / f"prompt_{clip.prompt_index + 1:03d}" / f"video_{number:03d}.mp4"


if __name__ == "__main__":
    sys.exit(run_command(main))
