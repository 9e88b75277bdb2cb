"""Safetensors files are exact to the bit, readable by the reference library, and refused when they are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from wan_common.errors import ArtifactError
from wan_common.tensor_io import SafetensorsReader, load_tensors, save_tensors, to_numpy, to_torch


def test_every_bf16_bit_pattern_survives(tmp_path: Path) -> None:
    """torch -> file -> JAX -> file -> torch: all 65,536 patterns, NaN payloads and subnormals included."""
    bits = np.arange(65536, dtype=np.uint16)
    original = torch.from_numpy(bits.copy()).view(torch.bfloat16)
    save_tensors(tmp_path / "a.safetensors", {"x": original})
    loaded, _ = load_tensors(tmp_path / "a.safetensors")
    assert loaded["x"].dtype == ml_dtypes.bfloat16
    on_device = jnp.asarray(loaded["x"])
    assert on_device.dtype == jnp.bfloat16
    save_tensors(tmp_path / "b.safetensors", {"x": on_device})
    back = to_torch(load_tensors(tmp_path / "b.safetensors")[0]["x"])
    assert back.dtype == torch.bfloat16
    np.testing.assert_array_equal(back.view(torch.uint16).numpy(), bits)
    # and the reference library reads the same bits
    theirs = safetensors.torch.load_file(tmp_path / "b.safetensors")["x"]
    np.testing.assert_array_equal(theirs.view(torch.uint16).numpy(), bits)


EXAMPLES = {
    "f64": np.linspace(0, 1, 6).reshape(2, 3), "f32": np.array([[1.5, -0.0], [np.inf, 1e-45]], np.float32),
    "f16": np.arange(3, dtype=np.float16),
    "bf16": np.arange(12, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(3, 4), "i64": np.array([-(2**62)]), "i32": np.int32([[1]]),
    "i16": np.int16([3, -4]), "i8": np.int8([5]), "u8": np.uint8([[255, 0]]), "bool": np.array([True, False, True]),
    "scalar": np.float32(3.25), "empty": np.zeros((0, 4), np.float32), "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
}  # fmt: skip


def test_dtypes_shapes_and_metadata_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, dict(EXAMPLES), {"prompt": "ein Kreis \u2014 \u5706", "format": "test"})
    tensors, metadata = load_tensors(path)
    assert metadata == {"prompt": "ein Kreis \u2014 \u5706", "format": "test"}
    assert set(tensors) == set(EXAMPLES)
    with safetensors.safe_open(path, "np") as reference:
        assert reference.metadata() == metadata
        for name, array in EXAMPLES.items():
            assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
            assert tensors[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
            if name != "bf16":  # numpy in the reference library has no bf16
                np.testing.assert_array_equal(reference.get_tensor(name), array)


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4)}, path, metadata={"who": "library"})
    tensors, metadata = load_tensors(path)
    theirs = safetensors.torch.load_file(path)
    assert metadata == {"who": "library"}
    for name, tensor in theirs.items():
        assert torch.equal(to_torch(tensors[name]), tensor)


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": EXAMPLES["f32"], "y": EXAMPLES["bf16"]}, {"k": "1", "l": "2"})
    save_tensors(tmp_path / "b", {"y": EXAMPLES["bf16"], "x": EXAMPLES["f32"]}, {"l": "2", "k": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unsupported_dtype_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x has dtype complex64, which safetensors cannot hold"):
        save_tensors(tmp_path / "x.safetensors", {"x": np.zeros(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [None, (slice(1, 3), slice(None)), (slice(None), slice(1, 4)), (slice(2, 3), slice(0, 2))])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_read_into_takes_blocks(tmp_path: Path, index: tuple[slice, ...] | None, dtype: type) -> None:
    array = np.arange(20, dtype=np.float32).reshape(4, 5)
    save_tensors(tmp_path / "x.safetensors", {"w": array})
    wanted = array[index or ...]
    out = np.zeros(wanted.shape, dtype)
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        reader.read_into("w", out, index)
        with pytest.raises(ValueError, match="out has shape"):
            reader.read_into("w", np.zeros((9, 9), dtype), index)
    np.testing.assert_array_equal(out, wanted.astype(dtype))


def _header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "empty": (b"", "not a safetensors file, or truncated"),
    "short": (b"\x01\x02", "not a safetensors file, or truncated"),
    "mp4": (b"\x00\x00\x00\x20ftypisom" + os.urandom(64), "not a safetensors file"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" * 20, "not a safetensors file"),
    "not json": (_header(b"{'x': 1}"), "not a safetensors file"),
    "a list": (_header(b"[1, 2]  "), "not a safetensors file"),
    "no dtype": (_header(json.dumps({"x": {"shape": [1], "data_offsets": [0, 4]}}).encode(), b"abcd"), "not a safetensors file"),
    "bad dtype": (_header(json.dumps({"x": {"dtype": "F1", "shape": [1], "data_offsets": [0, 4]}}).encode(), b"abcd"), "not a safetensors"),
    "bad size": (_header(json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(), b"abcd"), "do not hold"),
    "extra bytes": (_header(json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), b"abcdefgh"), "foreign"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_foreign_files_are_refused(tmp_path: Path, what: str) -> None:
    content, message = DAMAGED[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        load_tensors(path, "rerun it")
    assert str(path) in str(error.value) and message in str(error.value) and str(error.value).endswith("rerun it")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": EXAMPLES["f32"], "y": EXAMPLES["bf16"]}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="truncated|not a safetensors file"):
            load_tensors(path)


def test_missing_file_and_missing_tensor(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors: No such file or directory; rerun stage 1"):
        load_tensors(tmp_path / "gone.safetensors", "rerun stage 1")
    save_tensors(tmp_path / "x.safetensors", {"x": EXAMPLES["f32"]})
    with SafetensorsReader(tmp_path / "x.safetensors") as reader, pytest.raises(ArtifactError, match="no tensor 'y'; it has x"):
        reader.read("y")


def test_to_numpy_and_back() -> None:
    values = torch.randn(4, 3).bfloat16()
    assert torch.equal(to_torch(to_numpy(values)), values)
    assert to_torch(np.float32(2.5)).shape == ()
    assert to_torch(EXAMPLES["strided"]).is_contiguous()
