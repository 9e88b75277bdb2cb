"""How a CPU holds one weight of all blocks: in the checkpoint's mapped files, or as integers; each block's is cut out in the scan.

:class:`MappedStack`: for one CPU device, where the files' dtype is the dtype of the computation. Nothing is copied, the page cache
holds the weights (processes share them, and the system may drop them under pressure), as with ``from_pretrained``. XLA's CPU client
takes a buffer only at an address that 64 divides and safetensors aligns tensors to 8 bytes, so what JAX gets is the whole file, as one
flat array. A scan over blocks copies each block's weights out of its stack anyhow; here it copies them out of the file.

:class:`IntegerStack`: bfloat16 on any CPU mesh, where the weights were copied.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from wan_common.tensor_io import SafetensorsReader

PAGE = 4096
TASK = 1 << 25  # bytes to be touched by a thread before it takes the next
SMALLEST = 1 << 16  # bytes of a block's weight; less is not worth a cut
INDEX_LIMIT = 2**31  # JAX's indices are int32


@partial(jax.tree_util.register_dataclass, data_fields=["files", "places"], meta_fields=["block_shape", "rows", "dtype"])
@dataclasses.dataclass(frozen=True)
class MappedStack:
    """One weight of all blocks, in place of an array [blocks, *block_shape].

    Attributes:
        files: each file that holds a part, whole, as a flat array of integers as wide as the weight's dtype (see :func:`integers`).
        places: int32 [blocks, 2]: which of ``files``, and the offset in it (elements).
        rows: a permutation of a block's first axis, or None.
        dtype: of the weights.
    """

    files: tuple[jax.Array, ...]
    places: jax.Array
    block_shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the array it stands for."""
        return (self.places.shape[0], *self.block_shape)

    @property
    def nbytes(self) -> int:
        """Of the weights (they are in the page cache)."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def scanned(self) -> jax.Array:
        """What a scan over blocks slices."""
        return self.places

    def block(self, place: jax.Array) -> jax.Array:
        """The weight [*block_shape] of the block whose row of ``places`` is given."""
        size = int(np.prod(self.block_shape))

        def cut(file: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(file, (offset,), (size,))

        if len(self.files) == 1:
            flat = cut(self.files[0], place[1])
        else:
            flat = jax.lax.switch(place[0], [partial(cut, file) for file in self.files], place[1])
        block = jax.lax.bitcast_convert_type(flat, self.dtype).reshape(self.block_shape)
        if self.rows is None:
            return block
        return block.at[np.array(self.rows)].get(mode="promise_in_bounds", unique_indices=True)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The stack as numpy, for inspection."""
        stack = np.stack([np.asarray(self.block(place)) for place in self.places])
        return stack if dtype is None else stack.astype(dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["scanned"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class IntegerStack:
    """One weight of all blocks, in place of an array [blocks, ...] of ``dtype``.

    Attributes:
        scanned: the same array as :func:`integers`, sharded as the array would be.
        dtype: of the weights.
    """

    scanned: jax.Array
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the array it stands for."""
        return self.scanned.shape

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """As of the array it stands for."""
        return self.scanned.sharding

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self.scanned.nbytes

    def block(self, row: jax.Array) -> jax.Array:
        """The weight of the block whose row of ``scanned`` is given."""
        return jax.lax.bitcast_convert_type(row, self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The stack as numpy, for inspection."""
        stack = np.asarray(self.scanned).view(self.dtype)
        return stack if dtype is None else stack.astype(dtype)


def integers(dtype: np.dtype) -> np.dtype:
    """Unsigned integers as wide as ``dtype``: as what XLA's CPU backend may slice bfloat16 weights inside a loop.

    It slices bfloat16 as float32: it converts the whole operand, once for each slice, and before the loop, so that the step would hold a
    float32 copy of all blocks (of all files, where they are mapped: one copy for each of a block's weights). Integers it leaves alone.
    """
    return np.dtype(f"u{dtype.itemsize}")


class FileMaps:
    """Files as flat JAX arrays that are no copies; each is mapped once."""

    def __init__(self) -> None:
        self._bytes: dict[Path, np.ndarray] = {}
        self._arrays: dict[tuple[Path, np.dtype], jax.Array] = {}

    def array(self, reader: SafetensorsReader, dtype: np.dtype) -> jax.Array:
        """The whole file as :func:`integers` of ``dtype``, from its first byte (the last odd bytes are left out)."""
        key = (reader.path, dtype)
        if key not in self._arrays:
            if reader.path not in self._bytes:
                self._bytes[reader.path] = reader.map()
            whole = self._bytes[reader.path]
            whole = whole[: whole.size - whole.size % dtype.itemsize]
            self._arrays[key] = jax.device_put(whole.view(integers(dtype)), jax.devices("cpu")[0])
        return self._arrays[key]

    def stack(
        self, readers: list[SafetensorsReader], sources: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, rows: np.ndarray | None
    ) -> MappedStack | None:
        """The blocks ``sources``, each in its reader and of ``shape``, as one weight; None if they have to be copied."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries = [reader.tensors[source] for reader, source in zip(readers, sources, strict=True)]
        used = list(dict.fromkeys(readers))
        if size < SMALLEST or max(reader.size for reader in used) // dtype.itemsize >= INDEX_LIMIT:
            return None
        if any(found != dtype or offset % dtype.itemsize for found, _, offset in entries):
            return None
        files = tuple(self.array(reader, dtype) for reader in used)
        places = [(used.index(reader), offset // dtype.itemsize) for reader, (_, _, offset) in zip(readers, entries, strict=True)]
        order = None if rows is None else tuple(rows.tolist())
        return MappedStack(files, jax.device_put(np.array(places, np.int32), jax.devices("cpu")[0]), shape, order, dtype)

    def touch(self, readers: list[SafetensorsReader], sources: tuple[str, ...], pool: ThreadPoolExecutor) -> None:
        """Have a stack's tensors read from the disk now, not in the middle of the first step."""
        parts = []
        for reader, source in zip(readers, sources, strict=True):
            dtype, shape, offset = reader.tensors[source]
            parts.append(self._bytes[reader.path][offset : offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize : PAGE])
        batch = max(1, TASK // (parts[0].size * PAGE))
        # max() lets go of the interpreter, sum() of uint8 does not: 0.06 and 0.13 s for 2.6 GiB in the page cache, two threads
        list(pool.map(lambda first: [part.max() for part in parts[first : first + batch]], range(0, len(parts), batch)))
