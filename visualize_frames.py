"""See the denoising: pictures, statistics and videos of the step latents that stage 2 left.

    python stage2_transformer.py --save_step_latents
    python visualize_frames.py

reads ``stage_outputs/step_latents*`` and writes, into ``wan_visualization_output/``, a contact sheet, videos, curves, and in
``frame_debug/`` for each step a picture of the latents, of the decoded x and of the predicted x0. Several clips (seeds) get a
folder each and are shown side by side. With a pipeline's YAML as --config, its output_dir is where the step latents are, its
visualization_output_dir and save_tensor_stats are this command's, and its other keys are left to the stages. docs/FRAMES.md
describes every file.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wan_common.artifacts import RunDir, find_model
from wan_common.config import DEFAULT_DIR, DEFAULT_MODEL, InputOptions, RunOptions, parse_options
from wan_common.errors import ArtifactError, UsageError, run_command

if TYPE_CHECKING:
    from wan_common.frame_debug import ViewOptions
    from wan_common.frame_views import Decoder
    from wan_common.step_latents import StepLatents

DEFAULT_OUTPUT = "wan_visualization_output"  # seed 000
logger = logging.getLogger("visualize_frames")


def main(argv: list[str] | None = None) -> None:
    """Check the request against what is on disk, draw each clip, then all of them side by side."""
    args = parse_args(argv)
    from wan_common.frame_debug import MAX_CLIPS, check_request, compare_clips, draw_clip

    options, clips = view_options(args), open_clips(args)
    check_request(clips, options)
    decoder = load_decoder(args)
    output_dir = Path(args.output_dir)
    files, curves = [], {}
    for name, clip in clips.items():
        curves[name], written = draw_clip(clip, decoder, options, output_dir / name if len(clips) > 1 else output_dir)
        files += written
    if len(clips) > 1:
        shown = list(clips)[:MAX_CLIPS]
        if len(shown) < len(clips):
            logger.warning("side by side: only %s; choose others with --step_latents", ", ".join(shown))
        shown_curves = {name: curves[name] for name in shown}
        files += compare_clips({name: clips[name] for name in shown}, shown_curves, decoder, options, output_dir)
    for path in files:
        print(path)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; those left None may come from ``--config`` (see :func:`parse_args`)."""
    parser = argparse.ArgumentParser(
        prog="visualize_frames.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE.yaml", help="the pipeline's options as YAML; flags win")
    add("--input_dir", help=f"run directory with the step latents (default {DEFAULT_DIR})")
    add("--output_dir", "--visualization_output_dir", help=f"where to write (default {DEFAULT_OUTPUT})")
    add("--step_latents", nargs="+", metavar="CLIP", help="clips to draw: step_latents_seed3, or paths (default: all)")
    add("--partial", action="store_true", help="accept a clip whose last steps are not there (yet)")
    add("--model_id", help="whose decoder to use: hub id or local folder (default: the run's own)")
    add(
        "--decoder",
        choices=("rgb", "vae"),
        help="linear preview, or the VAE as in stage 3 (default rgb; vae for a model without latent_rgb.json)",
    )
    add("--dtype", choices=("bfloat16", "float32"), help="of the VAE (default bfloat16)")
    text = "video frames to draw, or all (default: frame 0, and contact sheets over the whole clip)"
    add("--frames", nargs="+", type=_frame, metavar="N", help=text)
    add("--channel", type=int, default=0, help="latent channel of the noise pictures (default 0)")
    add("--fps", type=float, default=4.0, help="frames a second of the videos (default 4)")
    text = "write {name}_stats.json beside each picture"
    add("--save_tensor_stats", action=argparse.BooleanOptionalAction, default=None, help=text)
    return parser


