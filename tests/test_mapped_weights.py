"""Weights that stay in the checkpoint's files: no copy, the same numbers, and when they are copied instead."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_loading import load_transformer, mesh_of, shard
from tests.tiny_models import build_tiny, copy_model
from wan_common import mapped_weights
from wan_common.denoiser import build_denoiser, read_config
from wan_common.mapped_weights import MappedStack
from wan_common.text_encoder import build_text_encoder, load_text_weights, read_text_config

QUERY = "blocks.*.attn1.to_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("mapped") / "tiny")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map the smallest of the tiny model's weights too."""
    monkeypatch.setattr(mapped_weights, "SMALLEST", 1)


def predict(folder: Path, params: dict[str, Any], dtype: str) -> np.ndarray:
    config = read_config(folder, "WanTransformer3DModel")
    denoiser = build_denoiser(config, mesh_of(1), height=32, width=32, frames=5, text_length=8, dtype=dtype)
    generator = np.random.default_rng(0)
    latents = jnp.asarray(generator.standard_normal((2, 16, 2, 4, 4)), dtype)
    text = jnp.asarray(generator.standard_normal((2, 8, config["text_dim"])), dtype)
    return np.asarray(jax.jit(denoiser.predict)(params, latents, jnp.int32(500), text), np.float32)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("files", "holding"), [(1, 1), (4, 3)])
def test_equal_to_copied_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, holding: int) -> None:
    """The three blocks in one file, and in three; RoPE's rows are permuted on the way out of the file."""
    folder = copy_model(model, tmp_path / "copy", "transformer") / "transformer"
    if files > 1:
        shard(folder, files)
    mapped = load_transformer(folder, dtype="float32")
    stacks = {name: value for name, value in mapped.items() if isinstance(value, MappedStack)}
    assert set(stacks) == {name for name in mapped if name.startswith("blocks.")}
    assert len(stacks[QUERY].files) == holding and stacks[QUERY].rows is not None
    monkeypatch.setattr(mapped_weights, "SMALLEST", 2**40)
    copied = load_transformer(folder, dtype="float32")
    assert not any(isinstance(value, MappedStack) for value in copied.values())
    for name, stack in stacks.items():
        assert (stack.shape, stack.dtype, stack.nbytes) == (copied[name].shape, copied[name].dtype, copied[name].nbytes), name
        np.testing.assert_array_equal(np.asarray(stack), np.asarray(copied[name]), err_msg=name)
    np.testing.assert_allclose(predict(folder, mapped, "float32"), predict(folder, copied, "float32"), rtol=0, atol=1e-6)


def test_nothing_is_copied(model: Path) -> None:
    """JAX's buffer is the mapped file itself, and all weights of a file share it."""
    (path,) = (model / "transformer").glob("*.safetensors")
    params = load_transformer(model / "transformer", dtype="float32")
    stacks = [value for value in params.values() if isinstance(value, MappedStack)]
    assert len(stacks) > 3
    (file,) = {stack.files[0].unsafe_buffer_pointer() for stack in stacks}
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    assert any(int(line[0].split("-")[0], 16) == file and line[1].startswith("r--") for line in maps)


@pytest.mark.usefixtures("everything")
def test_the_text_encoder_is_mapped_too(model: Path) -> None:
    params = load_text_weights(build_text_encoder(read_text_config(model), mesh_of(1), "float32"), model)
    assert all(isinstance(value, MappedStack) == ("*" in name) for name, value in params.items())


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("why", ["another dtype", "several devices", "too large for an int32"])
def test_copied_where_a_map_cannot_serve(model: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "too large for an int32":
        monkeypatch.setattr(mapped_weights, "INDEX_LIMIT", 100)
    params = load_transformer(
        model / "transformer", 8 if why == "several devices" else 1, "bfloat16" if why == "another dtype" else "float32"
    )  # fmt: skip
    weights = [value for name, value in params.items() if name.startswith("blocks.") and name.endswith("to_q.weight")]
    assert weights and all(isinstance(value, jax.Array) for value in weights)


PROBE = """
import resource, sys
import numpy as np
from wan_common.mesh import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_freed_memory_is_kept() -> None:
    """A buffer of 64 MiB made for the second time faults no page in; by default it faults all of them."""
    pages = (64 << 20) // mmap.PAGESIZE

    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < pages / 100
    assert faults("default") > pages / 600  # in huge pages, where the kernel gives them unasked
