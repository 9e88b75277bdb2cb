"""The VAE's causal convolutions on a CPU: convolutions of pictures, fewer of them by minimal filtering over time."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torchax.interop import jax_view, torch_view

# Winograd's minimal filtering F(m, 3) for m = 2 and 4 outputs: what to make of m + 2 inputs, of 3 taps, of their m + 2 products
# (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4; the same points).
MINIMAL_FILTERS: dict[int, tuple[tuple[tuple[float, ...], ...], ...]] = {
    2: (
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: (
        ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
        ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}  # fmt: skip


def _combine(rows: tuple[tuple[float, ...], ...], parts: list[jax.Array]) -> list[jax.Array]:
    """For each row, the sum of ``parts`` with its weights."""
    return [functools.reduce(operator.add, [part * weight for weight, part in zip(row, parts, strict=True) if weight]) for row in rows]


class PlanarConv3d(WanCausalConv3d):
    """A causal convolution as convolutions of pictures, for CPUs: there XLA runs those 1.6 times as fast (docs/LOG.md).

    One frame is the sum over the kernel's steps in time, without the frames that are not there yet (the causal padding). Two or four frames
    with their whole past take 4 or 6 convolutions instead of 6 or 12, by minimal filtering over time. All in float32, rounded once.
    """

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """[1, C, f, h, w], and the frames before it (two at most are used), to [1, C', f, h, w]."""
        steps, count = self.kernel_size[0], x.shape[2]
        before = min(cache_x.shape[2], steps - 1) if cache_x is not None else 0
        frames = jax_view(x if cache_x is None or not before else torch.cat([cache_x[:, :, -before:], x], dim=2))[0]
        planes, bias = frames.astype(jnp.float32), jax_view(self.bias).astype(jnp.float32)
        kernel = jax_view(self.weight).astype(jnp.float32).transpose(2, 3, 4, 1, 0)
        taps = [kernel[step] for step in range(steps)]
        if steps == 3 and before == 2 and count in MINIMAL_FILTERS:
            out = self._filter(planes, taps, count)
        else:
            out = self._add(planes, taps, count, steps - 1 - before)
        return torch_view((out + bias).astype(frames.dtype).transpose(3, 0, 1, 2)[None])

    def _convolve(self, frames: jax.Array, tap: jax.Array) -> jax.Array:
        """Frames [f, h, w, C], each by itself, to [f, h, w, C']. XLA has to pad: it takes four times as long over a padded picture."""
        down, across = int(self._padding[2]), int(self._padding[0])
        padding, layout = ((down, down), (across, across)), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(frames, tap, (1, 1), padding, dimension_numbers=layout)

    def _add(self, frames: jax.Array, taps: list[jax.Array], count: int, missing: int) -> jax.Array:
        """The sum over ``taps`` for frames [C, f, h, w]; ``missing`` frames on their left are zeros."""
        parts, pictures = [], frames.transpose(1, 2, 3, 0)
        for step, tap in enumerate(taps):
            start = step - missing  # the frame that this tap multiplies for the first output
            if start + count > 0:
                part = self._convolve(pictures[max(start, 0) : start + count], tap)
                parts.append(jnp.pad(part, ((max(-start, 0), 0), (0, 0), (0, 0), (0, 0))))
        return functools.reduce(operator.add, parts)

    def _filter(self, frames: jax.Array, taps: list[jax.Array], count: int) -> jax.Array:
        """The same for ``count`` + 2 frames, by minimal filtering."""
        of_frames, of_taps, of_products = MINIMAL_FILTERS[count]
        # One array, and cut only after the transposition: else XLA computes each sum within its transposition, at a third of the speed.
        mixed = jnp.concatenate(_combine(of_frames, jnp.split(frames, count + 2, axis=1)), axis=1).transpose(1, 2, 3, 0)
        products = [self._convolve(mixed[i : i + 1], tap) for i, tap in enumerate(_combine(of_taps, taps))]
        return jnp.concatenate(_combine(of_products, products))


def suit_convolutions(module: torch.nn.Module, platform: str) -> None:
    """Make the causal convolutions of ``module`` planar where ``platform`` is "cpu"; other compilers want them whole."""
    for part in module.modules():
        if platform == "cpu" and isinstance(part, WanCausalConv3d):
            part.__class__ = PlanarConv3d  # the same weights and attributes, another forward
