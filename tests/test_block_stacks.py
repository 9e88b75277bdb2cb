"""Stacks of blocks' weights on a CPU: left in the checkpoint's files or held as integers; the same numbers, and no copies of them."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.test_loading import load_transformer, mesh_of, shard
from tests.tiny_models import build_tiny, copy_model
from wan_common import block_stacks
from wan_common.block_stacks import IntegerStack, MappedStack
from wan_common.denoiser import build_denoiser, read_config
from wan_common.text_encoder import build_text_encoder, load_text_weights, read_text_config

QUERY = "blocks.*.attn1.to_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("mapped") / "tiny")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Map the smallest of the tiny model's weights too."""
    monkeypatch.setattr(block_stacks, "SMALLEST", 1)


def program(folder: Path, dtype: str, devices: int = 1) -> tuple[Any, tuple[Any, ...]]:
    """The jitted transformer, and its inputs but for the weights."""
    config = read_config(folder, "WanTransformer3DModel")
    denoiser = build_denoiser(config, mesh_of(devices), height=32, width=32, frames=5, text_length=8, dtype=dtype)
    generator = np.random.default_rng(0)
    latents = jnp.asarray(generator.standard_normal((2, 16, 2, 4, 4)), dtype)
    text = jnp.asarray(generator.standard_normal((2, 8, config["text_dim"])), dtype)
    return jax.jit(denoiser.predict), (latents, jnp.int32(500), text)


def predict(folder: Path, params: dict[str, Any], dtype: str) -> np.ndarray:
    jitted, inputs = program(folder, dtype)
    return np.asarray(jitted(params, *inputs), np.float32)


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
    monkeypatch.setattr(block_stacks, "SMALLEST", 2**40)
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
        monkeypatch.setattr(block_stacks, "INDEX_LIMIT", 100)
    params = load_transformer(
        model / "transformer", 8 if why == "several devices" else 1, "bfloat16" if why == "another dtype" else "float32"
    )  # fmt: skip
    weights = [value for name, value in params.items() if name.startswith("blocks.") and name.endswith("to_q.weight")]
    assert weights and all(isinstance(value, IntegerStack if why == "another dtype" else jax.Array) for value in weights)


@pytest.fixture(scope="module")
def narrow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer in bfloat16, but for what stays in float32."""
    folder = copy_model(model, tmp_path_factory.mktemp("narrow") / "copy", "transformer") / "transformer"
    WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("held", "devices"), [("mapped", 1), ("integers", 1), ("integers", 8)])
def test_bfloat16_stacks_have_no_float32_copy(model: Path, narrow: Path, held: str, devices: int) -> None:
    """XLA makes one of a bfloat16 array that a loop slices; not of these. The numbers are those of plain arrays."""
    folder = narrow if held == "mapped" else model / "transformer"
    params = load_transformer(folder, devices, "bfloat16")
    kind = MappedStack if held == "mapped" else IntegerStack
    stacks = {name: value for name, value in params.items() if isinstance(value, kind) and value.dtype == jnp.bfloat16}
    assert {name for name in stacks if name.endswith(("to_q.weight", "proj.weight"))} >= {QUERY, "blocks.*.ffn.net.0.proj.weight"}
    for value in stacks.values():
        assert value.nbytes == 2 * np.prod(value.shape)
    jitted, inputs = program(folder, "bfloat16", devices)
    plain = {
        name: jax.device_put(np.asarray(value), value.sharding if isinstance(value, IntegerStack) else None)
        for name, value in stacks.items()
    }  # fmt: skip

    def copies(weights: dict[str, Any]) -> int:
        """Float32 arrays as large as a stack of matrices (or its part on a device), or as a file."""
        large = min(value.addressable_shards[0].data.size for value in plain.values() if value.ndim == 3)
        text = jitted.lower(weights, *inputs).compile().as_text()
        found = re.findall(r"%wrapped_convert[.\d]* = f32\[([\d,]+)\]", text)
        return sum(int(np.prod([int(n) for n in shape.split(",")])) >= large for shape in found)

    assert copies(params) == 0
    assert copies({**params, **plain}) > 3  # so this program is read rightly
    np.testing.assert_array_equal(np.asarray(jitted(params, *inputs)), np.asarray(jitted({**params, **plain}, *inputs)))


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


LARGE = """
import numpy as np
from pathlib import Path
from wan_common.mesh import keep_freed_memory
keep_freed_memory()
held = [np.empty(1 << 30, np.uint8) for _ in range(12)]
del held
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")))
"""


def test_the_heap_shrinks_again() -> None:
    """12 GiB, never touched: kept, they would be counted at every fork, which then fails on a smaller machine."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 << 20  # KiB
