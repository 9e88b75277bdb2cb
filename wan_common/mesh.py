"""Devices and hosts to a Mesh with the axes dp (CFG batch), sp (sequence) and tp (heads and features)."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from wan_common.errors import UsageError

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("dp", "sp", "tp")
logger = logging.getLogger("mesh")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; their product is the number of devices."""

    dp: int = 1
    sp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.dp * self.sp * self.tp

    def __str__(self) -> str:
        return f"dp {self.dp} x sp {self.sp} x tp {self.tp}"


def choose_mesh_shape(
    devices: int, batch: int, *, use_dp: bool = True, dp: int | None = None, sp: int | None = None, tp: int | None = None
) -> MeshShape:
    """Sizes of the axes for ``devices`` devices and ``batch`` rows (2 with classifier-free guidance, else 1).

    Without ``dp`` the batch is split over two halves of the devices when it can be. Of ``sp`` and ``tp`` the one that was
    given is kept and the other takes the rest; with neither, ``sp`` takes it (docs/LOG.md: all-to-all of the heads moves
    less than the gathers and reductions of tensor parallelism, and norms are computed once).

    Raises:
        UsageError: the sizes do not multiply to the number of devices, dp does not divide the batch or contradicts ``use_dp``.
    """
    if dp is not None and dp > 1 and not use_dp:
        raise UsageError(f"--dp {dp} with --no-use_dp: they contradict each other; leave one of them out")
    if dp is None:
        dp = 2 if use_dp and batch % 2 == 0 and devices % 2 == 0 else 1
    for name, size in (("dp", dp), ("sp", sp), ("tp", tp)):
        if size is not None and (size < 1 or devices % size):
            raise UsageError(f"--{name} {size}: does not divide the {devices} devices found; choose a divisor of {devices}")
    if batch % dp:
        raise UsageError(f"--dp {dp}: the batch has {batch} row(s) (2 with guidance_scale > 1); choose --dp 1")
    rest = devices // dp if devices % dp == 0 else 0
    if sp is None and tp is None:
        sp, tp = rest, 1
    elif sp is None:
        sp = rest // tp if tp and rest % tp == 0 else 0
    elif tp is None:
        tp = rest // sp if rest % sp == 0 else 0
    shape = MeshShape(dp, sp or 0, tp or 0)
    if shape.size != devices:
        raise UsageError(f"--dp {dp} --sp_num {sp} --tp {tp} make {shape.size} devices, {devices} were found; leave one of them out")
    return shape


def picture_mesh_shape(devices: int, height: int, width: int) -> MeshShape:
    """How the VAE lays a picture of ``height`` x ``width`` latent pixels over ``devices``: columns over sp, rows over tp.

    As many devices as get equal parts, and as few rows as that takes (480p, 60 x 104, on 16 chips: 8 columns x 2 rows); what
    is left over repeats the work (dp). Uneven parts would be padded: docs/LOG.md.
    """
    even = [
        (columns * rows, columns, rows)
        for columns in range(1, devices + 1) if devices % columns == 0 and width % columns == 0
        for rows in range(1, devices // columns + 1) if devices // columns % rows == 0 and height % rows == 0
    ]  # fmt: skip
    used, columns, rows = max(even)
    return MeshShape(devices // used, columns, rows)


def make_mesh(shape: MeshShape, devices: list | None = None) -> Mesh:
    """A Mesh of ``shape`` over ``devices`` (default: all of :func:`jax.devices`), laid out for the chips' links."""
    import jax
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import Mesh

    devices = list(jax.devices() if devices is None else devices)
    sizes = (shape.dp, shape.sp, shape.tp)
    if devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        array = np.array(devices).reshape(sizes)
    return Mesh(array, AXES)


def prepare_jax(cache_dir: str | None = None) -> None:
    """Set JAX up once, before its first use: the platform, and the persistent compilation cache.

    ``JAX_PLATFORMS`` and (without ``cache_dir``) ``JAX_COMPILATION_CACHE_DIR`` are respected. With libtpu installed on a
    machine that has no TPU, JAX tries for it with noisy warnings before it takes the CPU (FACTS), so the platform is named
    when no device file is there.
    """
    accelerators = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*") + glob.glob("/dev/nvidia[0-9]*")
    # torch code asks for int64 everywhere; with x64 off each place would warn that it gets int32 (FACTS).
    warnings.filterwarnings("ignore", message="Explicitly requested dtype int64", category=UserWarning)
    if "JAX_PLATFORMS" not in os.environ and not accelerators and "TPU_NAME" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        keep_freed_memory()
    import jax

    if cache_dir or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        default = os.path.join(os.path.expanduser("~"), ".cache", "wan_tpu", "jax")
        jax.config.update("jax_compilation_cache_dir", cache_dir or default)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # seed 001
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # seed 001


_heap_is_kept = [False]


def keep_freed_memory() -> None:
    """Have glibc keep the memory that XLA's CPU client frees after each step, for the next one.

    By default every large buffer is mapped anew and all its pages are faulted in again: a step of 4 blocks of the 1.3B shape
    took 6.2 to 7.1 s instead of 5.6 to 6.2 s (docs/LOG.md). The peak does not change. Above 2 GiB of free memory at its end
    the heap shrinks: what is kept counts at every fork, touched or not. Elsewhere than on glibc nothing happens.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
    _heap_is_kept[0] = True


@contextlib.contextmanager
def large_buffers_returned() -> Iterator[None]:
    """Large buffers made inside go back to the system when freed, also after :func:`keep_freed_memory`."""
    kept = _heap_is_kept[0]
    if kept:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    try:
        yield
    finally:
        if kept:
            ctypes.CDLL(None).mallopt(-3, 2**31 - 1)


def describe_devices() -> dict[str, object]:
    """Platform, kind and count of the devices, for provenance."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count(),
    }  # fmt: skip