def _frame(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a frame number nor all") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Flags first, then the YAML of ``--config``, then the defaults.

    Raises:
        UsageError: an unknown key or a value of a wrong type in the YAML.
    """
    args = build_parser().parse_args(argv)
    config = ["--config", args.config] if args.config else []
    shared = parse_options(config, "visualize_frames.py", "", (RunOptions, InputOptions))
    run = shared.get(RunOptions)
    folder, stats = (shared.yaml.get(key) for key in ("visualization_output_dir", "save_tensor_stats"))
    for key, value, kind in (("visualization_output_dir", folder, str), ("save_tensor_stats", stats, bool)):
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"--config: {key} is {value!r}, wanted {kind.__name__}")
    args.input_dir = args.input_dir or run.output_dir or shared.get(InputOptions).input_dir
    args.output_dir = args.output_dir or folder or DEFAULT_OUTPUT
    args.model_id = args.model_id or run.model_id
    args.dtype = args.dtype or run.dtype
    args.jax_cache_dir = run.jax_cache_dir
    args.save_tensor_stats = bool(stats) if args.save_tensor_stats is None else args.save_tensor_stats
    if args.frames and "all" in args.frames and len(args.frames) > 1:
        raise UsageError(f"--frames {' '.join(map(str, args.frames))}: wanted numbers, or all alone")
    if not (math.isfinite(args.fps) and args.fps > 0):
        raise UsageError(f"--fps {args.fps}: wanted more than 0")
    return args


def view_options(args: argparse.Namespace) -> ViewOptions:
    """What to draw."""
    from wan_common.frame_debug import ViewOptions

    frames: tuple[int, ...] | Literal["all"] | None = tuple(args.frames) if args.frames else None
    return ViewOptions("all" if args.frames == ["all"] else frames, args.channel, args.fps, args.save_tensor_stats)


def open_clips(args: argparse.Namespace) -> dict[str, StepLatents]:
    """The clips to draw, checked, by a short name: ``seed3`` for ``step_latents_seed3``.

    Raises:
        ArtifactError: a clip is missing or not whole.
        UsageError: a clip is asked for twice.
    """
    from wan_common.step_latents import FOLDER, REMEDY, StepLatents, find_clips

    run = Path(args.input_dir)
    folders = []
    for name in args.step_latents or ():
        candidates = [path for path in (run / name, Path(name)) if path.is_dir()]
        if not candidates:
            raise ArtifactError(f"--step_latents {name}: no such folder, here or in {run}; {REMEDY}")
        folders.append(candidates[0])
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError(f"--step_latents {' '.join(args.step_latents)}: a clip is named twice")
    clips: dict[str, StepLatents] = {}
    for folder in folders or find_clips(run):
        name = folder.resolve().name.removeprefix(FOLDER).lstrip("_") or folder.resolve().parent.name
        if name in clips:
            name = f"{folder.resolve().parent.name}_{name}"
        clips[name if name not in clips else f"{name}_{len(clips) + 1}"] = StepLatents.open(folder, args.partial)
    return clips


def load_decoder(args: argparse.Namespace) -> Decoder:
    """The linear preview of the model, or its VAE.

    Raises:
        ArtifactError: the model cannot be found, or lacks what the decoder needs.
    """
    from wan_common.frame_views import rgb_decoder, vae_decoder

    config = RunDir(args.input_dir).read_config()
    model_id = args.model_id or config.get("model_id") or DEFAULT_MODEL
    if (args.decoder or choose_decoder(model_id)) == "rgb":
        from wan_common.latent_rgb import load_latent_rgb

        folder = find_model(model_id, ()).path
        try:
            return rgb_decoder(load_latent_rgb(folder))
        except ArtifactError as error:
            raise ArtifactError(f"{error} (or decode with --decoder vae)") from error
    from wan_common.mesh import make_mesh, picture_mesh_shape, prepare_jax

    prepare_jax(args.jax_cache_dir)  # before the next lines, which import JAX: it reads JAX_PLATFORMS then
    import jax

    from wan_common.vae import load_vae_decoder

    shape = picture_mesh_shape(len(jax.devices()), config.get("height", 480) // 8, config.get("width", 832) // 8)
    return vae_decoder(load_vae_decoder(find_model(model_id, ("vae",)).path, args.dtype, make_mesh(shape)))


def choose_decoder(model_id: str) -> Literal["rgb", "vae"]:
    """What to decode with when nobody said: the linear preview, or the VAE of a model that has none (no published one has).

    Raises:
        ArtifactError: the model cannot be found, or has neither.
    """
    from wan_common.latent_rgb import FILE_NAME, fit_command

    folder = find_model(model_id, ()).path
    if (folder / FILE_NAME).exists():
        return "rgb"
    try:
        find_model(model_id, ("vae",))
    except ArtifactError as error:
        found = f"{folder / FILE_NAME}: no linear preview for this model, and its VAE is not there either"
        raise ArtifactError(f"{found}: {error}") from error
    preview = f"for the faster linear preview run once: {fit_command(folder)}"
    logger.info("%s has no %s, so its VAE decodes, as with --decoder vae; %s", model_id, FILE_NAME, preview)
    return "vae"


if __name__ == "__main__":
    sys.exit(run_command(main))
