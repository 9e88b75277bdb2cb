"""Whole-clip forward passes of `AutoencoderKLWan`, for training.

Diffusers encodes and decodes chunk by chunk with a feature cache; every convolution is causal, so one pass over the
whole clip gives the same numbers (tests/test_demo_model.py compares them) and trains several times faster.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """`WanResample` over a whole clip `[B, C, T, H, W]`: the first frame never goes through a temporal convolution."""
    batch, channels, frames, height, width = x.shape
    if layer.mode == "upsample3d" and frames > 1:
        rest = layer.time_conv(x[:, :, 1:])
        rest = rest.unflatten(1, (2, channels)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], rest], 2)
    # Frames into the batch; with channels_last_3d memory this is a view.
    flat = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
    flat = layer.resample(flat)
    x = flat.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def encode(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of a clip `[B, 3, 4k+1, H, W]` in -1..1: mean and log variance, each `[B, 16, k+1, H/8, W/8]`."""
    encoder = vae.encoder
    x = encoder.conv_in(clip)
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clip `[B, 3, 4k+1, 8h, 8w]` (not clamped) from un-normalised latents `[B, 16, k+1, h, w]`."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for upsampler in block.upsamplers or ():
            x = _resample(upsampler, x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
