"""Planning without a TPU: compile what the stages run for a described slice; read memory, cycles and collectives.

Predicted seconds = (estimated cycles of every scheduled fusion x its loop's trips + static cycles of each kernel x its grid)
/ clock + what the schedule does not hide of each collective's bytes over the links. Nothing is fitted to measurements.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_common.atomic import atomic_path
from wan_common.errors import UsageError, WanError, setup_logging
from wan_common.hlo import Kernel, Totals, schedule, size_of, total
from wan_common.kernel_cycles import KernelShape, kernel_code, splash_cycles
from wan_common.mesh import MeshShape, choose_mesh_shape, make_mesh, picture_mesh_shape
from wan_common.plan_kernels import norm_rope_seconds
from wan_common.published import ModelConfigs
from wan_common.tpu_topology import LINKS, Network, Topology, describe, larger

if TYPE_CHECKING:
    from jax.sharding import Mesh

logger = logging.getLogger("plan")
STAGES = ("text_encoder", "denoise_step", "vae_decode")
SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
# What decides a compiled program, by stage; the analysis of its text is done anew each time.
SOURCES = {
    "text_encoder": ("text_encoder", "pytrees"),
    "denoise_step": ("attention", "denoiser", "rope_kernel", "scheduler"),  # and _kernel_source
    "vae_decode": ("vae",),
}
SHARED_SOURCES = ("sharding", "torchax_bridge")
SHORT_KEYS = 1024  # keys of one kernel call up to here are text, more are tokens


class StageCompileError(WanError):
    """The TPU compiler fails on a program for another reason than memory (exit code 1)."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan. Sizes in pixels and frames; ``mesh`` None takes each stage's default."""

    topology: Topology
    model: ModelConfigs
    height: int = 720
    width: int = 1280
    frames: int = 81
    steps: int = 50
    guidance: bool = True
    text_length: int = 512
    dtype: str = "bfloat16"
    mesh: MeshShape | None = None
    fsdp: bool = True
    blocks: tuple[int, int, int] | None = None  # bqsize, bkvsize, bkvcomputesize
    window_size: int | None = None
    k_smooth: bool = False
    store_words: int = 0  # words whose attention maps each step stores
    layers: int | None = None  # transformer blocks, instead of the config's (calibration)
    baseline: bool = False  # the plain program of seed 001 instead of ours

    @property
    def mesh_shape(self) -> MeshShape:
        """Of the denoise step and the text encoder."""
        return self.mesh or choose_mesh_shape(self.topology.devices, 2 if self.guidance else 1)

    @property
    def transformer(self) -> dict[str, Any]:
        """The transformer's config, with ``layers`` of it."""
        return self.model.transformer if self.layers is None else {**self.model.transformer, "num_layers": self.layers}

    @property
    def tokens(self) -> int:
        """Tokens of one clip after patch embedding."""
        return ((self.frames - 1) // 4 + 1) * (self.height // 16) * (self.width // 16)

    @property
    def latent_frames(self) -> int:
        """Calls of the VAE's decoder a clip."""
        return (self.frames - 1) // 4 + 1


@dataclasses.dataclass
class Compiled:
    """One stage's program: its text and what the compiler said of its memory (bytes a device)."""

    text: str
    memory: dict[str, int]
    flops: float
    lower_seconds: float
    compile_seconds: float
    error: str = ""


def cache_dir() -> Path:
    """Where compiled programs are kept: $WAN_TPU_PLAN_CACHE, else ~/.cache/wan_tpu/plans."""
    return Path(os.environ.get("WAN_TPU_PLAN_CACHE") or "~/.cache/wan_tpu/plans").expanduser()


def program_key(request: Request, stage: str) -> str:
    """Name of a program in the cache: all that decides it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "torchax", "diffusers", "transformers", "torch")}
    fields = dataclasses.asdict(request)
    fields.pop("steps")
    relevant = {
        "text_encoder": ("topology", "text_length", "dtype", "fsdp"),
        "denoise_step": tuple(name for name in fields if name not in ("model",)),
        "vae_decode": ("topology", "height", "width", "dtype"),
    }[stage]
    config = {"text_encoder": request.model.text_encoder, "denoise_step": request.transformer, "vae_decode": request.model.vae}[stage]
    key = {
        "schema": SCHEMA, "stage": stage, "config": config, "versions": versions, "libtpu_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        **{name: fields[name] for name in relevant}, "mesh": str(stage_mesh_shape(request, stage)),
        "make_mesh": inspect.getsource(make_mesh),  # not the whole file: which mesh is the default does not decide a program
        **{name: value for name, value in os.environ.items() if name.startswith("JAX_EXEC_TIME_OPT")},
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
    extra = [*(["attention_maps"] if request.store_words else []), *(["plan_baseline"] if request.baseline else [])]
    for source in (*SHARED_SOURCES, *SOURCES[stage], *(extra if stage == "denoise_step" else [])):
        digest.update((ROOT / "wan_common" / f"{source}.py").read_bytes())
    if stage == "denoise_step":
        digest.update(_kernel_source(request.topology.chip).encode())
    return digest.hexdigest()[:32]


def _kernel_source(chip: str) -> str:
    """``custom_splash_attention.py`` as far as it decides the programs of ``chip``: of its tables of block sizes only that row."""
    import custom_splash_attention as kernel

    return f"{kernel_code(('_TABLE', '_SHORT_TABLE'))} {kernel._TABLE[chip]} {kernel._SHORT_TABLE[chip]}"


def program_file(request: Request, stage: str) -> Path:
    """Where the stage's program is kept once it is compiled."""
    return cache_dir() / f"{stage}-{program_key(request, stage)}.json.gz"


def compiled_stage(request: Request, stage: str, use_cache: bool = True) -> Compiled:
    """The stage's program for the slice, from the cache or by compiling it (minutes)."""
    file = program_file(request, stage)
    if use_cache and file.exists():
        try:
            return Compiled(**json.loads(gzip.decompress(file.read_bytes())))
        except (OSError, ValueError, TypeError, EOFError):
            logger.warning("%s: unreadable, compiling again", file)
    compiled = _compile(request, stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 5))
    return compiled


