"""Does a clip fit a TPU slice, and how long does it take? Answered on any machine, by compiling for the slice.

Compiles the very functions that the stages run and reads memory, cycles and collectives from the result. Every time it
prints is predicted, with what it rests on; no TPU is used.

    python plan_tpu.py --topology v6e-8 --height 720 --width 1280 --frames 81 --json plan.json
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan_common.atomic import write_json
from wan_common.config import DEFAULT_MODEL, VideoOptions, check_video
from wan_common.errors import UsageError, WanError, run_command
from wan_common.tpu_topology import GIB, known_names, set_environment, topology

if TYPE_CHECKING:
    from wan_common.plan import Request

logger = logging.getLogger("plan")


class DoesNotFit(WanError):
    """A stage does not fit, and --require_fit asked for exit code 1."""

    exit_code = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The flags; those that the stages have too mean the same."""
    parser = _Parser(prog="plan_tpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, video = parser.add_argument, VideoOptions()
    add(
        "--topology",
        default="v6e-8",
        help=f"the slice; the number counts chips for v5e and v6e, TensorCores for the others: {', '.join(known_names())}",
    )
    add(
        "--model_id",
        default=DEFAULT_MODEL,
        help="hub id (the published two need no download) or local diffusers folder; 14B and 1.3B are short for them",
    )
    for name in ("height", "width", "frames", "num_inference_steps"):
        add(f"--{name}", type=int, default=getattr(video, name))
    add("--guidance_scale", type=float, default=video.guidance_scale)
    add("--max_sequence_length", type=int, default=512)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, text in (("dp", "batch"), ("sp_num", "sequence"), ("tp", "heads and features")):
        add(f"--{name}", type=int, help=f"devices along the {text} (default: docs/PLANNING.md's best)")
    for name in ("use_dp", "use_fsdp"):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    for name in ("bqsize", "bkvsize", "bkvcomputesize", "window_size"):
        add(f"--{name}", type=int)
    add("--use_k_smooth", action=argparse.BooleanOptionalAction, default=False)
    add("--store_attention", type=int, default=0, metavar="N_WORDS", help="the step also stores the attention maps of N words")
    add("--stages", nargs="+", choices=("text_encoder", "denoise_step", "vae_decode"), help="only these")
    add("--json", metavar="FILE", help="write the plan as JSON")
    add("--require_fit", action="store_true", help="exit with 1 when a stage does not fit")
    add("--baseline", action="store_true", help="predict the plain program that seed 001 measured, beside its measurement")
    add("--search_blocks", action="store_true", help="rank the attention kernel's block sizes by static cycles")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="stages compiled at a time (default: cores, at most 2)")
    add("--no_cache", action="store_true", help="compile even what is cached")
    return parser


