"""Which attention runs where: the layout of heads and sequence over the mesh, the XLA path, and the splash kernel on TPU.

Queries, keys and values are [batch, heads, length, head_dim] throughout this file.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from wan_common.sharding import constrain, divisible_axes

logger = logging.getLogger("attention")

# The largest tile of fp32 scores that the XLA path holds at once on a device; longer queries are taken in chunks.
SCORES_BYTES = 64 * 2**20  # measured on 2 CPU cores, 1,280 tokens: 16 to 128 MiB read alike, all scores at once 1.3x slower


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How self-attention is computed.

    Attributes:
        kernel: "splash" (the Pallas kernel) or "xla".
        block_q, block_kv, block_kv_compute: the kernel's blocks; None takes the table of its chip and length.
        window_size: keys further than this from the query are left out (None: all keys); changes the result.
        k_smooth: subtract the mean key: softmax does not change, logits get smaller.
        interpret: run the kernel interpreted (tests on CPU).
    """

    kernel: str = "xla"
    block_q: int | None = None
    block_kv: int | None = None
    block_kv_compute: int | None = None
    window_size: int | None = None
    k_smooth: bool = False
    interpret: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes over which heads and queries are split; keys and values always span the whole sequence."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    queries: tuple[str, ...]

    @property
    def query_spec(self) -> PartitionSpec:
        """PartitionSpec of queries and output."""
        return PartitionSpec(self.batch or None, self.heads or None, self.queries or None, None)

    @property
    def key_spec(self) -> PartitionSpec:
        """PartitionSpec of keys and values."""
        return PartitionSpec(self.batch or None, self.heads or None, None, None)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """RMSNorm over all features before attention: [features] weight and eps; no weight: already done."""

    weight: jax.Array | None
    eps: float


def self_attention_layout(mesh: Mesh, batch: int, heads: int) -> Layout:
    """Long self-attention: by heads over tp and sp (Ulysses all-to-all for sp); what does not divide splits the queries."""
    for candidate in (("tp", "sp"), ("tp",), ("sp",)):
        chosen = tuple(axis for axis in candidate if mesh.shape[axis] > 1)
        if divisible_axes(chosen, heads, mesh) == chosen:
            break
    else:
        chosen = ()
    rest = tuple(axis for axis in ("sp", "tp") if mesh.shape[axis] > 1 and axis not in chosen)
    return Layout(divisible_axes(("dp",), batch, mesh), chosen, rest)


def cross_attention_layout(mesh: Mesh, batch: int, heads: int) -> Layout:
    """Short cross-attention: where the projections leave it, heads over tp if they divide, queries over the rest: nothing moves."""
    chosen = divisible_axes(("tp",), heads, mesh)
    rest = tuple(axis for axis in ("sp", "tp") if mesh.shape[axis] > 1 and axis not in chosen)
    return Layout(divisible_axes(("dp",), batch, mesh), chosen, rest)


