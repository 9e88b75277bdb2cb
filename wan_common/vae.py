"""The jitted VAE decoder: stock AutoencoderKLWan, one latent frame at a time, its causal feature cache as explicit state."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanUpsample, unpatchify
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.interop import jax_view, torch_view

from wan_common.denoiser import read_config
from wan_common.errors import ArtifactError, NumericalError
from wan_common.planar_convolution import suit_convolutions
from wan_common.sharding import VAE_RULES, divisible_axes
from wan_common.torchax_bridge import (
    DTYPES,
    Params,
    Weight,
    abstract_params,
    call_module,
    load_weights,
    meta_module,
    plan_weights,
)  # fmt: skip

logger = logging.getLogger("vae")
EFFORT = "JAX_EXEC_TIME_OPTIMIZATION_EFFORT"
Cache = list[jax.Array]
Frames = tuple[jax.Array, jax.Array]
"""uint8 frames [f, H, W, 3], and whether the VAE's output was finite (uint8 has no NaN)."""


def compiler_options(mesh: Mesh) -> dict[str, float] | None:
    """Less effort of the TPU compiler, unless ``JAX_EXEC_TIME_OPTIMIZATION_EFFORT`` says how much.

    At full effort its search over convolution windows takes 3 minutes a program at 720p and 7 at 480p on 8 chips, at -0.5 (there
    is nothing between) 1 minute; a clip then decodes in 2.1 s instead of 1.6, in 1.0 s instead of 0.6 (predicted, docs/LOG.md).
    """
    if mesh.devices.flat[0].platform != "tpu" or EFFORT in os.environ:
        return None
    return {"exec_time_optimization_effort": -0.5}


class NearestUpsample(torch.nn.Module):
    """Nearest-exact upsampling by 2 as a repeat: ``WanUpsample`` goes through float32 and torchax then loses the bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] to [N, C, 2h, 2w]."""
        y = jax_view(x)
        n, c, h, w = y.shape
        y = jnp.broadcast_to(y[:, :, :, None, :, None], (n, c, h, 2, w, 2))
        return torch_view(y.reshape(n, c, 2 * h, 2 * w))


class _DecodeOnly(torch.nn.Module):
    """``post_quant_conv`` and ``decoder`` under one forward, so that one functional call runs both."""

    def __init__(self, vae: Any):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.patch_size = vae.config.patch_size

    def forward(self, z: torch.Tensor, cache: list[Any], first: bool) -> tuple[torch.Tensor, list[Any]]:
        entries = list(cache)  # the stock decoder overwrites its entries
        pixels = self.decoder(self.post_quant_conv(z), feat_cache=entries, feat_idx=[0], first_chunk=first)
        return (unpatchify(pixels, self.patch_size) if self.patch_size is not None else pixels), entries


