"""Plan every listed configuration and mesh, and write the tables of docs/PLANNING.md.

    python -m benchmarks.plan_matrix                    # everything that is not in the cache is compiled: hours on two cores
    python -m benchmarks.plan_matrix --only v6e-8       # slices whose name starts so; the other rows come from the cache
    python -m benchmarks.plan_matrix --cached           # compile nothing: only what the cache has

Configurations run one after the other, each program in this process; one that is interrupted loses one compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from wan_common.atomic import write_text
from wan_common.errors import run_command
from wan_common.mesh import MeshShape
from wan_common.plan import STAGES, Request, StageCompileError, StagePlan, clip_seconds, plan_stage, program_file
from wan_common.published import WAN_1_3B, WAN_14B, ModelConfigs
from wan_common.tpu_topology import GIB, set_environment, topology

logger = logging.getLogger("matrix")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "PLANNING.md"
BEGIN, END = "<!-- tables: benchmarks/plan_matrix.py -->", "<!-- end of tables -->"
HD, SD = (720, 1280), (480, 832)
# Model, picture, slice: what issue 6 lists.
CONFIGURATIONS: tuple[tuple[ModelConfigs, tuple[int, int], str], ...] = (
    (WAN_14B, HD, "v6e-8"), (WAN_14B, SD, "v6e-8"), (WAN_14B, HD, "v6e-16"), (WAN_14B, SD, "v6e-16"), (WAN_14B, HD, "v5p-8"),
    (WAN_14B, HD, "v5e-16"), (WAN_1_3B, SD, "v6e-8"), (WAN_1_3B, SD, "v6e-4"), (WAN_14B, HD, "tpu7x-8"),
)  # fmt: skip


def candidates(devices: int) -> list[MeshShape]:
    """Meshes worth comparing: the batch split or not, the rest over sequence and heads."""
    found = []
    for dp in (2, 1):
        rest = devices // dp
        found += [MeshShape(dp, rest // tp, tp) for tp in (1, 2, 4) if rest % tp == 0 and (dp == 2 or tp == 1)]
    return found


def requests() -> list[Request]:
    """The default plan of every configuration."""
    return [Request(topology(name), model, height, width) for model, (height, width), name in CONFIGURATIONS]


def planned(request: Request, stage: str, compile_it: bool) -> StagePlan | None:
    """The stage's plan, or None where it is not cached and nothing may be compiled."""
    return plan_stage(request, stage) if compile_it or program_file(request, stage).exists() else None


def title(request: Request) -> str:
    """Model and picture."""
    return f"{'14B' if request.model is WAN_14B else '1.3B'} {request.height}p, {request.topology.name}"


def seconds(value: float | None) -> str:
    """A time for a table."""
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def stage_rows(request: Request, plans: dict[str, StagePlan]) -> list[str]:
    """A line of the table for each stage of one configuration."""
    rows = []
    for stage, plan in plans.items():
        sizes = [f"{size / GIB:.2f}" for size in (plan.hbm_args_bytes, plan.hbm_temp_bytes, plan.hbm_peak_bytes)]
        moved = sum(found["bytes"] for found in plan.collectives.values()) / GIB
        cells = (
            title(request), stage, plan.mesh, *sizes, f"{plan.hbm_capacity_bytes / GIB:g}", "yes" if plan.fits else "**no**",
            seconds(plan.predicted_seconds), f"{moved:.1f}", seconds(plan.exposed_collective_seconds), f"{plan.compile_seconds:.0f}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def tables(only: str | None, cached: bool) -> str:
    """The Markdown of all tables."""
    lines = [
        "| configuration | stage | mesh | args GiB | temp GiB | peak GiB | HBM GiB | fits | predicted s | moved GiB | not hidden s"
        " | compile s |",
        "| --- " * 12 + "|",
    ]
    clips = ["| configuration | predicted s a step | predicted s a clip (50 steps) |", "| --- | --- | --- |"]
    meshes = ["| configuration | mesh | peak GiB | predicted s a step | of it not hidden s | |", "| --- | --- | --- | --- | --- | --- |"]
    for request in tqdm(requests(), desc="configurations"):
        compile_it = not cached and (only is None or request.topology.name.startswith(only))
        plans = {stage: plan for stage in STAGES if (plan := planned(request, stage, compile_it))}
        lines += stage_rows(request, plans)
        if "denoise_step" in plans:
            step = seconds(plans["denoise_step"].predicted_seconds)
            clips.append(f"| {title(request)} | {step} | {seconds(clip_seconds(request, plans))} |")
        meshes += mesh_rows(request, compile_it)
    return "\n".join(["### Stages", "", *lines, "", "### Clips", "", *clips, "", "### Meshes of the denoise step", "", *meshes])


def mesh_rows(request: Request, compile_it: bool) -> list[str]:
    """The candidates of one configuration, fastest first; the default and the best are marked."""
    found, failed = [], []
    for shape in candidates(request.topology.devices):
        try:
            plan = planned(dataclasses.replace(request, mesh=shape), "denoise_step", compile_it)
        except StageCompileError as error:
            logger.warning("%s", error)
            failed.append(f"| {title(request)} | {shape} | the compiler fails | - | - | |")
            continue
        if plan:
            found.append((plan.predicted_seconds if plan.fits and plan.predicted_seconds else float("inf"), shape, plan))
    found.sort(key=lambda row: row[0])
    rows = []
    for n, (_, shape, plan) in enumerate(found):
        marks = [*(["best"] if n == 0 and plan.fits and len(found) > 1 else []), *(["default"] if shape == request.mesh_shape else [])]
        cells = (title(request), str(shape), f"{plan.hbm_peak_bytes / GIB:.2f}" + ("" if plan.fits else " (does not fit)"),
                 seconds(plan.predicted_seconds), seconds(plan.exposed_collective_seconds), ", ".join(marks))  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return rows + failed


def main(argv: list[str] | None = None) -> None:
    """Plan, and replace the tables in docs/PLANNING.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="compile only for slices whose name starts so")
    parser.add_argument("--cached", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    set_environment()
    text = tables(args.only, args.cached)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(DOCS, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