def reference_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float | None = None, window_size: int | None = None,
    offset: jax.Array | int = 0,
) -> jax.Array:  # fmt: skip
    """Dense softmax attention with fp32 scores: softmax(q k^T * scale) v; ``offset`` is the position of the first query."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    if window_size is not None:
        distance = jnp.arange(query.shape[2])[:, None] + offset - jnp.arange(key.shape[2])[None]
        scores = jnp.where(jnp.abs(distance) <= window_size, scores, -jnp.inf)
    # The division comes after the product with the values: it is over [q, d] instead of [q, k].
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (out / total).astype(query.dtype)


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float | None = None, window_size: int | None = None
) -> jax.Array:
    """:func:`reference_attention`, queries in chunks so that the scores of one chunk fit :data:`SCORES_BYTES`."""
    batch, heads, length, dim = query.shape
    row = 4 * batch * heads * key.shape[2]
    chunks = -(-length * row // SCORES_BYTES)
    if chunks <= 1:
        return reference_attention(query, key, value, scale=scale, window_size=window_size)
    size = -(-length // chunks)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, chunks * size - length), (0, 0)))
    pieces = padded.reshape(batch, heads, chunks, size, dim).transpose(2, 0, 1, 3, 4)

    def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        piece, offset = args
        return reference_attention(piece, key, value, scale=scale, window_size=window_size, offset=offset)

    out = jax.lax.map(one, (pieces, jnp.arange(chunks) * size))
    return out.transpose(1, 2, 0, 3, 4).reshape(batch, heads, chunks * size, dim)[:, :, :length]


def token_axes(mesh: Mesh, layout: Layout) -> tuple[str, ...]:
    """Mesh axes over which tokens are split before and after attention, outermost first: all that heads do not take there."""
    return (*layout.queries, *(("sp",) if "sp" in layout.heads else ()))


def merged_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, options: AttentionOptions, mesh: Mesh, layout: Layout, *,
    head_dim: int, prepare: tuple[Prepare, ...], tables: tuple[jax.Array, jax.Array] | None, kv_length: int | None,
) -> jax.Array:  # fmt: skip
    """Splash attention over [B, S, features], as projections leave it: no transpose, and only the collectives written here.

    Left to constraints, the partitioner gathered whole sequences to transpose them (docs/LOG.md: 79M cycles a block on
    v6e-8 against 50M). With ``sp`` among ``layout.heads`` it is Ulysses: features against tokens, once before and once after.

    Args:
        query: [B, S, features]; key, value: the same for self-attention (``tables`` given), else whole [B, T, features].
        prepare: RMSNorm of query and key (:class:`Prepare`).
        tables: RoPE (rope_kernel.rope_tables) [S, head_dim], or None for cross-attention.
        kv_length: keys that count, from the first (None: all).

    Returns:
        [B, S, features], tokens split as those of ``query``.
    """
    from custom_splash_attention import BlockSizes, splash_attention_merged
    from wan_common.rope_kernel import norm_rope

    sequence, ulysses = token_axes(mesh, layout), "sp" in layout.heads and tables is not None
    features = "tp" if "tp" in layout.heads else None
    tokens = PartitionSpec(layout.batch or None, sequence or None, features)
    keys = tokens if tables is not None else PartitionSpec(layout.batch or None, None, features)
    groups = mesh.shape["sp"] if ulysses else 1
    blocks = None
    if options.block_q is not None and tables is not None:
        assert options.block_kv is not None and options.block_kv_compute is not None
        blocks = BlockSizes(options.block_q, options.block_kv, options.block_kv_compute, options.block_kv_compute)

    def exchange(x: jax.Array) -> jax.Array:
        """[B, groups, S / sp, features / groups] -> [B, S, features / groups]."""
        if groups > 1:
            x = jax.lax.all_to_all(x, "sp", 1, 1, tiled=True)
        return x.reshape(x.shape[0], -1, x.shape[3])

    def local(q: jax.Array, k: jax.Array, v: jax.Array, norms: list[jax.Array | None], tables: Any) -> jax.Array:
        q, k = (
            norm_rope(x, head_dim=head_dim, weight=w, eps=None if w is None else p.eps, tables=tables, groups=groups,
                      interpret=options.interpret)
            for x, w, p in zip((q, k), norms, prepare, strict=True)
        )  # fmt: skip
        batch, length, width = v.shape
        v = v.reshape(batch, length, groups, width // groups).swapaxes(1, 2)
        q, k, v = exchange(q), exchange(k), exchange(v)
        if tables is not None and layout.queries:
            k, v = (jax.lax.all_gather(x, layout.queries, axis=1, tiled=True) for x in (k, v))
        if options.k_smooth and tables is not None:
            k = k - k[:, :kv_length].mean(axis=1, keepdims=True, dtype=jnp.float32).astype(k.dtype)
        out = splash_attention_merged(
            q, k, v, head_dim=head_dim, kv_length=kv_length, block_sizes=blocks, interpret=options.interpret,
            window_size=options.window_size if tables is not None else None,
        )  # fmt: skip
        if groups > 1:
            out = out.reshape(batch, groups, -1, out.shape[2])
            out = jax.lax.all_to_all(out, "sp", 1, 1, tiled=True).swapaxes(1, 2).reshape(batch, -1, width)
        return out

    if options.window_size is not None and layout.queries and tables is not None:
        raise ValueError("window_size needs whole sequences on a device: choose a mesh whose tp * sp divides the heads")
    norms = [p.weight for p in prepare]
    table = PartitionSpec(sequence or None, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(tokens, keys, keys, [PartitionSpec()] * 2, None if tables is None else (table, table)),
        out_specs=tokens, check_vma=False,
    )(query, key, value, norms, tables)  # fmt: skip


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, options: AttentionOptions, mesh: Mesh, layout: Layout
) -> jax.Array:
    """Attention over the mesh. The length of ``query`` must divide by the devices of ``layout.queries`` (the caller pads).

    Args:
        query: [B, H, S, D]; key, value: [B, H, T, D] with no padding: every key counts.

    Returns:
        [B, H, S, D] in the dtype of ``query``.
    """
    query = constrain(query, mesh, layout.batch, layout.heads, layout.queries, None)
    key, value = (constrain(x, mesh, layout.batch, layout.heads, None, None) for x in (key, value))
    if options.k_smooth:
        key = key - key.mean(axis=2, keepdims=True, dtype=jnp.float32).astype(key.dtype)
    if options.kernel == "xla":
        out = xla_attention(query, key, value, window_size=options.window_size)
    else:
        from custom_splash_attention import BlockSizes, splash_attention

        blocks = None
        if options.block_q is not None:
            assert options.block_kv is not None and options.block_kv_compute is not None
            blocks = BlockSizes(options.block_q, options.block_kv, options.block_kv_compute, options.block_kv_compute)
        if options.window_size is not None and layout.queries:
            raise ValueError("window_size needs whole sequences on a device: choose a mesh whose tp * sp divides the heads")
        kernel = functools.partial(
            splash_attention, block_sizes=blocks, window_size=options.window_size, interpret=options.interpret
        )
        out = jax.shard_map(
            kernel, mesh=mesh, in_specs=(layout.query_spec, layout.key_spec, layout.key_spec),
            out_specs=layout.query_spec, check_vma=False,
        )(query, key, value)  # fmt: skip
    return constrain(out, mesh, layout.batch, layout.heads, layout.queries, None)