def make_request(args: argparse.Namespace) -> Request:
    """The checked request.

    Raises:
        UsageError: a flag's value is impossible, or flags contradict each other.
    """
    from wan_common.mesh import choose_mesh_shape
    from wan_common.plan import Request
    from wan_common.plan_model import model_configs

    check_video(VideoOptions(height=args.height, width=args.width, frames=args.frames, num_inference_steps=args.num_inference_steps))
    blocks = (args.bqsize, args.bkvsize, args.bkvcomputesize)
    if any(blocks) and not all(blocks):
        raise UsageError("--bqsize, --bkvsize and --bkvcomputesize go together: give all three or none")
    if args.store_attention < 0:
        raise UsageError(f"--store_attention {args.store_attention}: wanted a number of words from 0 up")
    slice_, guidance = topology(args.topology), args.guidance_scale > 1
    mesh = choose_mesh_shape(slice_.devices, 2 if guidance else 1, use_dp=args.use_dp, dp=args.dp, sp=args.sp_num, tp=args.tp)
    return Request(
        slice_, model_configs(args.model_id), args.height, args.width, args.frames, args.num_inference_steps, guidance,
        args.max_sequence_length, args.dtype, mesh, args.use_fsdp, blocks if all(blocks) else None, args.window_size,
        args.use_k_smooth, args.store_attention,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse, compile, print, write."""
    args = build_parser().parse_args(argv)
    set_environment()
    request = make_request(args)
    if args.search_blocks:
        print(search(request))
        return
    if args.baseline:
        from wan_common.plan_calibration import baseline

        result = baseline(use_cache=not args.no_cache)
        print("\n".join(result.pop("lines")))
    else:
        result = plan_and_print(request, tuple(args.stages) if args.stages else None, not args.no_cache, args.jobs)
    if args.json:
        write_json(Path(args.json), result)
    unfit = [name for name, stage in result["stages"].items() if not stage["fits"]]
    if unfit and args.require_fit:
        raise DoesNotFit(f"{', '.join(unfit)}: does not fit {result['topology']} (see above); leave --require_fit out for exit code 0")


def plan_and_print(request: Request, stages: tuple[str, ...] | None, use_cache: bool, jobs: int) -> dict[str, Any]:
    """Plan, print the tables, name a slice that fits where this one does not."""
    from wan_common.plan import STAGES, StagePlan, one_that_fits, plan

    result = plan(request, stages or STAGES, use_cache, jobs)
    print(table(result))
    for name, stage in result["stages"].items():
        if stage["fits"]:
            continue
        needs = f"{gib(stage['hbm_peak_bytes'])} of {gib(stage['hbm_capacity_bytes'])} GiB a device"
        print(f"\n{name} does not fit: it needs {needs}. {stage['error']}")
        found = one_that_fits(request, name, StagePlan(**stage), use_cache)
        if found is None:
            print("No larger slice of this chip that is planned for fits it either.")
            continue
        retry, other = found
        where = retry.topology.name + (" with --use_fsdp" if not request.fsdp else "")
        print(f"It fits {where} as {other.mesh}: {gib(other.hbm_peak_bytes)} of {gib(other.hbm_capacity_bytes)} GiB (compiled too).")
        stage["fits_on"] = {
            "topology": retry.topology.name, "mesh": other.mesh, "fsdp": retry.fsdp, "hbm_peak_bytes": other.hbm_peak_bytes,
        }  # fmt: skip
    return result


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"


def table(result: dict[str, Any]) -> str:
    """The plan as text."""
    size = f"{result['width']}x{result['height']}, {result['frames']} frames"
    lines = [f"{result['model']}, {size} on {result['topology']} ({result['chips']} chips)", ""]
    head = ("stage", "mesh", "args GiB", "temp GiB", "peak GiB", "HBM GiB", "fits", "PFLOP", "predicted s", "lower s", "compile s")
    rows = [head]
    for name, stage in result["stages"].items():
        sizes = [gib(stage[f"hbm_{part}_bytes"]) for part in ("args", "temp", "peak", "capacity")]
        seconds = "-" if stage["predicted_seconds"] is None else f"{stage['predicted_seconds']:.3f}"
        spent = (f"{stage['lower_seconds']:.1f}", f"{stage['compile_seconds']:.0f}")
        rows.append((name, stage["mesh"], *sizes, "yes" if stage["fits"] else "NO", f"{stage['flops'] / 1e15:.3f}", seconds, *spent))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, stage in result["stages"].items():
        moved = ", ".join(f"{kind} {found['count']}x {gib(found['bytes'])} GiB" for kind, found in stage["collectives"].items())
        kernels = ", ".join(f"{kernel} {seconds:.3f} s" for kernel, seconds in stage["kernel_seconds"].items())
        exposed = stage["exposed_collective_seconds"]
        lines += [
            "",
            f"{name}: fusions {stage['fusion_cycles'] / 1e6:,.0f}M cycles; kernels {kernels or 'none'}",
            f"  collectives of a call: {moved or 'none'}",
            f"  their time on the links {stage['collective_seconds']:.3f} s, not hidden {exposed:.3f} s",
        ]
    clip = result["clip"]
    if clip["predicted_seconds"] is not None:
        lines += ["", f"predicted: {clip['predicted_seconds']:.1f} s a clip of {clip['steps']} steps"]
    return "\n".join([*lines, "", "assumed:", *(f"- {line}" for line in result["assumptions"])])


def search(request: Request) -> str:
    """Block sizes of self-attention on one device of the request's mesh, ranked."""
    from wan_common.attention import self_attention_layout
    from wan_common.block_search import search_blocks
    from wan_common.block_search import table as block_table
    from wan_common.kernel_cycles import KernelShape
    from wan_common.plan import stage_mesh

    mesh = stage_mesh(request, "denoise_step")
    heads = request.transformer["num_attention_heads"]
    batch = 2 if request.guidance else 1
    layout = self_attention_layout(mesh, batch, heads)
    share = {name: dataclasses.asdict(request.mesh_shape)[name] for name in ("dp", "sp", "tp")}
    for axis in layout.heads:
        heads //= share[axis]
    rows = batch // (share["dp"] if layout.batch else 1)
    queries = request.tokens
    for axis in layout.queries:
        queries = -(-queries // share[axis])
    shape = KernelShape(rows * heads, queries, request.tokens, request.transformer["attention_head_dim"], request.dtype)
    return block_table(search_blocks(request.topology.libtpu, shape))


if __name__ == "__main__":
    sys.exit(run_command(main))
