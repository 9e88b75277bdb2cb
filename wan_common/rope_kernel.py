"""What stands between a query or key projection and attention, as one Pallas pass over memory: RMSNorm, RoPE, grouping.

XLA needs five passes for it on a TPU (two for the norm, three for the rotation, whose halves of 64 features fill half a
register), and two more to bring the features of each all-to-all partner together (docs/LOG.md: 10M of 79M cycles a block).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from custom_splash_attention import chip_name

LANES = 128
ROWS = 256  # tokens a grid step: 2.5 MiB of a 14B projection, so that the pipeline's copies hide the grid's overhead
VMEM_BYTES = 48 * 2**20
SMALL_ROWS, SMALL_VMEM_BYTES = 64, 15 * 2**20  # v4 has 16 MiB of vector memory


def _kernel(  # fmt: skip
    x_ref: Any, weight_ref: Any, cos_ref: Any, sin_ref: Any, o_ref: Any, *, eps: float | None, head_dim: int, rotate: bool
) -> None:
    """One block of tokens [rows, features] to [groups, rows, features / groups]."""
    x = x_ref[...]
    features = x.shape[1]
    if eps is not None:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.sum(wide * wide, axis=1, keepdims=True) / features + eps)
    group = o_ref.shape[2]
    for start in range(0, features, head_dim):
        head = x[:, start : start + head_dim].astype(jnp.float32)
        if eps is not None:
            # The norm's output is rounded before it is rotated, as diffusers does.
            weight = weight_ref[:, start : start + head_dim].astype(jnp.float32)
            head = (head * inverse * weight).astype(o_ref.dtype).astype(jnp.float32)
        if rotate:
            head = head * cos_ref[...] + pltpu.roll(head, head_dim // 2, 1) * sin_ref[...]
        at = start % group
        o_ref[start // group, :, at : at + head_dim] = head.astype(o_ref.dtype)


def block_rows(chip: str) -> int:
    """Tokens of a grid step on ``chip``."""
    return SMALL_ROWS if chip == "v4" else ROWS


def rope_tables(cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """diffusers' tables [1, S, 1, D], every value twice, as :func:`norm_rope` wants them: [S, D] fp32, by halves, sine signed."""
    cos, sin = cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def norm_rope(
    x: jax.Array,
    *,
    head_dim: int,
    weight: jax.Array | None = None,
    eps: float | None = None,
    tables: tuple[jax.Array, jax.Array] | None = None,
    groups: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """RMSNorm over all features, then RoPE on each head, the features split into groups of whole heads.

    Args:
        x: [B, S, heads x head_dim]; each head's RoPE pairs lie in halves (denoiser.halves_permutation).
        head_dim: a multiple of 128.
        weight, eps: of the norm; None leaves it out.
        tables: from :func:`rope_tables`; None leaves the rotation out.
        groups: divides the heads.

    Returns:
        [B, groups, S, features / groups] in the dtype of ``x``.

    Raises:
        ValueError: ``head_dim`` is no multiple of 128, or ``groups`` does not divide the heads.
    """
    batch, length, features = x.shape
    if head_dim % LANES or features % (head_dim * groups):
        raise ValueError(f"head_dim is {head_dim} and groups {groups} of {features} features, wanted a multiple of {LANES} and whole heads")
    chip = "interpreted" if interpret else chip_name()
    limit = SMALL_VMEM_BYTES if chip == "v4" else VMEM_BYTES
    rows = min(block_rows(chip), -(-length // 16) * 16)
    if weight is None:
        weight = jnp.ones((features,), x.dtype)
    cos, sin = tables if tables is not None else (jnp.zeros((8, head_dim), jnp.float32),) * 2
    table = (
        pl.BlockSpec((rows, head_dim), lambda b, i: (i, 0)) if tables is not None
        else pl.BlockSpec((8, head_dim), lambda b, i: (0, 0))
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps, head_dim=head_dim, rotate=tables is not None),
        grid=(batch, pl.cdiv(length, rows)),
        in_specs=[
            pl.BlockSpec((None, rows, features), lambda b, i: (b, i, 0)),
            pl.BlockSpec((1, features), lambda b, i: (0, 0)), table, table,
        ],
        out_specs=pl.BlockSpec((None, groups, rows, features // groups), lambda b, i: (b, 0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, groups, length, features // groups), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit),
        interpret=interpret,
        name="norm_rope" if tables is not None else "norm",
    )(x, weight.reshape(1, -1), cos.astype(jnp.float32), sin.astype(jnp.float32))  # fmt: skip
