"""Every option once: a default with its source, one parser for CLI flags and ``--config`` YAML, one place that checks them.

A value comes from, in this order: the flag, the YAML file, ``generation_defaults.json`` of the model folder (what a small
model was made for), the default below. This module imports nothing heavy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from wan_common.errors import ArtifactError, UsageError

logger = logging.getLogger("config")
DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
DEFAULT_DIR = "stage_outputs"
MODEL_DEFAULTS_FILE = "generation_defaults.json"
T = TypeVar("T")


def option(
    default: Any, text: str, *, choices: tuple[str, ...] | None = None, aliases: tuple[str, ...] = (), many: bool = False
) -> Any:
    """A dataclass field that is also a flag; ``aliases`` are accepted on the command line and in YAML."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "aliases": aliases, "many": many})


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where to read and write, with which model."""

    model_id: str | None = option(None, f"hub id or local diffusers folder (default: the folder's own, else {DEFAULT_MODEL})")
    output_dir: str | None = option(None, f"run directory to write (default {DEFAULT_DIR}; stage 3: its --input_dir)")
    dtype: str = option("bfloat16", "compute and weight dtype", choices=("bfloat16", "float32"))  # seed 001: bfloat16
    force: bool = option(False, "run even if the outputs are current; use inputs that do not match")
    jax_cache_dir: str | None = option(None, "compilation cache (default ~/.cache/wan_tpu/jax)")
    distributed: bool = option(False, "initialise jax.distributed (several hosts)")


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Where an earlier stage left its files."""

    input_dir: str = option(DEFAULT_DIR, "run directory to read")  # seed 001


@dataclasses.dataclass(frozen=True)
class FpsOptions:
    """The video's speed."""

    fps: int = option(16, "frames a second (default of stage 3: what stage 2 recorded)")  # seed 001


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What to encode."""

    prompt: str | None = option(None, "the text; (word) marks an attention target")
    prompts_file: str | None = option(None, "a text file with one prompt a line, instead of --prompt")
    negative_prompt: str = option("", "what to steer away from")  # diffusers' default
    max_sequence_length: int = option(512, "tokens of the embeddings")  # WanPipeline.__call__; seed 001's table shows 226
    keep_parentheses: bool = option(False, "parentheses are text, not attention markers")


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """What to denoise."""

    height: int = option(720, "pixels, a multiple of 16")  # seed 001
    width: int = option(1280, "pixels, a multiple of 16")  # seed 001
    frames: int = option(81, "4n + 1")  # seed 001
    num_inference_steps: int = option(50, "denoising steps")  # seed 001
    guidance_scale: float = option(5.0, "classifier-free guidance; none at 1 or below")  # seed 001
    seed: tuple[int, ...] = option((42,), "one latents file a seed", many=True)  # seed 001
    flow_shift: float = option(5.0, "flow-matching shift: 5.0 for 720p, 3.0 for 480p")  # seed 001


@dataclasses.dataclass(frozen=True)
class AttentionFlags:
    """The self-attention kernel."""

    bqsize: int | None = option(None, "query block of the kernel (default: the table of its chip and length)")
    bkvsize: int | None = option(None, "key/value block")
    bkvcomputesize: int | None = option(None, "key/value block computed at once")
    use_custom_attention: bool = option(True, "the Pallas splash kernel on TPU (elsewhere XLA's attention runs)")  # seed 001
    window_size: int | None = option(None, "local attention window in tokens (default: all)")  # seed 001
    use_k_smooth: bool = option(False, "subtract the mean key before attention")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How the devices are used."""

    use_dp: bool = option(True, "split the guidance batch over two halves of the devices")  # seed 001
    use_fsdp: bool = option(True, "shard weights at rest over dp and sp, gathered a block ahead")  # seed 001
    sp_num: int | None = option(None, "devices along the sequence", aliases=("sp",))
    dp: int | None = option(None, "devices along the batch")
    tp: int | None = option(None, "devices along heads and features")


@dataclasses.dataclass(frozen=True)
class DenoiseOptions:
    """What stage 2 keeps besides the latents."""

    checkpoint_every: int = option(10, "steps between checkpoints; 0: only when stopped by a signal")
    save_step_latents: bool = option(False, "keep x_t and the predicted x0 of each step", aliases=("visualize_frame_debug",))
    step_latents_dtype: str = option("float16", "dtype of the step latents", choices=("float16", "bfloat16"))
    preview_every: int = option(0, "write preview.png every N steps; 0: never")
    store_attention: bool = option(False, "store cross-attention maps of the targets")
    attention_tokens: tuple[str, ...] = option((), "words whose maps to store, besides the marked ones (neither: all words)", many=True)


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """What stage 3 writes."""

    output_video: str | None = option(None, "the mp4 (default output_video.mp4 in --output_dir)")
    save_frames: bool = option(False, "also write every frame as PNG")


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Measuring."""

    warmup_steps: int = option(0, "steps run and thrown away before the clock starts")
    num_iterations: int = option(1, "how often the measured run is repeated")
    profile: bool = option(False, "write a JAX profiler trace: of a few steps, in stage 3 of the first decode")
    profiler_output_dir: str = option("profile", "where --profile writes")


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The single-process mode."""

    videos_per_prompt: int = option(1, "videos a prompt, seeds counted up from --seed")


