"""bfloat16 products on a CPU that has instructions for them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_loading import mesh_of
from tests.tiny_models import build_tiny
from wan_common import torchax_bridge
from wan_common.denoiser import Denoiser, build_denoiser, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("products") / "tiny") / "transformer"


def build(folder: Path, devices: int = 1) -> Denoiser:
    return build_denoiser(
        read_config(folder, "WanTransformer3DModel"), mesh_of(devices), height=32, width=32, frames=5, text_length=8
    )  # fmt: skip


@pytest.mark.parametrize("devices", [1, 8])
def test_linear_layers_ask_for_float32(folder: Path, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """With the instructions no product asks for a bfloat16 result, without them the linear layers do; the numbers agree."""
    outputs = []
    for instructions in (True, False):
        monkeypatch.setattr(torchax_bridge, "has_bfloat16_instructions", lambda answer=instructions: answer)
        denoiser = build(folder, devices)
        params = denoiser.load(folder)
        text = jnp.asarray(np.random.default_rng(1).standard_normal((2, *denoiser.text_shape)), jnp.bfloat16)
        latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, *denoiser.latent_shape[1:])), jnp.bfloat16)
        inputs = latents, jnp.int32(500), text
        program = str(jax.make_jaxpr(denoiser.predict)(params, *inputs))
        narrow = program.count("preferred_element_type=bfloat16")
        assert (narrow == 0 if instructions else narrow > 10) and program.count("dot_general[") > 15
        outputs.append(np.asarray(jax.jit(denoiser.predict)(params, *inputs), np.float32))
    wide, narrow_ones = outputs
    assert np.linalg.norm(wide - narrow_ones) < 0.01 * np.linalg.norm(narrow_ones)


def test_other_platforms_keep_their_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a CPU mesh turns it on, and only inside."""
    monkeypatch.setattr(torchax_bridge, "has_bfloat16_instructions", lambda: True)

    class Device:
        platform = "tpu"

    class OtherMesh:
        devices = np.array([Device()])

    for mesh, wanted in ((OtherMesh(), False), (mesh_of(1), True)):
        with torchax_bridge.products_for(mesh):  # type: ignore[arg-type]
            assert torchax_bridge._wide_products.get() is wanted
        assert torchax_bridge._wide_products.get() is False
