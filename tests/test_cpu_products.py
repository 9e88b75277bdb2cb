"""What a CPU is given instead: bfloat16 products by its own instructions, convolutions of pictures."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from tests.test_loading import mesh_of
from tests.tiny_models import build_tiny
from wan_common import torchax_bridge
from wan_common.denoiser import Denoiser, build_denoiser, read_config
from wan_common.planar_convolution import PlanarConv3d, suit_convolutions
from wan_common.torchax_bridge import call_module
from wan_common.vae import build_vae_decoder


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


@pytest.mark.parametrize("cached", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), ((3, 1, 1), (1, 0, 0)), ((3, 3, 1), (1, 1, 0)), (1, 0)])
def test_planar_convolution(cached: int | None, frames: int, kernel: int | tuple[int, ...], padding: int | tuple[int, ...]) -> None:
    """Equal to the stock causal convolution for every number of frames that the cache can hold (stock wants two at most)."""
    torch.manual_seed(0)
    stock = WanCausalConv3d(5, 7, kernel, padding=padding).eval()  # type: ignore[arg-type]
    x = torch.randn(1, 5, frames, 6, 9)
    cache = None if cached is None else torch.randn(1, 5, cached, 6, 9)
    kept = stock.kernel_size[0] - 1
    with torch.no_grad():
        wanted = stock(x, cache[:, :, max(cache.shape[2] - kept, 0) :] if cache is not None and kept else None)
    params = {name: jnp.asarray(value.detach().numpy()) for name, value in stock.named_parameters()}
    stock.__class__ = PlanarConv3d
    ours = call_module(stock, params, jnp.asarray(x.numpy()), None if cache is None else jnp.asarray(cache.numpy()))
    np.testing.assert_allclose(np.asarray(ours), wanted.numpy(), atol=5e-6)


def test_only_cpus_get_planar_convolutions() -> None:
    config = dict(AutoencoderKLWan(base_dim=8, num_res_blocks=1).config)
    decoder = build_vae_decoder(config, mesh_of(1), "float32")
    causal = [m for m in decoder.module.modules() if isinstance(m, WanCausalConv3d)]
    assert len(causal) > 10 and all(isinstance(m, PlanarConv3d) for m in causal)
    stock = AutoencoderKLWan.from_config(config)
    suit_convolutions(stock, "tpu")
    assert not any(isinstance(m, PlanarConv3d) for m in stock.modules())


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_planar_convolution_in_bfloat16(frames: int) -> None:
    """Rounded once, at the end: minimal filtering multiplies by up to 8 and subtracts, which bfloat16 would not survive."""
    torch.manual_seed(0)
    stock = WanCausalConv3d(64, 16, 3, padding=1).eval().bfloat16()
    x, cache = (torch.randn(1, 64, count, 8, 8).bfloat16() for count in (frames, 2))
    with torch.no_grad():
        wanted = stock.float()(x.float(), cache.float()).numpy()
    stock.__class__ = PlanarConv3d
    params = {name: jnp.asarray(value.detach().numpy(), jnp.bfloat16) for name, value in stock.named_parameters()}
    ours = call_module(stock, params, *(jnp.asarray(value.float().numpy(), jnp.bfloat16) for value in (x, cache)))
    assert ours.dtype == jnp.bfloat16
    assert np.abs(np.asarray(ours, np.float32) - wanted).max() < 2**-8 * np.abs(wanted).max()
