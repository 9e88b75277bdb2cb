"""The three stages as plans: what would run, is it current, then load, run, save. The scripts and generate.py call these.

A plan is made from options, files and hashes alone; torch and JAX are imported only when there is work to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_common import multihost
from wan_common.artifacts import (
    EMBEDDINGS_NAME,
    STAGE1,
    STAGE2,
    STAGE3,
    Job,
    Model,
    RunDir,
    clip_suffix,
    find_model,
    latents_name,
    step_latents_name,
    video_name,
)  # fmt: skip
from wan_common.atomic import make_output_dir
from wan_common.config import (
    DEFAULT_DIR,
    DEFAULT_MODEL,
    AttentionFlags,
    BenchOptions,
    DecodeOptions,
    DenoiseOptions,
    FpsOptions,
    InputOptions,
    MeshOptions,
    Options,
    PromptOptions,
    RunOptions,
    VideoOptions,
    check_attention,
    check_fps,
    check_measuring,
    check_video,
    read_model_defaults,
)  # fmt: skip
from wan_common.errors import ArtifactError, UsageError
from wan_common.signals import StopSignals

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from wan_common.attention_maps import AttentionSettings
    from wan_common.denoise_run import Clip, ClipRunner
    from wan_common.embeddings import Embeddings
    from wan_common.latents import Latents
    from wan_common.mesh import MeshShape
    from wan_common.text_encoder import TextEncoder
    from wan_common.torchax_bridge import Params
    from wan_common.vae import VaeDecoder

logger = logging.getLogger("stages")


@dataclasses.dataclass
class StagePlan:
    """One stage's work.

    Attributes:
        output: the run directory it writes. job: what decides its outputs.
        started: when the stage began, for the timings in its provenance.
    """

    stage: str
    run: RunOptions
    model: Model
    output: RunDir
    job: Job
    mesh_options: MeshOptions
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def is_current(self) -> bool:
        """Whether the outputs are there and match; says so, or says why the stage runs."""
        reasons = ["--force"] if self.run.force else self.output.stale_reasons(self.stage, self.job) + self.missing_extras()
        if reasons:
            logger.info("%s runs: %s", self.stage, "; ".join(reasons))
            return False
        names = ", ".join(str(self.output / name) for name in self.output.record(self.stage)["outputs"])
        logger.info("%s is current: %s; --force runs it again", self.stage, names)
        return True

    def missing_extras(self) -> list[str]:
        """Optional outputs that were asked for and are not there."""
        return []

    def start_devices(self, batch: int = 2) -> Mesh:
        """Initialise JAX and lay the mesh out for ``batch`` rows; logs what was found."""
        from wan_common.mesh import make_mesh, prepare_jax

        prepare_jax(self.run.jax_cache_dir)
        multihost.initialize(self.run.distributed)
        import jax

        shape = self.mesh_shape(len(jax.devices()), batch)
        multihost.check_initialized()
        self.use_mesh(make_mesh(shape))
        logger.info("%s device(s) of kind %s, mesh %s", self.devices["count"], self.devices["kind"], shape)
        return self.mesh

    def mesh_shape(self, devices: int, batch: int) -> MeshShape:
        """The mesh for ``devices`` and ``batch`` rows, as the flags ask."""
        from wan_common.mesh import choose_mesh_shape

        options = self.mesh_options
        return choose_mesh_shape(devices, batch, use_dp=options.use_dp, dp=options.dp, sp=options.sp_num, tp=options.tp)

    def use_mesh(self, mesh: Mesh) -> None:
        """Run on ``mesh``, and say so in the provenance."""
        from wan_common.mesh import MeshShape, describe_devices

        self.mesh = mesh
        self.devices = {**describe_devices(), "mesh": str(MeshShape(**mesh.shape))}

    def prepare_output(self) -> None:
        """Make the output folder ready, before anything expensive starts."""
        if multihost.is_writer():
            self.output.prepare()

    def save_record(self, outputs: list[Path], flat: dict[str, Any], **details: Any) -> None:
        """Write the provenance; the last thing a stage does."""
        if multihost.is_writer():
            seconds = {"stage": round(time.perf_counter() - self.started, 2), **details.pop("seconds", {})}
            self.output.save(self.stage, self.job, outputs, flat, devices=self.devices, seconds=seconds, **details)
            for path in outputs:
                logger.info("wrote %s (%.1f MiB)", path, path.stat().st_size / 2**20)
        multihost.barrier(self.stage)


# ---------------------------------------------------------------------------------------------- stage 1


@dataclasses.dataclass
class TextPlan(StagePlan):
    """Stage 1: ``prompts`` as typed."""

    prompts: list[str] = dataclasses.field(default_factory=list)
    options: PromptOptions = PromptOptions()

    def save(self, embeddings: Embeddings) -> None:
        """Write the embeddings and their provenance."""
        path = self.output / EMBEDDINGS_NAME
        if multihost.is_writer():
            embeddings.save(path, self.job)
        prompts = embeddings.prompts
        flat = {
            "prompt": prompts[0] if len(prompts) == 1 else prompts, "negative_prompt": embeddings.negative_prompt,
            "model_id": self.model.model_id, "max_sequence_length": self.options.max_sequence_length,
        }  # fmt: skip
        self.save_record([path], flat)


def plan_text(options: Options) -> TextPlan:
    """Stage 1's plan.

    Raises:
        UsageError: no prompt, two sources of prompts, an empty one. ArtifactError: no usable model.
    """
    run = options.get(RunOptions)
    output = RunDir(run.output_dir or DEFAULT_DIR)
    model = find_model(run.model_id or output.read_config().get("model_id") or DEFAULT_MODEL, ("tokenizer", "text_encoder"))
    prompt_options = options.get(PromptOptions, read_model_defaults(model.path))
    prompts = read_prompts(prompt_options)
    if prompt_options.max_sequence_length < 2:
        raise UsageError(f"--max_sequence_length {prompt_options.max_sequence_length}: wanted at least 2 (a token and the end mark)")
    settings = {
        "prompt": prompts[0] if len(prompts) == 1 else prompts, "negative_prompt": prompt_options.negative_prompt,
        "max_sequence_length": prompt_options.max_sequence_length, "keep_parentheses": prompt_options.keep_parentheses, "dtype": run.dtype,
    }  # fmt: skip
    job = Job(settings, {}, model.identity("tokenizer", "text_encoder"))
    return TextPlan(STAGE1, run, model, output, job, options.get(MeshOptions), prompts=prompts, options=prompt_options)


def read_prompts(options: PromptOptions) -> list[str]:
    """The prompts of ``--prompt`` or, a line each (blank lines and # comments left out), of ``--prompts_file``.

    Raises:
        UsageError: neither, both, an unreadable file, or nothing in it.
    """
    if (options.prompt is None) == (options.prompts_file is None):
        raise UsageError("--prompt: give one of --prompt 'text' and --prompts_file FILE")
    if options.prompt is not None:
        prompts = [options.prompt]
    else:
        try:
            lines = Path(str(options.prompts_file)).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts_file {options.prompts_file}: not readable ({error}); give a UTF-8 text file") from error
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("--prompt: empty; describe the video, for example --prompt 'a red circle moving right on a blue background'")
    return prompts


def load_text_encoder(plan: TextPlan) -> tuple[TextEncoder, Params]:
    """Build the text encoder on the plan's mesh and stream its weights."""
    from wan_common.text_encoder import build_text_encoder, load_text_weights, read_text_config

    plan.prepare_output()
    encoder = build_text_encoder(read_text_config(plan.model.path), plan.mesh, plan.run.dtype, plan.mesh_options.use_fsdp)
    return encoder, load_text_weights(encoder, plan.model.path)


def encode(plan: TextPlan, loaded: tuple[TextEncoder, Params]) -> Embeddings:
    """Tokenize and encode the plan's prompts and the negative prompt."""
    import numpy as np

    from wan_common.embeddings import Embeddings
    from wan_common.prompts import Prompt, parse_prompt
    from wan_common.text_encoder import tokenize

    encoder, params = loaded
    prompts = [parse_prompt(text, plan.options.keep_parentheses) for text in plan.prompts]
    negative = parse_prompt(plan.options.negative_prompt, keep_parentheses=True) if plan.options.negative_prompt.strip() else Prompt("")
    tokens = tokenize(plan.model.path, [*prompts, negative], plan.options.max_sequence_length)
    embeds = encoder.run(params, tokens.ids, tokens.lengths)
    return Embeddings(
        prompt=embeds[:-1], negative=embeds[-1:], token_ids=tokens.ids[:-1], negative_token_ids=np.asarray(tokens.ids[-1:]),
        prompts=[prompt.text for prompt in prompts], negative_prompt=negative.text, words=tokens.words[:-1],
        negative_words=tokens.words[-1],
        num_tokens=[int(n) for n in tokens.lengths[:-1]], negative_num_tokens=int(tokens.lengths[-1]), model=plan.job.model,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- stage 2


@dataclasses.dataclass
class DenoisePlan(StagePlan):
    """Stage 2: every prompt of the embeddings with every seed."""

    input: RunDir = dataclasses.field(default_factory=lambda: RunDir(DEFAULT_DIR))
    embeddings: Embeddings = dataclasses.field(default=None)  # type: ignore[assignment]
    video: VideoOptions = VideoOptions()
    fps: int = 16
    attention: AttentionFlags = AttentionFlags()
    keep: DenoiseOptions = DenoiseOptions()
    analysis: AttentionSettings = dataclasses.field(default=None)  # type: ignore[assignment]
    bench: BenchOptions = BenchOptions()
    text_dim: int = 0

    @property
    def guidance(self) -> bool:
        """Whether the negative prompt is used (diffusers: guidance_scale > 1)."""
        return self.video.guidance_scale > 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the clips in latent pixels."""
        return self.video.height // 8, self.video.width // 8

    def clips(self) -> list[Clip]:
        """What to denoise, in order; suffixes name only what tells clips apart."""
        from wan_common.denoise_run import Clip

        many_prompts, many_seeds = len(self.embeddings.prompts) > 1, len(self.video.seed) > 1
        found = []
        for p in range(len(self.embeddings.prompts)):
            for s, seed in enumerate(self.video.seed):
                job = dataclasses.replace(self.job, settings={**self.job.settings, "seed": seed, "prompt_index": p})
                suffix = clip_suffix(p if many_prompts else None, seed if many_seeds else None)
                found.append(Clip(
                    p, seed, suffix, f"prompt_{p + 1:03d}_vid_{s + 1:03d}", job, self.video.height, self.video.width, self.video.frames,
                    self.fps, self.video.guidance_scale,
                ))  # fmt: skip
        return found

    def extras(self) -> dict[str, Any]:
        """Optional outputs that were asked for."""
        wanted: dict[str, Any] = {}
        if self.keep.save_step_latents:
            wanted["step_latents"] = self.keep.step_latents_dtype
        if self.analysis.store_attention:
            wanted["attention"] = {**dataclasses.asdict(self.analysis), "tokens": list(self.keep.attention_tokens)}
        return _as_json(wanted)

    def missing_extras(self) -> list[str]:
        from wan_common.step_latents import steps_on_disk

        record = self.output.record(STAGE2)
        kept, wanted = record.get("extras", {}), self.extras()
        missing = [f"{name} asked for and not kept" for name in wanted if kept.get(name) != wanted[name]]
        for clip in self.clips() if wanted and not missing else []:
            folder = self.output / step_latents_name(clip.suffix)
            if "step_latents" in wanted:
                count = max(0, steps_on_disk(folder, clip.job.fingerprint, self.keep.step_latents_dtype))
                if count < self.video.num_inference_steps:
                    missing.append(f"{folder}: {count} of {self.video.num_inference_steps} steps are there and whole")
            if "attention" in wanted and not (self.output / "attention_maps" / clip.video_id).is_dir():
                missing.append(f"{self.output / 'attention_maps' / clip.video_id}: not there")
        return missing

    def save(self, paths: list[Path], timings: dict[str, Any]) -> None:
        """Write the provenance of all clips."""
        if multihost.is_writer():
            self.output.adopt(self.input, STAGE1)
        video = self.video
        flat = {
            "width": video.width, "height": video.height, "frames": video.frames, "fps": self.fps,
            "num_inference_steps": video.num_inference_steps, "guidance_scale": video.guidance_scale,
            "seed": video.seed[0] if len(video.seed) == 1 else list(video.seed), "flow_shift": video.flow_shift,
            "model_id": self.model.model_id, "prompt": _one_or_all(self.embeddings.prompts),
            "negative_prompt": self.embeddings.negative_prompt, "max_sequence_length": self.embeddings.prompt.shape[1],
        }  # fmt: skip
        self.save_record(paths, flat, extras=self.extras(), read_from=str(self.input.path), **timings)


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def plan_denoise(options: Options) -> DenoisePlan:
    """Stage 2's plan.

    Raises:
        UsageError: impossible sizes or flags without effect. ArtifactError, NumericalError: no usable embeddings or model.
    """
    from wan_common.attention_maps import AttentionSettings
    from wan_common.embeddings import check_fits, load_embeddings

    run, source = options.get(RunOptions), RunDir(options.get(InputOptions).input_dir)
    if not (source / EMBEDDINGS_NAME).is_file():
        model_flag = f" --model_id {run.model_id}" if run.model_id else ""
        remedy = f"run stage1_text_encoder.py{model_flag} --prompt '...' --output_dir {source.path} first"
        raise ArtifactError(f"{source / EMBEDDINGS_NAME}: not there; {remedy}")
    embeddings = load_embeddings(source, run.force)
    model = find_model(run.model_id or source.read_config().get("model_id") or DEFAULT_MODEL, ("transformer", "scheduler"))
    defaults = read_model_defaults(model.path)
    video, fps = options.get(VideoOptions, defaults), options.get(FpsOptions, defaults).fps
    attention, keep, bench = options.get(AttentionFlags), options.get(DenoiseOptions), options.get(BenchOptions)
    check_video(video)
    check_fps(fps)
    check_attention(attention)
    check_measuring(bench, options)
    analysis = AttentionSettings.from_mapping(
        {**options.yaml.get("attention_analysis", {}), **({"store_attention": True} if keep.store_attention else {})}
    )
    _check_keep(options, keep, analysis)
    if keep.preview_every:
        from wan_common.latent_rgb import load_latent_rgb

        load_latent_rgb(model.path)  # what it raises is said before weights are loaded, not after
    text_dim = _read_json_config(model.path / "transformer" / "config.json").get("text_dim", 4096)
    check_fits(embeddings, source, model, text_dim, run.force)
    if video.height <= 480 and "flow_shift" not in options.given and "flow_shift" not in defaults:
        logger.info("--flow_shift %s is the default for 720p; for %dp Wan recommends --flow_shift 3.0", video.flow_shift, video.height)
    if video.guidance_scale <= 1 and embeddings.negative_prompt:
        logger.warning("--guidance_scale %s means no guidance: the negative prompt has no effect", video.guidance_scale)
    settings = {
        "height": video.height, "width": video.width, "frames": video.frames, "num_inference_steps": video.num_inference_steps,
        "guidance_scale": video.guidance_scale, "seed": _one_or_all(list(video.seed)), "flow_shift": video.flow_shift, "dtype": run.dtype,
        "window_size": attention.window_size, "use_k_smooth": attention.use_k_smooth,
    }  # fmt: skip
    job = Job(settings, {"embeddings": embeddings.sha256}, model.identity("transformer", "scheduler"))
    return DenoisePlan(
        STAGE2, run, model, RunDir(run.output_dir or DEFAULT_DIR), job, options.get(MeshOptions), input=source, embeddings=embeddings,
        video=video, fps=fps, attention=attention, keep=keep, analysis=analysis, bench=bench, text_dim=text_dim,
    )  # fmt: skip


def _check_keep(options: Options, keep: DenoiseOptions, analysis: AttentionSettings) -> None:
    for name in ("checkpoint_every", "preview_every"):
        if getattr(keep, name) < 0:
            raise UsageError(f"--{name} {getattr(keep, name)}: wanted 0 (never) or a number of steps")
    if "step_latents_dtype" in options.flags and not keep.save_step_latents:
        raise UsageError("--step_latents_dtype has no effect without --save_step_latents; add it")
    if keep.attention_tokens and not analysis.store_attention:
        raise UsageError("--attention_tokens has no effect without --store_attention; add it")


def _read_json_config(path: Path) -> dict[str, Any]:
    import json

    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); choose a Wan 2.1 diffusers folder with --model_id") from error


def load_denoiser(plan: DenoisePlan, stop: StopSignals) -> ClipRunner:
    """Build the denoising step on the plan's mesh, stream its weights, read the solver's table."""
    from wan_common.attention import AttentionOptions
    from wan_common.denoise_run import ClipRunner, Keep
    from wan_common.denoiser import Capture, build_denoiser, read_config
    from wan_common.scheduler import load_scheduler, step_table

    plan.prepare_output()
    folder = plan.model.path / "transformer"
    flags, video = plan.attention, plan.video
    splash = plan.devices["platform"] == "tpu" and flags.use_custom_attention
    if not splash and flags.bqsize is not None:
        logger.warning("--bqsize --bkvsize --bkvcomputesize have no effect: XLA's attention runs on %s", plan.devices["platform"])
    attention = AttentionOptions(
        "splash" if splash else "xla", flags.bqsize, flags.bkvsize, flags.bkvcomputesize, flags.window_size, flags.use_k_smooth
    )
    analysis = plan.analysis
    capture = Capture(analysis.store_per_head, analysis.store_per_block, analysis.store_negative) if analysis.store_attention else None
    denoiser = build_denoiser(
        read_config(folder, "WanTransformer3DModel"), plan.mesh, height=video.height, width=video.width, frames=video.frames,
        text_length=plan.embeddings.prompt.shape[1], guidance=plan.guidance, dtype=plan.run.dtype, fsdp=plan.mesh_options.use_fsdp,
        options=attention, capture=capture,
    )  # fmt: skip
    table = step_table(load_scheduler(plan.model.path / "scheduler", video.flow_shift), video.num_inference_steps)
    keep = Keep(
        plan.keep.checkpoint_every, plan.keep.step_latents_dtype if plan.keep.save_step_latents else None, plan.keep.preview_every,
        analysis, plan.keep.attention_tokens,
    )  # fmt: skip
    return ClipRunner(denoiser, denoiser.load(folder), table, plan.embeddings, plan.output.path, keep, plan.model.path, stop)


def denoise(plan: DenoisePlan, runner: ClipRunner, after_clip: Callable[[Clip, Path], None] = lambda clip, path: None) -> None:
    """Denoise all clips of the plan, leave out those that are there already, and save the provenance.

    Args:
        after_clip: called with each clip and its latents file as soon as it is written.
    """
    from wan_common.latents import has_latents

    clips, bench = plan.clips(), plan.bench
    recorded = plan.output.record(STAGE2).get("outputs", {})
    timings: dict[str, Any] = {}
    if bench.warmup_steps:
        timings["warmup_seconds"] = round(runner.warm_up(clips[0], bench.warmup_steps), 2)
        logger.info("warm-up of %d steps with compilation: %.1f s", bench.warmup_steps, timings["warmup_seconds"])
    paths: list[Path] = []
    per_clip: dict[str, Any] = {}
    for clip in clips:
        path = plan.output / latents_name(clip.suffix)
        if has_latents(path, clip.job, recorded.get(path.name, {}).get("sha256")) and not plan.run.force and not plan.extras():
            logger.info("seed %d: %s is there already", clip.seed, path)
        else:
            for iteration in range(bench.num_iterations):
                if iteration:  # it would go on from the last iteration's checkpoint
                    runner.forget(clip)
                    multihost.barrier("iteration")
                profile = Path(bench.profiler_output_dir) if bench.profile and not per_clip and iteration == 0 else None
                latents, details = runner.run(clip, profile)
                logger.info("seed %d, iteration %d: %s", clip.seed, iteration, details["seconds"])
                per_clip[path.name] = details
            runner.finish(clip, latents)
        paths.append(path)
        after_clip(clip, path)
    plan.save(paths, {**timings, "clips": per_clip, "compilations": runner.compilations})


# ---------------------------------------------------------------------------------------------- stage 3


@dataclasses.dataclass
class DecodePlan(StagePlan):
    """Stage 3: latents files and the video of each."""

    input: RunDir = dataclasses.field(default_factory=lambda: RunDir(DEFAULT_DIR))
    latents: list[tuple[str, Latents]] = dataclasses.field(default_factory=list)
    videos: list[Path] = dataclasses.field(default_factory=list)
    fps: int = 16
    decode: DecodeOptions = DecodeOptions()
    bench: BenchOptions = BenchOptions()
    analysis: AttentionSettings = dataclasses.field(default=None)  # type: ignore[assignment]

    def mesh_shape(self, devices: int, batch: int) -> MeshShape:
        """The picture over all devices."""
        from wan_common.mesh import picture_mesh_shape

        return picture_mesh_shape(devices, *self.latent_size)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the clips in latent pixels."""
        height, width = self.latents[0][1].values.shape[3:]
        return height, width

    def save(self, timings: dict[str, Any]) -> None:
        """Write the provenance of all videos."""
        if multihost.is_writer():
            for stage in (STAGE1, STAGE2):
                self.output.adopt(self.input, stage)
        self.save_record(self.videos, {"fps": self.fps}, read_from=str(self.input.path), **timings)


def plan_decode(options: Options, video_of: dict[str, Path] | None = None) -> DecodePlan:
    """Stage 3's plan: reads and checks the latents.

    Args:
        video_of: clip suffix -> its video, where they do not go by :func:`artifacts.video_name`.

    Raises:
        UsageError, ArtifactError, NumericalError: see the functions it calls.
    """
    from wan_common.attention_maps import AttentionSettings
    from wan_common.latents import load_latents, making_command

    run, source = options.get(RunOptions), RunDir(options.get(InputOptions).input_dir)
    analysis = AttentionSettings.from_mapping(options.yaml.get("attention_analysis", {}))
    config, decode = source.read_config(), options.get(DecodeOptions)
    names = sorted(source.record(STAGE2).get("outputs", {})) or [latents_name("")]
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ArtifactError(f"{source / missing[0]}: not there; {making_command(source)} first")
    loaded = [(name, load_latents(source, source / name, run.force)) for name in names]
    model = find_model(run.model_id or config.get("model_id") or DEFAULT_MODEL, ("vae",))
    fps = options.get(FpsOptions, {"fps": config["fps"]} if "fps" in config else read_model_defaults(model.path)).fps
    bench = options.get(BenchOptions)
    check_fps(fps)
    check_measuring(bench, options)
    if video_of is None and decode.output_video is not None and len(names) > 1:
        raise UsageError(f"--output_video {decode.output_video}: there are {len(names)} latents files in {source.path}; leave it out")
    output = RunDir(run.output_dir or source.path)
    suffixes = [suffix_of(name) for name in names]
    default = {suffix: Path(decode.output_video) if decode.output_video else output / video_name(suffix) for suffix in suffixes}
    videos = [(video_of or default)[suffix] for suffix in suffixes]
    names_of_videos = [output.name_of(video) for video in videos]  # relative: a moved folder stays current
    settings = {"fps": fps, "dtype": run.dtype, "save_frames": decode.save_frames, "output_video": names_of_videos}
    job = Job(settings, {name: latents.sha256 for name, latents in loaded}, model.identity("vae"))
    return DecodePlan(
        STAGE3, run, model, output, job, MeshOptions(), input=source, latents=loaded, videos=videos, fps=fps, decode=decode,
        bench=bench, analysis=analysis,
    )  # fmt: skip


def load_vae(plan: DenoisePlan | DecodePlan) -> VaeDecoder:
    """Build the VAE decoder over all devices for the plan's pictures and stream its weights."""
    from wan_common.mesh import make_mesh, picture_mesh_shape
    from wan_common.vae import load_vae_decoder

    plan.prepare_output()
    mesh = make_mesh(picture_mesh_shape(plan.mesh.size, *plan.latent_size))
    return load_vae_decoder(plan.model.path, plan.run.dtype, mesh)


@contextlib.contextmanager
def profiled(bench: BenchOptions, first: bool) -> Iterator[None]:
    """A JAX profiler trace of what runs inside, if ``--profile`` asks for one and this is the ``first`` run."""
    if not (bench.profile and first):
        yield
        return
    import jax

    with jax.profiler.trace(bench.profiler_output_dir):
        yield
    logger.info("profiler trace in %s", bench.profiler_output_dir)


def decode_all(plan: DecodePlan, decoder: VaeDecoder) -> None:
    """Decode every latents file of the plan to its video, and save the provenance."""
    timings: dict[str, Any] = {}
    if plan.bench.warmup_steps:
        begun = time.perf_counter()
        for _ in decoder.decode(plan.latents[0][1].values[:, :, : 1 + plan.bench.warmup_steps]):
            pass
        timings["warmup_seconds"] = round(time.perf_counter() - begun, 2)
    seconds: dict[str, float] = {}
    for (name, latents), video in zip(plan.latents, plan.videos, strict=True):
        for iteration in range(plan.bench.num_iterations):
            begun = time.perf_counter()
            with profiled(plan.bench, first=not seconds and iteration == 0):
                decode_video(decoder, latents, video, plan.fps, plan.decode.save_frames)
            seconds[name] = round(time.perf_counter() - begun, 2)
            logger.info("%s: decoded in %.2f s", video, seconds[name])
        draw_clip_attention(plan.input.path, plan.analysis, suffix_of(name), video)
    plan.save({**timings, "seconds": {"decode": seconds}})
    draw_batch_attention(plan.input.path, plan.analysis)


def suffix_of(name: str) -> str:
    """The clip's suffix in a latents file's name."""
    return name.removeprefix("stage2_latents").removesuffix(".safetensors")


def draw_clip_attention(run: Path, analysis: AttentionSettings, suffix: str, video: Path) -> None:
    """Seed 003's ``auto_generate_per_video``: the clip's attention videos in ``attention_videos/`` beside its video."""
    if not analysis.auto_generate_per_video or not multihost.is_writer():
        return
    from wan_common.attention_maps import AttentionAnalyzer
    from wan_common.attention_visualizer import visualize_run

    analyzer = AttentionAnalyzer(run / "attention_maps")
    mine = [v for v in analyzer.get_available_videos() if analyzer.get_video_metadata(v)["clip"]["suffix"] == suffix]
    params = analysis.visualization_params
    visualize_run(run, video.parent, video_ids=mine, params=params, original_video=video, figures=False, report=False)


def draw_batch_attention(run: Path, analysis: AttentionSettings) -> None:
    """Seed 003's ``auto_generate_videos``: all attention videos in ``attention_videos/`` once the batch is done."""
    if analysis.auto_generate_videos and multihost.is_writer():
        from wan_common.attention_visualizer import visualize_run

        visualize_run(run, run, params=analysis.visualization_params, figures=False, report=False)


def decode_clip(plan: DenoisePlan, decoder: VaeDecoder, path: Path, video: Path, options: Options) -> None:
    """generate.py: decode one clip as soon as its latents are written."""
    from wan_common.latents import load_latents

    multihost.barrier(path.name)
    decode_video(decoder, load_latents(plan.output, path, force=True), video, plan.fps, options.get(DecodeOptions).save_frames)
    draw_clip_attention(plan.output.path, plan.analysis, suffix_of(path.name), video)


def decode_video(decoder: VaeDecoder, latents: Latents, video: Path, fps: int, save_frames: bool = False) -> None:
    """Decode one clip's latents and stream the frames to ``video`` (and to PNGs in ``<video>_frames/``)."""
    import contextlib

    import imageio.v3 as iio
    from tqdm import tqdm

    from wan_common.video import VideoWriter

    metadata = {"prompt": latents.prompt, "negative_prompt": latents.negative_prompt, **latents.settings, "fps": fps}
    total = 4 * (latents.values.shape[2] - 1) + 1
    folder = video.with_name(f"{video.stem}_frames")
    with contextlib.ExitStack() as stack:
        writer = None
        if multihost.is_writer():
            make_output_dir(video.parent, "--output_video")
            if save_frames:
                make_output_dir(folder)
            writer = stack.enter_context(VideoWriter(video, fps, metadata=metadata))
        bar = stack.enter_context(tqdm(total=total, desc=f"decoding {video.name}", unit="frame", disable=writer is None))
        for frame in _frames(decoder.decode(latents.values)):
            if writer is not None:
                if save_frames:
                    iio.imwrite(folder / f"frame_{writer.frames:04d}.png", frame)
                writer.append(frame)
            bar.update()


def _frames(chunks: Iterator[Any]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk
