"""Static cycles of the norm and RoPE kernel, read like kernel_cycles reads the attention kernel's."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from wan_common.atomic import atomic_path
from wan_common.kernel_cycles import CHIPS, ROOT, KernelCompileError, cache_dir

ROWS_COMPILED = 512  # two grid steps: the bundles do not depend on how many there are


def norm_rope_seconds(chip: str, operand: tuple[int, ...], result: tuple[int, ...], rotate: bool, dtype: str) -> float:
    """Seconds of ``rope_kernel.norm_rope`` from [B, S, features] to [B, groups, S, features / groups] on one device.

    The bundles of the whole program stand for those of a grid step: a few more than there are. HBM traffic if longer.

    Raises:
        KernelCompileError: the compiler refused.
    """
    from wan_common.rope_kernel import block_rows

    batch, length, features = operand
    bundles = step_bundles(chip, features, result[1], rotate)
    spec = CHIPS[chip]
    cores = spec.cores if spec.shared else 1
    steps = batch * -(-length // block_rows(chip))
    itemsize = 4 if dtype == "f32" else 2
    traffic = 2 * math.prod(operand) * itemsize + (8 * length * 128 if rotate else 0)
    bandwidth = spec.hbm_bytes / (1 if spec.shared else spec.cores)
    return max(-(-steps // cores) * bundles / spec.clock_hz, traffic / bandwidth)


def step_bundles(chip: str, features: int, groups: int, rotate: bool) -> int:
    """VLIW bundles of one grid step, from the cache or by compiling in a process of its own (seconds)."""
    request = {"chip": chip, "topology": CHIPS[chip].topology, "features": features, "groups": groups, "rotate": rotate}
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    key = json.dumps([request, versions, os.environ.get("LIBTPU_INIT_ARGS", "")], sort_keys=True).encode()
    sources = (ROOT / "wan_common" / "rope_kernel.py").read_bytes() + Path(__file__).read_bytes()
    file = cache_dir() / f"norm_rope-{hashlib.sha256(key + sources).hexdigest()[:32]}.json"
    if file.exists():
        return int(json.loads(file.read_text())["bundles"])
    bundles = _compile_apart(request)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps({"bundles": bundles}))
    return bundles


def _compile_apart(request: dict) -> int:
    with tempfile.TemporaryDirectory(prefix="wan_bundles_") as dump:
        args = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        env = dict(
            os.environ, LIBTPU_INIT_ARGS=args.strip(), JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v6e-8", TPU_LOG_DIR="disabled", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )  # fmt: skip
        env.pop("XLA_FLAGS", None)
        command = [sys.executable, "-m", "wan_common.plan_kernels", "--worker", json.dumps(request)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise KernelCompileError(f"norm_rope for {request['chip']}: {done.stderr.strip().splitlines()[-1][:400]}")
        for path in Path(dump).glob(f"*-{'norm_rope' if request['rotate'] else 'norm'}.*schedule-analysis_final_bundles.txt"):
            found = re.search(r"([\d.]+) scheduled bundles \(100", path.read_text())
            if found:
                return round(float(found.group(1)))
    raise KernelCompileError(f"norm_rope for {request['chip']}: the compiler dumped no bundles")


def _worker(request: dict) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from wan_common.rope_kernel import norm_rope

    described = topologies.get_topology_desc(topology_name=request["topology"], platform="tpu")
    mesh = Mesh(np.array(described.devices[:1]), ("x",))

    def struct(*shape: int, dtype: object = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    features, rotate = request["features"], request["rotate"]
    table = struct(ROWS_COMPILED, 128, dtype=jnp.float32)
    arguments = [struct(1, ROWS_COMPILED, features), struct(features), *([table, table] if rotate else [])]

    def run(x: jax.Array, weight: jax.Array, *tables: jax.Array) -> jax.Array:
        return norm_rope(
            x, head_dim=128, weight=weight, eps=1e-6, tables=(tables[0], tables[1]) if tables else None, groups=request["groups"],
        )  # fmt: skip

    with jax.set_mesh(mesh):
        jax.jit(run).lower(*arguments).compile()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True)
    _worker(json.loads(parser.parse_args().worker))