GROUPS: tuple[type, ...] = (
    RunOptions, InputOptions, FpsOptions, PromptOptions, VideoOptions, AttentionFlags, MeshOptions, DenoiseOptions, DecodeOptions,
    BenchOptions, BatchOptions,
)  # fmt: skip
_HINTS: dict[str, Any] = {name: hint for group in GROUPS for name, hint in typing.get_type_hints(group).items()}
# YAML keys that are no flags: seed 003's block, and seed 000's keys that visualize_frames.py reads.
OTHER_YAML_KEYS = ("attention_analysis", "visualization_output_dir", "save_tensor_stats")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see --help")


@dataclasses.dataclass(frozen=True)
class Options:
    """Parsed options of one command.

    Attributes:
        given: values from flags or YAML by name.
        yaml: the whole YAML mapping.
    """

    groups: tuple[type, ...]
    given: dict[str, Any]
    flags: frozenset[str]
    yaml: dict[str, Any]

    def get(self, group: type[T], defaults: Mapping[str, Any] | None = None) -> T:
        """The options of ``group``; what was not given comes from ``defaults``, then from the dataclass."""
        names = {f.name: f for f in dataclasses.fields(group)}  # type: ignore[arg-type]
        known = {name: value for name, value in (defaults or {}).items() if name in names}
        values = {name: _convert(names[name], value, "the model's defaults") for name, value in known.items()}
        values.update({name: value for name, value in self.given.items() if name in names})
        return group(**values)


def parse_options(argv: list[str] | None, prog: str, description: str, groups: Iterable[type]) -> Options:
    """Parse flags and the YAML file named by ``--config``; unknown keys and wrong types are errors.

    Raises:
        UsageError: names the flag or key, what was found and what was wanted.
    """
    groups = tuple(groups)
    parser = _Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML, keys are the flag names; flags win")
    for group in groups:
        section = parser.add_argument_group(group.__name__, (group.__doc__ or "").strip())
        for field in dataclasses.fields(group):
            _add_flag(section, field)
    flags = vars(parser.parse_args(argv))
    mapping = _read_yaml(flags.pop("config", None))
    fields = {field.name: field for group in GROUPS for field in dataclasses.fields(group)}
    aliases = {alias: name for name, field in fields.items() for alias in field.metadata["aliases"]}
    given: dict[str, Any] = {}
    for key, value in mapping.items():
        name = aliases.get(key, key)
        if name in fields:
            given[name] = _convert(fields[name], value, "--config")
        elif key not in OTHER_YAML_KEYS:
            known = ", ".join(sorted([*fields, *aliases, *OTHER_YAML_KEYS]))
            raise UsageError(f"--config: unknown key {key!r}; known keys: {known}")
    here = {field.name for group in groups for field in dataclasses.fields(group)}
    given = {name: value for name, value in given.items() if name in here}
    for name, value in flags.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return Options(groups, given, frozenset(flags), mapping)