def _compile(request: Request, stage: str) -> Compiled:
    import warnings

    import jax

    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64", category=UserWarning)  # as mesh.prepare_jax
    logger.info("%s: compiling for %s", stage, request.topology.name)
    mesh = stage_mesh(request, stage)
    begun = time.perf_counter()
    jitted, arguments = stage_program(request, stage, mesh)
    with jax.set_mesh(mesh):
        traced = jitted.trace(*arguments)
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        flops = count_flops(traced.jaxpr.jaxpr, mesh.size)
        compiling_at = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error).lower():
                raise StageCompileError(
                    f"{stage} on {request.topology.name} as {mesh_text(request, stage)}: the TPU compiler fails, and would on the slice: "
                    f"{str(error).splitlines()[0][:300]}; choose another mesh (leave --dp, --sp_num and --tp out for the default)"
                ) from error
            if "of memory in memory space vmem" in str(error):
                raise UsageError(
                    f"{stage}: block sizes {request.blocks} overflow {request.topology.chip}'s vector memory "
                    f"({str(error).splitlines()[0][:200]}); leave --bqsize, --bkvsize and --bkvcomputesize out, or take a row of "
                    "plan_tpu.py --search_blocks"
                ) from error
            # The compiler refuses programs that overflow the chip's memory; the message has the numbers.
            return Compiled("", {}, flops, lowered_at - begun, time.perf_counter() - compiling_at, str(error)[:2000])
    done = time.perf_counter()
    stats = compiled.memory_analysis()
    memory = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp", "generated_code")}
    return Compiled(compiled.as_text(), memory, flops, lowered_at - begun, done - compiling_at)


def stage_mesh(request: Request, stage: str) -> Mesh:
    """The mesh a stage runs on: the VAE splits the picture over all devices."""
    return make_mesh(stage_mesh_shape(request, stage), describe(request.topology))


