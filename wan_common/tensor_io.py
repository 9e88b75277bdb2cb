"""Safetensors for torch and JAX, exact to the bit: bfloat16 is stored as bfloat16, through ``ml_dtypes`` and no rounding.

The file format is https://github.com/huggingface/safetensors#format. The library is not used for it: it writes its header in
random order, and equal runs should give equal files; its readers name neither file nor remedy, and cannot read a slice of a
tensor straight into the memory of its device shard (:meth:`SafetensorsReader.read_into`).
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wan_common.atomic import atomic_path
from wan_common.errors import ArtifactError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


class SafetensorsReader:
    """One safetensors file, its header checked against the file's size; tensors are read on demand with ``pread``.

    Attributes:
        metadata: the ``__metadata__`` strings.
        tensors: name -> (dtype, shape, absolute byte offset).

    Raises:
        ArtifactError: missing, truncated or not a safetensors file; ``remedy`` is appended to the message.
    """

    def __init__(self, path: str | os.PathLike[str], remedy: str = "rewrite it"):
        self.path = Path(path)
        self._remedy = remedy
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by __exit__/close
        except OSError as error:
            raise ArtifactError(f"{self.path}: {error.strerror}; {remedy}") from error
        try:
            self._parse()
        except BaseException:
            self._file.close()
            raise

    def _parse(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = int.from_bytes(head, "little") if len(head) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise self._error(f"not a safetensors file, or truncated ({size} bytes)")
        try:
            header = json.loads(self._file.read(length).decode("utf-8"))
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
            self.tensors: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
            end_of_data = 8 + length
            for name, entry in header.items():
                dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
                begin, end = entry["data_offsets"]
                if end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
                    raise self._error(f"{name}: {end - begin} bytes do not hold {entry['dtype']}{list(shape)}")
                self.tensors[name] = (dtype, shape, 8 + length + begin)
                end_of_data = max(end_of_data, 8 + length + end)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"not a safetensors file (header: {error!r})") from error
        if end_of_data != size:
            raise self._error(f"truncated or foreign: {size} bytes, the header describes {end_of_data}")

    def _error(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {what}; {self._remedy}")

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def map(self) -> np.ndarray:
        """The whole file as read-only uint8, mapped; it stays mapped, after :meth:`close` too, while somebody holds the array."""
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def read(self, name: str) -> np.ndarray:
        """The whole tensor ``name`` as a new array."""
        dtype, shape, _ = self._entry(name)
        out = np.empty(shape, dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        """Fill ``out`` with tensor ``name`` (or with its sub-block ``index``), converting the dtype if they differ.

        When ``out`` is C-contiguous, has the file's dtype and the block is contiguous in the file (all of it, or a range
        of its first axis), bytes go from the page cache into ``out`` with no copy between; otherwise the tensor is
        read whole and copied. ``out.shape`` must equal the block's shape.
        """
        dtype, shape, offset = self._entry(name)
        index = index or tuple(slice(None) for _ in shape)
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        wanted = tuple(stop - start for start, stop, _ in bounds)
        if out.shape != wanted:
            raise ValueError(f"{self.path}: {name}: out has shape {out.shape}, the block has {wanted}")
        rows_only = all(block == full for block, full in zip(wanted[1:], shape[1:], strict=True))
        if rows_only and out.flags.c_contiguous and out.dtype == dtype:
            row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            self._fill(out, offset + (bounds[0][0] * row if shape else 0))
            return
        if rows_only and shape:
            block = np.empty(wanted, dtype)
            self._fill(block, offset + bounds[0][0] * dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64)))
            out[...] = block.astype(out.dtype, copy=False)
            return
        whole = np.empty(shape, dtype)
        self._fill(whole, offset)
        out[...] = whole[index].astype(out.dtype, copy=False)

    def _entry(self, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        if name not in self.tensors:
            raise self._error(f"no tensor {name!r}; it has {', '.join(sorted(self.tensors)[:8]) or 'none'}")
        return self.tensors[name]

    def _fill(self, out: np.ndarray, offset: int) -> None:
        if out.nbytes == 0:
            return
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise self._error("truncated while being read")
            done += count


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor, JAX array or numpy array as numpy, bit for bit (bfloat16 becomes ``ml_dtypes.bfloat16``)."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if type(tensor).__module__.startswith("torch"):
        import torch

        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    return np.asarray(tensor)


def to_torch(array: np.ndarray) -> Any:
    """A numpy array (``ml_dtypes.bfloat16`` included) as a torch tensor, bit for bit."""
    import torch

    array = np.asarray(array, order="C")
    if array.dtype == _DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write torch, JAX or numpy tensors to a safetensors file, atomically, each in its own dtype.

    Args:
        tensors: name -> tensor; bfloat16 stays bfloat16.
        metadata: strings for the header; they travel with the file and make it self-describing.

    Raises:
        ValueError: a dtype that safetensors cannot hold.
    """
    arrays = {name: np.asarray(to_numpy(tensor), order="C") for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):  # aligned, as the library does
        if array.dtype not in _NAMES:
            raise ValueError(f"{path}: {name} has dtype {array.dtype}, which safetensors cannot hold")
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name != "__metadata__":
                file.write(arrays[name].reshape(-1).view(np.uint8).data)


def load_tensors(path: str | os.PathLike[str], remedy: str = "rewrite it") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read every tensor of a safetensors file as numpy (bfloat16 as ``ml_dtypes.bfloat16``), with the header's metadata.

    Raises:
        ArtifactError: see :class:`SafetensorsReader`.
    """
    with SafetensorsReader(path, remedy) as reader:
        return {name: reader.read(name) for name in reader.tensors}, reader.metadata