def _kind(field: dataclasses.Field[Any]) -> type:
    """The scalar type of a field: ``int`` for ``int | None`` and for ``tuple[int, ...]``."""
    hint = _HINTS[field.name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        hint = next(arg for arg in typing.get_args(hint) if arg not in (type(None), Ellipsis))
    return hint


def _add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    names = [f"--{field.name}", *(f"--{alias}" for alias in field.metadata["aliases"])]
    kind, default = _kind(field), field.default
    shown = default[0] if isinstance(default, tuple) and default else default
    text = field.metadata["help"] + ("" if shown in (None, False, ()) else f" (default {shown})")
    text = text.replace("%", "%%")
    if kind is bool:
        section.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
        return
    section.add_argument(
        *names, dest=field.name, type=kind, choices=field.metadata["choices"], help=text,
        nargs="+" if field.metadata["many"] else None, metavar=None if field.metadata["choices"] else kind.__name__.upper(),
    )  # fmt: skip


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({error})") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise UsageError(f"--config {path}: found {type(mapping).__name__}, wanted a mapping of flag names to values")
    return mapping


def _convert(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """``value`` from YAML or JSON as the field wants it."""
    kind = _kind(field)
    if value is None and field.default is None:
        return None
    if field.metadata["many"]:
        return tuple(_scalar(field, kind, v, where) for v in (value if isinstance(value, list) else [value]))
    return _scalar(field, kind, value, where)


def _scalar(field: dataclasses.Field[Any], kind: type, value: Any, where: str) -> Any:
    fits = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, fits = float(value), True
    choices = field.metadata["choices"]
    if not fits or (choices and value not in choices):
        wanted = f"one of {', '.join(choices)}" if choices else kind.__name__
        raise UsageError(f"{where}: {field.name} is {value!r}, wanted {wanted}")
    return value


def read_model_defaults(model_dir: Path | None) -> dict[str, Any]:
    """``generation_defaults.json`` of a model folder: what the model was made for, by flag name; {} when there is none.

    Raises:
        ArtifactError: the file is no JSON object.
    """
    path = model_dir / MODEL_DEFAULTS_FILE if model_dir else None
    if path is None or not path.is_file():
        return {}
    try:
        defaults = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); delete it or restore it") from error
    if not isinstance(defaults, dict):
        raise ArtifactError(f"{path}: found {type(defaults).__name__}, wanted an object of flag names; delete it or restore it")
    return defaults


def check_video(video: VideoOptions) -> None:
    """Refuse sizes that the model cannot make.

    Raises:
        UsageError: names the flag, the value and the nearest that work.
    """
    if video.frames < 1 or video.frames % 4 != 1:
        below = max(1, (video.frames - 1) // 4 * 4 + 1)
        raise UsageError(f"--frames {video.frames}: wanted 4n + 1 (the VAE packs 4 frames into one); nearest: {below} and {below + 4}")
    for name in ("height", "width"):
        value = getattr(video, name)
        if value < 16 or value % 16:
            below = max(16, value // 16 * 16)
            raise UsageError(f"--{name} {value}: wanted a multiple of 16 (VAE 8 x patch 2); nearest: {below} and {below + 16}")
    if video.num_inference_steps < 1:
        raise UsageError(f"--num_inference_steps {video.num_inference_steps}: wanted at least 1")
    if not video.flow_shift > 0:
        raise UsageError(f"--flow_shift {video.flow_shift}: wanted more than 0 (5.0 for 720p, 3.0 for 480p)")
    if not 0 <= video.guidance_scale < float("inf"):
        raise UsageError(f"--guidance_scale {video.guidance_scale}: wanted a number from 0 up")
    repeated = {seed for seed in video.seed if video.seed.count(seed) > 1}
    if repeated or any(not 0 <= seed < 2**63 for seed in video.seed):
        raise UsageError(f"--seed {' '.join(map(str, video.seed))}: wanted different whole numbers from 0 to 2^63 - 1")


def check_fps(fps: int) -> None:
    """Refuse a frame rate that no video has.

    Raises:
        UsageError: below 1.
    """
    if fps < 1:
        raise UsageError(f"--fps {fps}: wanted at least 1")


def check_measuring(bench: BenchOptions, options: Options) -> None:
    """Refuse measuring options that contradict each other.

    Raises:
        UsageError: a negative count, or a flag that would have no effect.
    """
    if bench.warmup_steps < 0 or bench.num_iterations < 1:
        raise UsageError(f"--warmup_steps {bench.warmup_steps} --num_iterations {bench.num_iterations}: wanted at least 0 and 1")
    if "profiler_output_dir" in options.flags and not bench.profile:
        raise UsageError("--profiler_output_dir has no effect without --profile; add it")


def check_attention(flags: AttentionFlags) -> None:
    """Refuse block sizes given by halves.

    Raises:
        UsageError: some but not all of the three block sizes, sizes that are no multiples of what they must be, a window below 1.
    """
    blocks = (flags.bqsize, flags.bkvsize, flags.bkvcomputesize)
    if any(b is not None for b in blocks) and any(b is None or b < 1 for b in blocks):
        raise UsageError(f"--bqsize --bkvsize --bkvcomputesize: found {blocks}, wanted all three (seed 001: 3328 2816 256) or none")
    for name, block, multiple in zip(("bqsize", "bkvsize", "bkvcomputesize"), blocks, (128, flags.bkvcomputesize, 128), strict=True):
        if block is not None and multiple is not None and block % multiple:  # custom_splash_attention.BlockSizes
            raise UsageError(f"--{name} {block}: wanted a multiple of {'--bkvcomputesize ' if name == 'bkvsize' else ''}{multiple}")
    if flags.window_size is not None and flags.window_size < 1:
        raise UsageError(f"--window_size {flags.window_size}: wanted at least 1, or leave it out")
