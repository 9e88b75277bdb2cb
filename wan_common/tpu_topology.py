"""TPU slices by name, and how long a collective takes on their links."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from wan_common.errors import UsageError
from wan_common.kernel_cycles import CHIPS, Chip

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Links:
    """A chip's inter-chip links: GB/s of one link in one direction (vendor total / links / 2 directions), and how many."""

    bytes_per_second: float
    count: int


# https://cloud.google.com/tpu/docs: inter-chip bandwidth a chip, bidirectional: v4 600 (6 links), v5e 400 (4), v5p 1,200 (6),
# v6e 800 (4), tpu7x 1,200 (6) GB/s.
LINKS = {"v4": Links(50e9, 6), "v5e": Links(50e9, 4), "v5p": Links(100e9, 6), "v6e": Links(100e9, 4), "tpu7x": Links(100e9, 6)}
# HBM of one JAX device. v4, v5p: two cores share a chip's and are one device; tpu7x: each core is a device with its half.
HBM_BYTES = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": int(31.25 * GIB), "tpu7x": 96 * GIB}
# Between the two devices of a tpu7x chip: the die-to-die link is six times one inter-chip link (Google's Ironwood guide).
DIE_TO_DIE_LINKS = 6
_SHAPES_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name as users say it, libtpu's name, its chip and sizes (devices are what JAX sees)."""

    name: str
    libtpu: str
    chip: str
    chips: int
    devices: int

    @property
    def spec(self) -> Chip:
        """What one chip can do."""
        return CHIPS[self.chip]

    @property
    def hbm_bytes(self) -> int:
        """HBM of one device."""
        return HBM_BYTES[self.chip]


def topology(name: str) -> Topology:
    """The slice called ``name``: ``v6e-8``, or libtpu's ``v6e:2x4``.

    The number counts chips for v5e and v6e, TensorCores for v4, v5p and tpu7x (two a chip), as in Google Cloud's names.

    Raises:
        UsageError: not a known slice; lists those that are.
    """
    known = f"known: {', '.join(known_names())}"
    found = re.fullmatch(r"(v4|v5e|v5litepod|v5p|v6e|tpu7x|v7x)[-:](\d+(?:x\d+)*)", name)
    if not found:
        raise UsageError(f"--topology {name}: not a TPU slice; {known}")
    chip = {"v5litepod": "v5e", "v7x": "tpu7x"}.get(found.group(1), found.group(1))
    cores = 2 if chip in ("v4", "v5p", "tpu7x") else 1
    shapes = _SHAPES_2D if chip in ("v5e", "v6e") else _SHAPES_3D
    if "x" in found.group(2):
        chips = math.prod(int(n) for n in found.group(2).split("x"))
        shape = found.group(2)
        if shapes.get(chips) != shape:
            raise UsageError(f"--topology {name}: not a shape planned for; {known}")
        name = f"{chip}-{chips * cores}"
    else:
        chips = int(found.group(2)) // cores
        if chips not in shapes or chips * cores != int(found.group(2)):
            raise UsageError(f"--topology {name}: no slice of that size; {known}")
        shape = shapes[chips]
    return Topology(name, f"{chip}:{shape}", chip, chips, chips * (2 if chip == "tpu7x" else 1))


def known_names() -> list[str]:
    """Every slice name, smallest first by chip."""
    names = [f"{chip}-{n}" for chip in ("v5e", "v6e") for n in _SHAPES_2D]
    return names + [f"{chip}-{2 * n}" for chip in ("v4", "v5p", "tpu7x") for n in _SHAPES_3D]


def larger(than: Topology) -> list[Topology]:
    """Slices of the same chip with more chips, smallest first."""
    cores = 2 if than.chip in ("v4", "v5p", "tpu7x") else 1
    sizes = _SHAPES_2D if than.chip in ("v5e", "v6e") else _SHAPES_3D
    return [topology(f"{than.chip}-{n * cores}") for n in sizes if n > than.chips]


def set_environment() -> None:
    """What libtpu needs to compile for a TPU that is not there; must come before the first use of JAX."""
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v6e-8", TPU_SKIP_MDS_QUERY="1",
        TPU_LOG_DIR="disabled", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip


def describe(which: Topology) -> list[Any]:
    """The devices of ``which`` as libtpu describes them, for ``make_mesh``."""
    from jax.experimental import topologies

    # v4's two cores are one device unless a program asks otherwise; libtpu's default description has them apart.
    options = {"chip_config_name": "megacore"} if which.chip == "v4" else {}
    return list(topologies.get_topology_desc(topology_name=which.libtpu, platform="tpu", **options).devices)


class Network:
    """Times of collectives between the devices of a mesh, from where they sit and their links.

    Least times that the links allow: every device must receive what it lacks through its links to others of its group, and
    every straight cut through the group must let pass what crosses it. No wrap-around links (slices this small have none),
    no latency, no contention between groups.
    """

    def __init__(self, which: Topology, devices: list[Any]):
        self.links = LINKS[which.chip]
        self.coords = [tuple(device.coords) for device in devices]
        self.cores = [getattr(device, "core_on_chip", 0) for device in devices]

    def _neighbours(self, group: tuple[int, ...]) -> dict[int, float]:
        """Links of each member to others of the group (the die-to-die link counts several)."""
        where = {(self.coords[i], self.cores[i]): i for i in group}
        on_chip = {i: sum(self.coords[j] == self.coords[i] for j in group) for i in group}
        found = dict.fromkeys(group, 0.0)
        for i in group:
            others = {self.coords[j] for j in group}
            for axis in range(len(self.coords[i])):
                for step in (-1, 1):
                    beside = tuple(c + step * (n == axis) for n, c in enumerate(self.coords[i]))
                    if beside in others:
                        found[i] += 1 / on_chip[i]  # the devices of a chip share its links
            found[i] += DIE_TO_DIE_LINKS * (on_chip[i] - 1)
        return {i: links or 1.0 for i, links in found.items()} if where else found

    def _cuts(self, group: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(devices on one side, on the other, links across) of every straight cut."""
        cuts = []
        chips = {self.coords[i] for i in group}
        for axis in range(len(next(iter(chips)))):
            for at in sorted({c[axis] for c in chips})[:-1]:
                low = sum(self.coords[i][axis] <= at for i in group)
                across = sum(c[axis] == at and tuple(v + (n == axis) for n, v in enumerate(c)) in chips for c in chips)
                cuts.append((low, len(group) - low, max(across, 1)))
        return cuts

    def seconds(self, kind: str, size: int, groups: tuple[tuple[int, ...], ...]) -> float:
        """Least seconds of a collective whose whole result on a device has ``size`` bytes."""
        groups = groups or (tuple(range(len(self.coords))),)
        if kind == "collective-permute":
            return size / self.links.bytes_per_second
        return max(self._group_seconds(kind, size, group) for group in groups)

    def _group_seconds(self, kind: str, size: int, group: tuple[int, ...]) -> float:
        n = len(group)
        if n == 1:
            return 0.0
        fewest = min(self._neighbours(group).values())
        own = size * (n - 1) / n / fewest
        if kind in ("all-to-all", "ragged-all-to-all"):
            crossing = max((a * b * size / n / links for a, b, links in self._cuts(group)), default=0.0)
        else:
            crossing = max((size * max(a, b) / n / links for a, b, links in self._cuts(group)), default=0.0)
        twice = 2 if kind == "all-reduce" else 1  # reduce-scatter, then all-gather
        return twice * max(own, crossing) / self.links.bytes_per_second