@dataclasses.dataclass
class VaeDecoder:
    """Decodes latents frame by frame. Build with :func:`build_vae_decoder`, or :func:`load_vae_decoder` with weights.

    The stock decoder keeps a list of features from frame to frame: None at first, then tensors of one, later two frames, and
    the string "Rep" where the first frame skips a temporal upsampling. All of these equal two zero frames on the left, so the
    cache is kept in one shape: two programs (first frame, every other frame) where stock would need three.
    """

    module: Any
    config: Any
    plan: dict[str, Weight]
    mesh: Mesh
    dtype: str
    params: Params | None = None

    def __post_init__(self) -> None:
        self._slots = sum(isinstance(m, WanCausalConv3d) for m in self.module.decoder.modules())
        outputs = (NamedSharding(self.mesh, PartitionSpec()), None)  # every process sees whole frames; the cache stays sharded
        options = compiler_options(self.mesh)
        self._first = jax.jit(self.decode_first, out_shardings=outputs, compiler_options=options)
        self._next = jax.jit(self.decode_next, donate_argnums=(2,), out_shardings=outputs, compiler_options=options)

    def picture_sharding(self, height: int, width: int) -> NamedSharding:
        """Frames [1, C, f, h, w] (latent or pixel size): columns over sp, rows over tp (mesh.picture_mesh_shape)."""
        rows, columns = divisible_axes(("tp",), height, self.mesh), divisible_axes(("sp",), width, self.mesh)
        return NamedSharding(self.mesh, PartitionSpec(None, None, None, rows or None, columns or None))

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """``z * latents_std + latents_mean`` in fp32, as the pipeline does before ``vae.decode``; then the compute dtype."""
        mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1, 1) for v in (self.config.latents_mean, self.config.latents_std))
        return (latents.astype(jnp.float32) * std + mean).astype(DTYPES[self.dtype])

    def decode_first(self, params: Params, latent: jax.Array) -> tuple[Frames, Cache]:
        """Latent frame 0 [1, 16, 1, h, w] (normalised) to uint8 [1, 8h, 8w, 3], and the cache for the next frame."""
        frames, raw = self._run(params, latent, [None] * self._slots, first=True)
        raw = [entry for entry in raw if entry is not None]  # stock reserves slots for shortcuts, which keep nothing
        # "Rep" and single frames become two frames with zeros on the left; their shapes are what frame 1 leaves there.
        _, left = jax.eval_shape(lambda p, z: self._run(p, z, raw, first=False), params, latent)
        cache = [jnp.zeros(s.shape, s.dtype) if isinstance(entry, str) else _two_frames(entry) for entry, s in zip(raw, left, strict=True)]
        return frames, self._constrain(cache)

    def decode_next(self, params: Params, latent: jax.Array, cache: Cache) -> tuple[Frames, Cache]:
        """Any later latent frame [1, 16, 1, h, w] to uint8 [4, 8h, 8w, 3], and the cache for the one after."""
        frames, entries = self._run(params, latent, cache, first=False)
        return frames, self._constrain([_two_frames(entry) for entry in entries])

    def _run(self, params: Params, latent: jax.Array, entries: list[Any], first: bool) -> tuple[Frames, list[Any]]:
        z = self.denormalise(latent)
        if self.mesh.size > 1:
            z = jax.lax.with_sharding_constraint(z, self.picture_sharding(*z.shape[3:]))
        pixels, left = call_module(self.module, params, z, entries, first)
        levels = jnp.clip(pixels.astype(jnp.float32) * 127.5 + 127.5, 0, 255)
        frames = jnp.round(levels).astype(jnp.uint8)[0].transpose(1, 2, 3, 0)
        return (frames, jnp.isfinite(pixels).all()), left

    def _constrain(self, cache: Cache) -> Cache:
        if self.mesh.size == 1:
            return cache
        return [jax.lax.with_sharding_constraint(entry, self.picture_sharding(*entry.shape[3:])) for entry in cache]

    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Decode ``latents`` [1, 16, F, h, w] (normalised, as stage 2 stores them), streaming.

        Yields uint8 [1, H, W, 3] for latent frame 0, then [4, H, W, 3] for each other. The next frame is already decoding
        while a chunk is in the caller's hands; memory does not grow with F.

        Raises:
            NumericalError: the VAE's output is not finite; names the latent frame.
        """
        assert self.params is not None, "load_vae_decoder gives a decoder with weights"
        pending: Frames | None = None
        cache: Cache = []
        for index in range(latents.shape[2]):
            latent = jnp.asarray(latents[:, :, index : index + 1])
            if index == 0:
                result, cache = self._first(self.params, latent)
            else:
                result, cache = self._next(self.params, latent, cache)
            if pending is not None:
                yield self._checked(pending, index - 1)
            pending = result
        if pending is not None:
            yield self._checked(pending, latents.shape[2] - 1)

    @staticmethod
    def _checked(result: Frames, index: int) -> np.ndarray:
        frames, finite = result
        if not bool(finite):
            raise NumericalError(f"VAE: latent frame {index} decoded to NaN or infinity; try --dtype float32, or check the weights")
        return np.asarray(jax.device_get(frames))

    def abstract_inputs(self, height: int, width: int) -> tuple[Params, jax.ShapeDtypeStruct, list[jax.ShapeDtypeStruct]]:
        """ShapeDtypeStructs of :meth:`decode_next`'s arguments for a video of ``height`` x ``width`` pixels."""
        params = abstract_params(self.plan)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        latent = jax.ShapeDtypeStruct((1, self.config.z_dim, 1, height // 8, width // 8), np.float32, sharding=replicated)
        _, cache = jax.eval_shape(self.decode_first, params, latent)
        placed = [jax.ShapeDtypeStruct(c.shape, c.dtype, sharding=self.picture_sharding(*c.shape[3:])) for c in cache]
        return params, latent, placed


def _two_frames(entry: jax.Array) -> jax.Array:
    """A cache entry with exactly two frames: one frame gets a zero frame (the causal padding) on its left."""
    missing = 2 - entry.shape[2]
    return jnp.pad(entry, ((0, 0), (0, 0), (missing, 0), (0, 0), (0, 0))) if missing else entry


def build_vae_decoder(config: dict[str, Any], mesh: Mesh, dtype: str = "bfloat16") -> VaeDecoder:
    """The decoder of an AutoencoderKLWan ``config`` on ``mesh``; no weights are touched.

    Raises:
        ArtifactError: a VAE of Wan 2.2 (residual), whose compression is another.
    """
    if config.get("is_residual") or (config.get("scale_factor_spatial") or 8) != 8:
        raise ArtifactError("vae: not a Wan 2.1 VAE (is_residual or another compression); choose a Wan 2.1 model with --model_id")
    vae = meta_module(lambda: AutoencoderKLWan.from_config(config))
    for parent in vae.decoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, WanUpsample):
                setattr(parent, name, NearestUpsample())
    module = _DecodeOnly(vae)
    suit_convolutions(module, mesh.devices.flat[0].platform)
    return VaeDecoder(module, vae.config, plan_weights(module, None, VAE_RULES, mesh, dtype), mesh, dtype)


def load_vae_decoder(model_dir: Path, dtype: str, mesh: Mesh) -> VaeDecoder:
    """:func:`build_vae_decoder` for the ``vae`` folder of a diffusers model, with its weights.

    Raises:
        ArtifactError: no usable VAE in ``model_dir``.
    """
    folder = model_dir / "vae"
    decoder = build_vae_decoder(read_config(folder, "AutoencoderKLWan"), mesh, dtype)
    decoder.params = load_weights(decoder.plan, folder, "VAE weights")
    return decoder