def stage_mesh_shape(request: Request, stage: str) -> MeshShape:
    """:func:`stage_mesh`'s shape."""
    if stage == "vae_decode":
        return picture_mesh_shape(request.topology.devices, request.height // 8, request.width // 8)
    return request.mesh_shape


def mesh_text(request: Request, stage: str) -> str:
    """The mesh as tables show it; the VAE's as rows x columns of the picture."""
    shape = stage_mesh_shape(request, stage)
    if stage != "vae_decode":
        return str(shape)
    return f"picture {shape.tp} x {shape.sp}" + (f", {shape.dp} copies" if shape.dp > 1 else "")


def stage_program(request: Request, stage: str, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function that the stage runs, and its abstract arguments."""
    if request.baseline and stage == "denoise_step":
        from wan_common.plan_baseline import plain_program

        return plain_program(request.transformer, mesh, request.height, request.width, request.frames, request.text_length)
    if stage == "text_encoder":
        return _text_program(request, mesh)
    if stage == "denoise_step":
        return _denoise_program(request, mesh)
    return _vae_program(request, mesh)


def _text_program(request: Request, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    import jax
    from transformers import UMT5Config

    from wan_common.text_encoder import build_text_encoder

    encoder = build_text_encoder(UMT5Config.from_dict(request.model.text_encoder), mesh, request.dtype, fsdp=request.fsdp)
    return jax.jit(encoder.encode), encoder.abstract_inputs(request.text_length)


def _denoise_program(request: Request, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    from wan_common.attention import AttentionOptions
    from wan_common.attention_maps import SPECIAL_GROUPS
    from wan_common.denoiser import Capture, build_denoiser

    bq, bkv, compute = request.blocks or (None, None, None)
    options = AttentionOptions(
        kernel="splash", block_q=bq, block_kv=bkv, block_kv_compute=compute, window_size=request.window_size,
        k_smooth=request.k_smooth,
    )  # fmt: skip
    denoiser = build_denoiser(
        request.transformer, mesh, height=request.height, width=request.width, frames=request.frames,
        text_length=request.text_length, guidance=request.guidance, dtype=request.dtype, fsdp=request.fsdp, options=options,
        capture=Capture() if request.store_words else None,
    )  # fmt: skip
    arguments = denoiser.abstract_inputs(order=2)
    if request.store_words:
        # The words, and with them the other words, EOS and the padding (attention_maps.groups_matrix).
        shape = (2 if request.guidance else 1, request.text_length, request.store_words + len(SPECIAL_GROUPS))
        arguments += (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=arguments[3].sharding),)
    return denoiser.jitted(), arguments


def _vae_program(request: Request, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    from wan_common.vae import build_vae_decoder

    decoder = build_vae_decoder(request.model.vae, mesh, request.dtype)
    return decoder._next, decoder.abstract_inputs(request.height, request.width)


def count_flops(jaxpr: Any, devices: int) -> float:
    """Floating-point operations of the matmuls, convolutions and attention kernels of a jaxpr, on all devices together."""
    flops = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = params["dimension_numbers"].rhs_spec[0]
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_features]
        elif name == "pallas_call":
            flops += _kernel_flops(equation)
        else:
            inner = 0.0
            for value in params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    part = getattr(part, "jaxpr", part)
                    if hasattr(part, "eqns"):
                        inner += count_flops(part, devices)
            times = params.get("length", 1) if name == "scan" else devices if name == "shard_map" else 1
            flops += inner * times
    return flops


def _kernel_flops(equation: Any) -> float:
    if "splash" not in str(equation.params.get("name", equation.params.get("name_and_src_info", ""))):
        return 0.0
    query, key = (v.aval.shape for v in equation.invars[:2])
    return 4.0 * math.prod(query) * key[1]  # [N, S, heads x D] against T keys: scores and weighted values


def kernel_timer(request: Request) -> Callable[[Kernel], float]:
    """Seconds of each Pallas kernel that the programs call, from the compiler's bundle dump (cached)."""
    chip = request.topology.chip
    head_dim = request.transformer.get("attention_head_dim", 128)
    known: dict[Kernel, float] = {}

    def seconds(kernel: Kernel) -> float:
        if kernel not in known:
            known[kernel] = measure(kernel)
        return known[kernel]

    def measure(kernel: Kernel) -> float:
        if kernel.name in ("norm", "norm_rope"):
            return norm_rope_seconds(chip, kernel.operands[0][1], kernel.result[1], kernel.name.startswith("norm_rope"), kernel.result[0])
        if "splash_attention" not in kernel.name:
            # The compiler's own (a softmax fused into its matmuls): it gives no cycles, so the least its traffic needs.
            spec = request.topology.spec
            return size_of([*kernel.operands, kernel.result]) / (spec.hbm_bytes / (1 if spec.shared else spec.cores))
        (dtype, query), (_, key) = kernel.operands[:2]
        heads = query[0] * (query[2] // head_dim)
        keys = key[1] if key[1] <= SHORT_KEYS else min(key[1], request.tokens)
        blocks = None
        if request.blocks and keys > SHORT_KEYS:
            blocks = (*request.blocks, request.blocks[2])
        shape = KernelShape(heads, query[1], keys, head_dim, "float32" if dtype == "f32" else "bfloat16")
        return splash_cycles(chip, shape, blocks).seconds

    return seconds


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What is reported of one stage; bytes are of one device, flops of all, seconds predicted for one call."""

    mesh: str
    hbm_args_bytes: int
    hbm_temp_bytes: int
    hbm_peak_bytes: int
    hbm_capacity_bytes: int
    fits: bool
    flops: float
    predicted_seconds: float | None
    lower_seconds: float
    compile_seconds: float
    collectives: dict[str, dict[str, int]]
    fusion_cycles: int
    kernel_seconds: dict[str, float]
    collective_seconds: float
    exposed_collective_seconds: float
    error: str = ""


def plan_stage(request: Request, stage: str, use_cache: bool = True) -> StagePlan:
    """Compile ``stage`` (or take it from the cache) and read it."""
    compiled = compiled_stage(request, stage, use_cache)
    capacity = request.topology.hbm_bytes
    mesh = mesh_text(request, stage)
    if compiled.error:
        needed = needed_bytes(compiled.error)
        return StagePlan(
            mesh, 0, 0, needed, capacity, False, compiled.flops, None, compiled.lower_seconds, compiled.compile_seconds, {}, 0, {},
            0.0, 0.0, compiled.error.splitlines()[0][:300],
        )  # fmt: skip
    memory = compiled.memory
    # Outputs that alias donated arguments are counted once.
    peak = memory["argument"] + memory["temp"] + memory["output"] - memory["alias"] + memory["generated_code"]
    totals = read_totals(request, stage, compiled)
    return StagePlan(
        mesh=mesh, hbm_args_bytes=memory["argument"], hbm_temp_bytes=memory["temp"], hbm_peak_bytes=peak, hbm_capacity_bytes=capacity,
        fits=peak <= capacity, flops=compiled.flops, predicted_seconds=totals.seconds, lower_seconds=round(compiled.lower_seconds, 1),
        compile_seconds=round(compiled.compile_seconds, 1),
        collectives={kind: {"count": count, "bytes": size} for kind, (count, size) in sorted(totals.collectives.items())},
        fusion_cycles=totals.fusion_cycles, kernel_seconds=totals.kernel_seconds, collective_seconds=totals.collective_seconds,
        exposed_collective_seconds=totals.exposed_seconds,
    )  # fmt: skip


def read_totals(request: Request, stage: str, compiled: Compiled) -> Totals:
    """Cycles, kernels and collectives of a compiled stage."""
    network = Network(request.topology, list(stage_mesh(request, stage).devices.flat))
    return total(
        schedule(compiled.text), request.topology.spec.clock_hz, kernel_timer(request),
        lambda collective: network.seconds(collective.kind, collective.bytes, collective.groups),
    )  # fmt: skip


def needed_bytes(message: str) -> int:
    """The bytes that a refused program wanted, from the compiler's message (0 if it does not say)."""
    import re

    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    forms = (r"[Uu]sed ([\d.]+)([KMG]) of", r"requires ([\d.]+)([KMG])", r"required for HLO temporaries \(([\d.]+)([KMG])\)")
    found = next((found for form in forms if (found := re.search(form, message))), None)
    return int(float(found.group(1)) * units[found.group(2)]) if found else 0


def fill_cache(request: Request, stages: tuple[str, ...], use_cache: bool, jobs: int) -> None:
    """Compile what is not cached, ``jobs`` stages at a time, each in a process of its own (a compilation uses one core)."""
    missing = [stage for stage in stages if not use_cache or not program_file(request, stage).exists()]
    missing.sort(key=("vae_decode", "denoise_step", "text_encoder").index)  # the longest first
    if jobs < 2 or len(missing) < 2:
        for stage in missing:
            compiled_stage(request, stage, use_cache)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=setup_logging) as pool:
        for done in [pool.submit(compiled_stage, request, stage, use_cache) for stage in missing]:
            done.result()


def plan(request: Request, stages: tuple[str, ...] = STAGES, use_cache: bool = True, jobs: int = 1) -> dict[str, Any]:
    """Plan ``stages`` of one clip; the result has the keys of the JSON that plan_tpu.py writes."""
    fill_cache(request, stages, use_cache, jobs)
    plans = {stage: plan_stage(request, stage) for stage in stages}
    which = request.topology
    result: dict[str, Any] = {
        "topology": which.name, "chips": which.chips, "model": request.model.name, "height": request.height, "width": request.width,
        "frames": request.frames, "stages": {stage: dataclasses.asdict(found) for stage, found in plans.items()},
        "clip": {"predicted_seconds": clip_seconds(request, plans), "steps": request.steps}, "assumptions": assumptions(request),
    }  # fmt: skip
    return result


def clip_seconds(request: Request, plans: dict[str, StagePlan]) -> float | None:
    """Predicted seconds of one clip without compiling and loading; None when a stage is missing or does not compile."""
    calls = {"text_encoder": 1, "denoise_step": request.steps, "vae_decode": request.latent_frames}
    seconds = {stage: found.predicted_seconds for stage, found in plans.items()}
    if set(seconds) != set(calls) or None in seconds.values():
        return None
    return sum(calls[stage] * (value or 0.0) for stage, value in seconds.items())


def assumptions(request: Request) -> list[str]:
    """What the predictions rest on, in words."""
    chip, links = request.topology.spec, LINKS[request.topology.chip]
    unpublished = " (not published: chosen so that peak is v6e's operations a cycle)"
    return [
        "predicted, not measured: no TPU was used; nothing is fitted to measurements",
        f"clock {chip.clock_hz / 1e9:g} GHz{unpublished if request.topology.chip == 'tpu7x' else ''}",
        "fusions: XLA:TPU's estimated_cycles in the scheduled program, times the trips of their loops",
        "kernels: static VLIW bundles from the compiler's dump times the grid, or the HBM traffic at full bandwidth if that is longer",
        "a kernel of the compiler's own (fused softmax): its HBM traffic at full bandwidth",
        f"links: {links.bytes_per_second / 1e9:g} GB/s each way a link (vendor's total a chip / {links.count} links / 2), no wrap-around,"
        " no latency; a collective takes what the narrowest device or straight cut of its group needs",
        "overlap: an asynchronous collective is hidden by what the compiler scheduled between its start and its done; a synchronous"
        " one by nothing",
        f"HBM {request.topology.hbm_bytes / 2**30:g} GiB a device; peak = arguments + temporaries + outputs that alias nothing + code",
        "VAE: the first latent frame counts like the others (it decodes one frame instead of four)",
        "a clip: one text encoder call, the steps, the VAE's calls; not compiling, loading, or writing the video",
    ]  # fmt: skip


def one_that_fits(request: Request, stage: str, failed: StagePlan, use_cache: bool = True) -> tuple[Request, StagePlan] | None:
    """The first request on which ``stage`` fits, by compiling it: this slice with the default mesh and FSDP, else larger ones."""
    ours = dataclasses.replace(request, mesh=None, fsdp=True)
    for candidate in (request.topology, *larger(request.topology)):
        retry = dataclasses.replace(ours, topology=candidate)
        if candidate == request.topology:
            if stage == "vae_decode" or (request.fsdp and request.mesh_shape == retry.mesh_shape):
                continue  # that is what failed
        elif request.fsdp and failed.hbm_peak_bytes * request.topology.devices / candidate.devices > candidate.hbm_bytes:
            continue  # not even when everything is split
        found = plan_stage(retry, stage, use_cache)
        if found.fits:
            return retry, found
    return None
