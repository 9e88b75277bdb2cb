#!/usr/bin/env python3
"""Look at the cross-attention maps that stage 2 stored (``--store_attention``): which pixels each word acts on, at which step.

    python visualize_attention.py                                         everything, from stage_outputs to attention_outputs
    python visualize_attention.py --list                                  what is stored
    python visualize_attention.py --report                                only the HTML report
    python visualize_attention.py --video-id prompt_001_vid_001 --token kiss --output kiss.mp4
    ... --original-video stage_outputs/output_video.mp4                   over the video
    ... --use-aggregated                                                  the mean over steps, static

With a pipeline's YAML as --config, its output_dir (else its input_dir) is where the maps are, its
attention_analysis.visualization_params are the looks, and its other keys are left to the stages; flags win.
No model is loaded. Flags may be spelled with ``-`` or ``_``.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from wan_common.attention_maps import SPECIAL_GROUPS, AttentionAnalyzer, AttentionSettings, VisualizationParams
from wan_common.attention_visualizer import NORMALIZE, OVER, AttentionVisualizer, visualize_run
from wan_common.config import DEFAULT_DIR, InputOptions, RunOptions, parse_options
from wan_common.errors import UsageError, run_command

logger = logging.getLogger("attention")
DEFAULTS = VisualizationParams()
LOOKS = ("figsize", "colormap", "overlay_alpha", "static_duration", "fps", "interpolation_steps")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="visualize_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(group: argparse._ArgumentGroup, name: str, **options: object) -> None:
        names = [f"--{name}"] + ([f"--{name.replace('-', '_')}"] if "-" in name else [])
        group.add_argument(*names, **options)  # type: ignore[arg-type]

    where = result.add_argument_group("where")
    where.add_argument("--config", metavar="FILE.yaml", help="the pipeline's options as YAML; flags win")
    where.add_argument("--input_dir", "--input-dir", type=Path, help=f"run directory with the maps [default: {DEFAULT_DIR}]")
    add(where, "attention-dir", type=Path, help="directory of the attention maps [default: INPUT_DIR/attention_maps]")
    where.add_argument("--output_dir", "--output-dir", type=Path, help="folder for everything [default: attention_outputs]")
    add(where, "video-id", help="video identifier [default with --token: the only one; else all]")

    one = result.add_argument_group("one video of one word (instead of everything)")
    add(one, "token", help="token word to visualize")
    add(one, "output", type=Path, help="output video path [default: OUTPUT_DIR/attention_videos/...]")
    add(one, "use-aggregated", action="store_true", help="use aggregated attention instead of per-step")
    add(one, "step", type=int, help="this denoising step only (static, or over the original video)")

    looks = result.add_argument_group("looks")
    add(looks, "original-video", type=Path, help="original video for the overlay [default for everything: INPUT_DIR/output_video*.mp4]")
    add(looks, "overlay-alpha", type=float, help=f"transparency for the overlay, 0.0 to 1.0 [default: {DEFAULTS.overlay_alpha}]")
    add(looks, "stretch-time", action="store_true", help="accept an original video with another number of frames, stretched")
    add(looks, "colormap", help=f"matplotlib colormap [default: {DEFAULTS.colormap}]")
    add(looks, "fps", type=int, help=f"output video FPS [default: {DEFAULTS.fps}; an overlay keeps its original's]")
    add(looks, "figsize", type=_figsize, help='figure size as "width,height" in inches [default: 12,8]')
    add(looks, "interpolation-steps", type=int, help=f"smoothing between steps [default: {DEFAULTS.interpolation_steps}]")
    add(looks, "include-timestamp", action="store_true", help="add a timestamp to the frames")
    add(looks, "video-format", choices=("mp4", "avi"), help="output format [default: mp4, or what --output ends in]")
    add(looks, "static-duration", type=float, help=f"seconds of an aggregated video [default: {DEFAULTS.static_duration}]")
    add(looks, "no-colorbar", action="store_true", help="leave the attention scale out")
    text = "range of the colours: of all words, the word, the picture, or 0 to 1 [default: %(default)s]"
    add(looks, "normalize", choices=NORMALIZE, default="global", help=text)
    add(looks, "percentile", type=float, default=99.0, help="upper percentile of that range [default: %(default)s]")
    text = "weights over all tokens, or over real words: weight / (1 - pad - eos) [default: %(default)s]"
    add(looks, "over", choices=OVER, default="all", help=text)
    add(looks, "block", type=int, help="one transformer block (stored with store_per_block) [default: their mean]")
    add(looks, "head", type=int, help="one attention head (stored with store_per_head) [default: their mean]")

    what = result.add_argument_group("what")
    add(what, "list", action="store_true", help="print the stored videos, words and steps")
    add(what, "report", action="store_true", help="only attention_report.html")
    return result


def _figsize(text: str) -> tuple[float, float]:
    try:
        width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}; wanted "width,height" in inches, such as 12,8') from None
    return width, height


def main(argv: list[str] | None = None) -> None:
    """List, draw one video, or draw everything."""
    args, base = parse_args(argv)
    analyzer = AttentionAnalyzer(args.attention_dir or args.input_dir / "attention_maps")
    if args.list:
        list_stored(analyzer)
    elif args.token is not None:
        print(one_video(args, analyzer, base))
    else:
        for flag in ("output", "step"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} needs --token; without it everything goes to --output_dir")
        if args.use_aggregated:
            raise UsageError("--use-aggregated needs --token; without it all three kinds of video are made")
        written = visualize_run(
            args.input_dir, args.output_dir or Path("attention_outputs"), attention_dir=args.attention_dir,
            video_ids=[args.video_id] if args.video_id else None, params=_params(args, base, args.video_format or base.video_format),
            normalize=args.normalize, percentile=args.percentile, over=args.over,
            original_video=args.original_video, stretch_time=args.stretch_time,
            videos=not args.report, figures=not args.report, include_timestamp=args.include_timestamp, block=args.block, head=args.head,
        )  # fmt: skip
        for path in written:
            print(path)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, VisualizationParams]:
    """Flags first, then the YAML of ``--config``, then the defaults; and the looks that the YAML asks for.

    The YAML is a pipeline's: the maps are where its stage 2 wrote, so its output_dir comes before its input_dir.

    Raises:
        UsageError: not readable, not YAML, an unknown key, or a value of a wrong type.
    """
    args = parser().parse_args(argv)
    config = ["--config", args.config] if args.config else []
    shared = parse_options(config, "visualize_attention.py", "", (RunOptions, InputOptions))
    args.input_dir = args.input_dir or Path(shared.get(RunOptions).output_dir or shared.get(InputOptions).input_dir)
    return args, AttentionSettings.from_mapping(shared.yaml.get("attention_analysis") or {}).visualization_params


def _params(args: argparse.Namespace, base: VisualizationParams, video_format: str) -> VisualizationParams:
    given = {name: getattr(args, name) for name in LOOKS if getattr(args, name) is not None}
    return dataclasses.replace(base, **given, video_format=video_format, include_colorbar=base.include_colorbar and not args.no_colorbar)


def list_stored(analyzer: AttentionAnalyzer) -> None:
    """Print what there is."""
    for video_id in analyzer.get_available_videos():
        clip = analyzer.get_video_metadata(video_id).get("clip", {})
        print(f"{video_id}  {clip.get('prompt', '')}".rstrip())
        for token in analyzer.get_available_tokens(video_id, include_special=True):
            steps = analyzer.get_available_steps(video_id, token)
            span = f"steps {steps[0]}-{steps[-1]} ({len(steps)})" if steps else "no steps"
            kept = ", aggregated" if analyzer.has_aggregated(video_id, token) else ""
            print(f"  {token}{' (special)' if token in SPECIAL_GROUPS else ''}: {span}{kept}")


def one_video(args: argparse.Namespace, analyzer: AttentionAnalyzer, base: VisualizationParams) -> Path:
    """The video of ``--token``."""
    videos = analyzer.get_available_videos()
    if args.video_id is None and len(videos) != 1:
        raise UsageError(f"--video-id: choose one of {', '.join(videos) or '(none stored)'}")
    video_id = args.video_id or videos[0]
    if args.report:
        raise UsageError("--report and --token exclude each other; the report has all words")
    if args.interpolation_steps is not None and (args.use_aggregated or args.step is not None or args.original_video is not None):
        logger.warning("--interpolation-steps has no effect: only the video over the denoising steps is interpolated")
    video_format = args.video_format or (args.output.suffix.lstrip(".") if args.output and args.output.suffix else base.video_format)
    params = _params(args, base, video_format)
    kind = "overlay" if args.original_video else "aggregated" if args.use_aggregated else "attention"
    name = f"{video_id}_{analyzer.get_token_folder(video_id, args.token)}_{kind}.{video_format}"
    output = args.output or (args.output_dir or Path("attention_outputs")) / "attention_videos" / name
    if output.suffix == "":
        output = output.with_suffix(f".{video_format}")
    if output.suffix != f".{video_format}":
        raise UsageError(f"--output {output} and --video-format {video_format} disagree")
    visualizer = AttentionVisualizer(
        analyzer, params.figsize, params.colormap, params.fps, normalize=args.normalize, percentile=args.percentile, over=args.over,
        include_colorbar=params.include_colorbar, static_duration=params.static_duration, block=args.block, head=args.head,
    )  # fmt: skip
    return visualizer.generate_attention_video(
        video_id, args.token, output, args.original_video, params.overlay_alpha, params.interpolation_steps, args.include_timestamp,
        args.use_aggregated, step=args.step, fps=args.fps, stretch_time=args.stretch_time,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
