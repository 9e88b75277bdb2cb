"""Static cycles of the splash attention kernel for a TPU that need not be present.

libtpu compiles for a described topology on any machine and dumps the final VLIW bundles. A core issues one bundle a
cycle unless it stalls, so the bundles of a grid step are its cycles, as far as the compiler knows (HBM traffic is given
beside them, not in them). The dump is asked for by an environment variable that libtpu reads once, so each compilation
runs in a process of its own. Results are kept in a folder, named by everything they depend on.

    python -m wan_common.kernel_cycles --topology v6e:2x4 --heads 10 --q_len 75600 --kv_len 75600
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from wan_common.atomic import atomic_path
from wan_common.errors import UsageError, WanError

logger = logging.getLogger("kernel_cycles")

CACHE_VARIABLE = "WAN_TPU_KERNEL_CACHE"
ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1  # of the cached result; part of its name
BRANCH_BUNDLES = 5  # a branch and its four delay slots
# What the compiler says of a kernel it will not compile; any other failure is not a property of the kernel.
REFUSALS = ("RESOURCE_EXHAUSTED", "Ran out of memory", "exceeded scoped vmem", "Mosaic failed", "MosaicError")
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VFILL", "VSTORE", "VSPILL", "SALU")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do; bf16_flops and hbm_bytes are per second and per chip.

    cores: tensor cores of a chip; shared: whether they appear as one device (the grid's heads are split over them).
    mxu_depth: terms one pass of the systolic array contracts.
    """

    topology: str
    bf16_flops: float
    hbm_bytes: float
    clock_hz: float
    cores: int
    shared: bool
    mxu_depth: int

    @property
    def flops_per_cycle(self) -> float:
        """bf16 operations of one core in a cycle, at peak."""
        return self.bf16_flops / self.cores / self.clock_hz


# Vendor figures. v7x's clock isn't published: 2.2 GHz makes its peak 524,288 operations a cycle and core, as v6e's.
CHIPS = {
    "v4": Chip("v4:2x2x1", 275e12, 1.23e12, 1.05e9, 2, True, 128),
    "v5e": Chip("v5e:2x4", 197e12, 0.82e12, 1.5e9, 1, False, 128),
    "v5p": Chip("v5p:2x2x1", 459e12, 2.77e12, 1.75e9, 2, True, 128),
    "v6e": Chip("v6e:2x4", 918e12, 1.64e12, 1.75e9, 1, False, 256),
    "tpu7x": Chip("tpu7x:2x2x1", 2307e12, 7.4e12, 2.2e9, 2, False, 256),
}


class KernelCompileError(WanError):
    """The TPU compiler refused the kernel (vector memory, an unsupported operation); the message is its first line."""


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """One device's attention: query [heads, q_len, head_dim], keys [kv_heads, kv_len, head_dim].

    heads counts the rows of the batch as well; kv_heads None is heads. dtype is bfloat16 or float32.
    """

    heads: int
    q_len: int
    kv_len: int
    head_dim: int = 128
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class KernelCycles:
    """Static bundles (cycles of one core) of each part of the kernel, and what follows from them.

    step: a steady-state block of keys; tail: the ragged last block (0 if none); first and finish: once a block of
    queries; overhead: the pipeline around every grid step; redo: of one repeated step, which the totals leave out.
    roofline: least cycles that the matmuls of a step need / step; roofline_with_overhead: / (step + overhead).
    units: share of the step's bundles in which each unit is busy.
    grid_cycles: the whole grid on its busiest core; seconds: grid_cycles over the clock, or the HBM traffic if longer.
    """

    chip: str
    shape: KernelShape
    blocks: tuple[int, int, int, int]
    step: int
    tail: int
    first: int
    finish: int
    overhead: int
    redo: int
    floor: int
    units: dict[str, float]
    grid_steps: int
    grid_cycles: int
    hbm_bytes: int
    compile_seconds: float

    @property
    def roofline(self) -> float:
        """Share of the structural roofline in the steady-state block."""
        return self.floor / self.step

    @property
    def roofline_with_overhead(self) -> float:
        """The same with the pipeline's bundles around the block."""
        return self.floor / (self.step + self.overhead)

    @property
    def hbm_seconds(self) -> float:
        """Seconds the kernel's reads and writes take at the chip's full bandwidth (a device's share of it)."""
        chip = CHIPS[self.chip]
        return self.hbm_bytes / (chip.hbm_bytes / (1 if chip.shared else chip.cores))

    @property
    def seconds(self) -> float:
        """Predicted seconds on one device: copies run beside the computation."""
        return max(self.grid_cycles / CHIPS[self.chip].clock_hz, self.hbm_seconds)


def cache_dir() -> Path:
    """Where results are kept: $WAN_TPU_KERNEL_CACHE, else ~/.cache/wan_tpu/kernel_cycles."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/wan_tpu/kernel_cycles").expanduser()


def chip_of(topology: str) -> str:
    """Chip of a topology such as ``v6e:2x4`` or ``v6e-8``, or the chip itself; raises UsageError."""
    chip = re.split("[:-]", topology)[0]
    if chip not in CHIPS:
        raise UsageError(f"chip {chip!r} of {topology!r} is unknown; choose one of {', '.join(CHIPS)}")
    return chip


def floor_cycles(chip: str, block_q: int, keys: int, head_dim: int) -> float:
    """Cycles of one core that K.Q^T and P.V need at peak; K.Q^T pays for the whole depth of the array it sits on."""
    depth = CHIPS[chip].mxu_depth
    scores = -(-head_dim // depth) * depth / head_dim
    return 2 * block_q * keys * head_dim * (scores + 1) / CHIPS[chip].flops_per_cycle


def splash_cycles(
    topology: str,
    shape: KernelShape,
    blocks: tuple[int, int, int, int] | None = None,
    *,
    timeout: float = 600,
    use_cache: bool = True,
) -> KernelCycles:
    """Cycles of ``splash_attention`` for one device of ``topology``, from the cache or by compiling (3 s to a minute).

    Args:
        blocks: (block_q, block_kv, block_kv_compute, block_kv_compute_inner); None is the chip's default.

    Raises:
        KernelCompileError: the compiler refused; refusals are cached too.
        UsageError: unknown chip.
    """
    from custom_splash_attention import BlockSizes, default_block_sizes, fit_block_sizes

    chip = chip_of(topology)
    if blocks is None:
        sizes = default_block_sizes(chip, shape.q_len, shape.head_dim, shape.kv_len, shape.dtype)
    else:
        sizes = fit_block_sizes(BlockSizes(*blocks), shape.q_len, shape.kv_len)
    blocks = dataclasses.astuple(sizes)
    request = {"topology": CHIPS[chip].topology, "blocks": blocks, **dataclasses.asdict(shape)}
    # The parts of the kernel don't depend on the number of heads: one compilation serves every sharding of them. The grid needs
    # a second step on each core, or it is no loop.
    request["heads"] = 1 if shape.q_len > blocks[0] or shape.kv_len > blocks[1] else 4
    file = cache_dir() / f"{_digest(request)}.json"
    parts = None
    if use_cache and file.exists():
        try:
            parts = json.loads(file.read_text())
        except (OSError, ValueError):
            logger.warning("%s: unreadable, compiling again", file)
    if parts is None:
        parts = _compile_apart(request, timeout)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(parts))
    if "error" in parts:
        raise KernelCompileError(parts["error"])
    return _assemble(chip, shape, blocks, parts)


def _digest(request: dict) -> str:
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    key = [SCHEMA, request, versions, os.environ.get("LIBTPU_INIT_ARGS", ""), kernel_code(NOT_KERNEL)]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


# Names in the kernel's module that choose or check what a request already says: its bundles do not depend on them.
NOT_KERNEL = {
    "_TABLE",
    "_SHORT_TABLE",
    "_FLOAT32",
    "_check",
    "_checked_chip",
    "chip_name",
    "default_block_sizes",
    "splash_attention",
    "splash_attention_merged",
}


def kernel_code(without: Collection[str]) -> str:
    """The kernel's source without comments, docstrings, annotations and the top-level names in ``without``, for cache keys."""
    tree = ast.parse((ROOT / "custom_splash_attention.py").read_text())
    tree.body = [node for node in tree.body if not _names(node) & set(without)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(tree)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    return {ast.unparse(target) for target in node.targets} if isinstance(node, ast.Assign) else set()


def _assemble(chip: str, shape: KernelShape, blocks: tuple[int, int, int, int], parts: dict) -> KernelCycles:
    block_q, block_kv = blocks[:2]
    q_steps, kv_steps = -(-shape.q_len // block_q), -(-shape.kv_len // block_kv)
    tails = 1 if parts["tail"] else 0
    row = parts["first"] + parts["finish"] + kv_steps * parts["overhead"]
    row += (kv_steps - tails) * parts["step"] + tails * parts["tail"]
    cores = CHIPS[chip].cores if CHIPS[chip].shared else 1
    itemsize = 4 if shape.dtype == "float32" else 2
    # K and V once for each block of queries, Q and the output once.
    tokens = 2 * q_steps * shape.kv_len + 2 * shape.q_len
    return KernelCycles(
        chip=chip, shape=shape, blocks=blocks, units=parts["units"], compile_seconds=parts["compile_seconds"],
        step=parts["step"], tail=parts["tail"], first=parts["first"], finish=parts["finish"],
        overhead=parts["overhead"], redo=parts["redo"],
        floor=round(floor_cycles(chip, block_q, min(block_kv, shape.kv_len), shape.head_dim)),
        grid_steps=shape.heads * q_steps * kv_steps,
        grid_cycles=-(-shape.heads // cores) * q_steps * row,
        hbm_bytes=shape.heads * tokens * shape.head_dim * itemsize,
    )  # fmt: skip


def _compile_apart(request: dict, timeout: float) -> dict:
    """Compile in a process whose libtpu dumps bundles; returns the parts, or {"error": ...} if it was refused."""
    with tempfile.TemporaryDirectory(prefix="wan_bundles_") as dump:
        # Without the filter every pass is written: up to 1 GB, and half of the time.
        args = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        args += "--xla_jf_dump_llo_pass_label_regex=.*final_.*"
        env = dict(
            os.environ, LIBTPU_INIT_ARGS=args.strip(), JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v6e-8",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # compiling needs no chip, so it need not wait for who holds one
        )  # fmt: skip
        env.pop("XLA_FLAGS", None)
        command = [sys.executable, "-m", "wan_common.kernel_cycles", "--worker", json.dumps(request)]
        start = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise KernelCompileError(f"blocks {request['blocks']}: not compiled after {timeout:.0f} s") from error
        seconds = time.monotonic() - start
        if done.returncode:
            if not any(sign in done.stderr for sign in REFUSALS):
                raise RuntimeError(f"compiling the kernel for {request} failed:\n{done.stderr[-3000:]}")
            return {"error": _reason(done.stderr)}
        return {"compile_seconds": round(seconds, 1), **_read_dump(Path(dump), _conditional_parts(request))}


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next(line for sign in REFUSALS for line in reversed(lines) if sign in line)[:400]


def _conditional_parts(request: dict) -> list[str]:
    """The parts of the kernel that a branch guards, in the order of its source."""
    from custom_splash_attention import SHORT_KEYS

    keys, block_kv = request["kv_len"], request["blocks"][1]
    if keys <= block_kv:  # every step is the first and the last: the compiler drops those branches
        return [] if keys <= SHORT_KEYS else ["redo"]
    return ["first", "redo", "finish"] if keys % block_kv == 0 else ["first", "step", "tail", "redo", "finish"]


def _read_dump(folder: Path, names: list[str]) -> dict:
    bundles = [p for p in glob.glob(f"{folder}/*splash_attention*final_bundles.txt") if "schedule-analysis" not in p]
    usage = glob.glob(f"{folder}/*splash_attention*final_hlo-static-per-bundle-utilization.txt")
    if len(bundles) != 1 or len(usage) != 1:
        raise RuntimeError(f"{folder}: {len(bundles)} bundle and {len(usage)} utilization dumps, wanted one of each")
    return read_bundles(Path(bundles[0]).read_text(), Path(usage[0]).read_text(), names)


def read_bundles(bundles: str, usage: str, names: list[str]) -> dict:
    """Parts of the kernel in a dump of its final bundles.

    The grid is the longest loop. Inside it the largest bodies that a branch can skip are `names`, in their order; the
    branches around copies are some 30 bundles each and count as overhead, always taken. A step that no branch guards
    is what lies between the first part and the redo, or, without a first part, the whole loop but the redo.
    """
    starts: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in bundles.splitlines():
        at = re.match(r"\s*(0x[0-9a-f]+|0)\s", line)
        if not at:
            continue
        address = int(at.group(1), 16)
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            starts.setdefault(region, address)
        for region in re.findall(r"sbr\.rel [^;}]*target = \$region(\d+)", line):
            branches.append((address, region))
    branches = [(a, r) for a, r in branches if r in starts]  # v5p leaves through a region that has no marker
    loops = [(starts[r], a + BRANCH_BUNDLES) for a, r in branches if starts[r] <= a]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    bodies = [(a + BRANCH_BUNDLES, starts[r]) for a, r in branches if begin <= a and a < starts[r] <= end]
    # The pipeline wraps everything in one branch of its own, always taken.
    bodies = [body for body in bodies if body[1] - body[0] < 0.9 * (end - begin) and body[1] - body[0] > 64]
    outer = [x for x in bodies if not any(y != x and y[0] <= x[0] and x[1] <= y[1] for y in bodies)]
    outer = sorted(sorted(outer, key=lambda b: b[0] - b[1])[: len(names)])
    if len(outer) != len(names):
        raise RuntimeError(f"{len(outer)} conditional parts of the kernel found at {outer}, wanted {names}")
    parts = {name: (low, high) for name, (low, high) in zip(names, outer, strict=True)}
    sizes = {"first": 0, "tail": 0, "redo": 0, "finish": 0, **{name: high - low for name, (low, high) in parts.items()}}
    if "step" not in parts:
        after_first = parts["first"][1] if "first" in parts else begin
        parts["step"] = (after_first, parts["redo"][0] - BRANCH_BUNDLES if "redo" in parts else end)
        sizes["step"] = parts["step"][1] - after_first if "first" in parts else end - begin - sizes["redo"]
    overhead = end - begin - sum(sizes.values())
    rows = [[int(x) for x in row.split()] for row in usage.splitlines() if re.fullmatch(r"\s*\d+(\s+\d+){9}\s*", row)]
    slots, rows = rows[0], rows[1:]  # the first row is how many of each unit there are
    low, high = parts["step"]
    busy = {unit: round(sum(row[n] for row in rows[low:high]) / slots[n] / (high - low), 3) for n, unit in enumerate(UNITS)}
    return {**sizes, "overhead": overhead, "units": busy}


def _worker(request: dict) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from custom_splash_attention import BlockSizes, splash_attention

    topology = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def struct(length: int) -> jax.ShapeDtypeStruct:
        shape = (1, request["heads"], length, request["head_dim"])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(request["dtype"]), sharding=NamedSharding(mesh, PartitionSpec()))

    q, k = struct(request["q_len"]), struct(request["kv_len"])
    with jax.set_mesh(mesh):
        jax.jit(lambda q, k, v: splash_attention(q, k, v, block_sizes=BlockSizes(*request["blocks"]))).lower(q, k, k).compile()


def main(argv: list[str] | None = None) -> None:
    """Print the cycles of one shape as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--topology", default="v6e:2x4")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--q_len", type=int, default=75600)
    parser.add_argument("--kv_len", type=int, default=None)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--blocks", type=int, nargs=4, metavar=("BQ", "BKV", "COMPUTE", "INNER"))
    args = parser.parse_args(argv)
    if args.worker:
        _worker(json.loads(args.worker))
        return
    shape = KernelShape(args.heads, args.q_len, args.kv_len or args.q_len, args.head_dim, args.dtype)
    print(json.dumps(as_json(splash_cycles(args.topology, shape, tuple(args.blocks) if args.blocks else None))))


def as_json(cycles: KernelCycles) -> dict:
    """The fields of a result and what follows from them, ready for ``json.dumps``."""
    derived = {
        "roofline": round(cycles.roofline, 4),
        "roofline_with_overhead": round(cycles.roofline_with_overhead, 4),
        "seconds": cycles.seconds,
        "hbm_seconds": cycles.hbm_seconds,
    }
    return {**dataclasses.asdict(cycles), **derived}


if __name__ == "__main__":
    main()
