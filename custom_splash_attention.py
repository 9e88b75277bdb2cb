"""Flash attention for TPU in Pallas, exact for every input: config, kernel, wrapper and the block-size table.

What differs from the textbook online softmax is the order of work, not the result. The chain max -> exp2 -> rescale
between two matmuls starves the MXU (0.50-0.73 of the structural roofline on v6e, docs/KERNEL.md), so the inner loop
here knows its reference before it starts: after each block of keys the reference of every query moves to the exponent
of its running sum, and the next block is computed as exp2(score - reference) with no maximum, no rescaling and no
wait. That is exact unless one block raises a row's sum by more than 2**64; the sum itself says so (it passes the limit
or overflows), the state from before the block is still there, and the block is done again with the textbook recurrence.

Layout: scores are K.Q^T, [keys, queries], so that reductions over keys run over sublanes. log2(e) and the softmax scale
are folded into the query in fp32 and the product is kept as a sum of two bf16 numbers where the MXU is 256 deep (both
halves of the contraction are then in use, at no cost); elsewhere the fp32 scores are multiplied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2_E = math.log2(math.e)
HEAD_DIMS = (64, 128, 256)
# A step may raise a row's sum to this before it is done again. p <= 2**64 leaves p.v finite for |v| < 2**63.
SUM_LIMIT = 2.0**64
# Stands for minus infinity: exp2 of it is 0, and it never makes inf - inf.
MASKED = -1e30
# Keys whose maximum is the reference of the first step.
FIRST_KEYS = 256
# Keys of a tile when a step is done again; must divide every block_kv_compute_inner, so the least that is allowed.
REDO_KEYS = 128
# Queries of a chunk where one block holds all keys.
SHORT_QUERIES = 512
SHORT_KEYS = 1024

_Array = jax.Array | jax.ShapeDtypeStruct
_CONTRACT_LAST = (((1,), (1,)), ((), ()))  # [m, d] x [n, d] -> [m, n]
_CONTRACT_FIRST = (((0,), (0,)), ((), ()))  # [k, d] x [k, n] -> [d, n]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of the kernel, in tokens.

    block_q: queries a grid step holds; a multiple of 128.
    block_kv: keys a grid step reads from HBM; a multiple of block_kv_compute.
    block_kv_compute: keys of one K.Q^T matmul, issued before the previous tile's softmax; a multiple of the next.
    block_kv_compute_inner: keys of one exp2 and P.V matmul; a multiple of 128.
    """

    block_q: int
    block_kv: int
    block_kv_compute: int
    block_kv_compute_inner: int

    def __post_init__(self) -> None:
        if self.block_q <= 0 or self.block_q % 128:
            raise ValueError(f"block_q is {self.block_q}, wanted a positive multiple of 128")
        if self.block_kv_compute_inner <= 0 or self.block_kv_compute_inner % 128:
            raise ValueError(f"block_kv_compute_inner is {self.block_kv_compute_inner}, wanted a positive multiple of 128")
        if self.block_kv_compute <= 0 or self.block_kv_compute % self.block_kv_compute_inner:
            raise ValueError(
                f"block_kv_compute is {self.block_kv_compute}, wanted a positive multiple of "
                f"block_kv_compute_inner {self.block_kv_compute_inner}"
            )
        if self.block_kv <= 0 or self.block_kv % self.block_kv_compute:
            raise ValueError(f"block_kv is {self.block_kv}, wanted a positive multiple of block_kv_compute {self.block_kv_compute}")


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Everything static about one call; lengths are the real ones, arrays may be longer."""

    blocks: BlockSizes
    q_len: int
    kv_len: int
    head_dim: int
    scale: float  # softmax scale x log2(e): scores are in log2 units
    folding: str  # where the scale goes: "query" (fp32), "split" (two bf16 halves of the query) or "scores"
    window: int | None
    vmem_limit_bytes: int

    @property
    def precision(self) -> lax.Precision:
        # fp32 operands would otherwise be rounded to bf16 by the MXU.
        return lax.Precision.HIGHEST if self.folding == "query" else lax.Precision.DEFAULT

    @property
    def short(self) -> bool:
        """Whether one block holds all keys and the scores of a chunk of queries."""
        return self.window is None and self.kv_steps == 1 and self.kv_len <= SHORT_KEYS

    @property
    def kv_steps(self) -> int:
        return pl.cdiv(self.kv_len, self.blocks.block_kv)

    def prepare_query(self, q: jax.Array, first: jax.Array) -> jax.Array:
        """Queries [rows, D] from position `first` as the operand of :meth:`scores`; rows past q_len become zeros."""
        row = first + lax.broadcasted_iota(jnp.int32, q.shape, 0)
        q = jnp.where(row < self.q_len, q, jnp.zeros_like(q))
        if self.folding == "scores":
            return q
        scaled = q.astype(jnp.float32) * self.scale
        if self.folding == "query":
            return scaled
        high = scaled.astype(q.dtype)
        return jnp.concatenate([high, (scaled - high.astype(jnp.float32)).astype(q.dtype)], axis=1)

    def scores(self, k: jax.Array, q: jax.Array) -> jax.Array:
        """[keys, D] x prepared query -> fp32 scores [keys, block_q] in log2 units."""
        if self.folding == "split":
            k = jnp.concatenate([k, k], axis=1)
        s = lax.dot_general(k, q, _CONTRACT_LAST, precision=self.precision, preferred_element_type=jnp.float32)
        return s * self.scale if self.folding == "scores" else s

    def weighted(self, v: jax.Array, p: jax.Array) -> jax.Array:
        """[keys, D] x [keys, block_q] -> fp32 [D, block_q]."""
        return lax.dot_general(v, p.astype(v.dtype), _CONTRACT_FIRST, precision=self.precision, preferred_element_type=jnp.float32)


def _sublane_sums(p: jax.Array) -> jax.Array:
    """[8 n, block_q] -> [8, block_q]: adds of whole registers; the 8 rows are added once a step, not once a tile."""
    return p.reshape(p.shape[0] // 8, 8, p.shape[1]).sum(axis=0)


def _broadcast_row(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (8, x.shape[1]))


def _minus(s: jax.Array, reference: jax.Array) -> jax.Array:
    """s [8 n, block_q] - reference [8, block_q] whose rows are equal."""
    return (s.reshape(s.shape[0] // 8, 8, s.shape[1]) - reference[None]).reshape(s.shape)


def _online_tile(
    problem: _Problem, s: jax.Array, v: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The textbook recurrence for masked scores s [keys, block_q]; state is (reference, partial sums, accumulator)."""
    m, l, acc = state
    # Whole numbers, so that rescaling by exp2 of their difference is exact.
    m_new = jnp.maximum(m, _broadcast_row(jnp.ceil(s.max(axis=0, keepdims=True))))
    shrink = jnp.exp2(m - m_new)
    p = jnp.exp2(_minus(s, m_new))
    return m_new, l * shrink + _sublane_sums(p), acc * shrink[0:1] + problem.weighted(v, p)


def _finish(o_ref: Any, l: jax.Array, acc: jax.Array) -> None:
    o_ref[...] = (acc / l.sum(axis=0, keepdims=True)).T.astype(o_ref.dtype)


def _full_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, qs_ref: Any, m_ref: Any, l_ref: Any, acc_ref: Any, m0_ref: Any, l0_ref: Any,
    acc0_ref: Any, redo_ref: Any, *, problem: _Problem,
) -> None:  # fmt: skip
    """All keys for every query. Grid: (batch x heads, query blocks, key blocks).

    m_ref [8, block_q] is the reference of each query in log2 units (a whole number), l_ref [8, block_q] its sum over
    keys in 8 parts, acc_ref [D, block_q] its weighted values. m0_ref, l0_ref and acc0_ref keep the state from before
    the step: copying costs stores, of which there are plenty, where alternating between two halves of one scratch by
    the step's parity cost 12% (the compiler cannot tell the halves apart, and orders their loads and stores).
    """
    i, j = pl.program_id(1), pl.program_id(2)
    b, kv_len, last = problem.blocks, problem.kv_len, problem.kv_steps - 1

    @pl.when(j == 0)
    def _() -> None:
        q = problem.prepare_query(q_ref[...], i * b.block_q)
        qs_ref[...] = q
        first = min(b.block_kv_compute_inner, FIRST_KEYS, kv_len)
        rows = -(-first // 16) * 16
        s = problem.scores(k_ref[0:rows, :], q)
        if first < rows:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < first, s, MASKED)
        m_ref[...] = _broadcast_row(jnp.ceil(s.max(axis=0, keepdims=True)))
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(keys: int) -> None:
        """One step over the first `keys` rows of the block; the rows after them are not keys and may hold anything."""
        q = qs_ref[...]
        # The power of two that brings the largest part of the sum near 1 moves the reference; all of this is exact.
        bits = lax.bitcast_convert_type(l_ref[...].sum(axis=0, keepdims=True), jnp.int32)
        exponent = jnp.maximum((bits >> 23) - 127, 0)  # the sum is 0 before the first step
        shrink = _broadcast_row(lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32))
        m = m_ref[...] + _broadcast_row(exponent.astype(jnp.float32))
        l = l_ref[...] * shrink
        acc = acc_ref[...] * shrink[0:1]
        m0_ref[...], l0_ref[...], acc0_ref[...] = m, l, acc

        def rows_of(start: int, size: int) -> int:
            """Rows to compute of a tile of `size` that may reach past `keys`."""
            return min(_round_up(min(size, keys - start), 128), b.block_kv - start)

        def tile_scores(start: int) -> jax.Array:
            return problem.scores(k_ref[start : start + rows_of(start, b.block_kv_compute), :], q)

        starts = range(0, keys, b.block_kv_compute)
        s_next = tile_scores(0)
        for n, start in enumerate(starts):
            s = s_next
            if n + 1 < len(starts):
                s_next = tile_scores(starts[n + 1])
            for inner in range(start, min(start + b.block_kv_compute, keys), b.block_kv_compute_inner):
                rows = rows_of(inner, b.block_kv_compute_inner)
                part = _minus(s[inner - start : inner - start + rows, :], m)
                v = v_ref[inner : inner + rows, :]
                if inner + rows > keys:
                    part = jnp.where(lax.broadcasted_iota(jnp.int32, part.shape, 0) < keys - inner, part, MASKED)
                    v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 0) < keys - inner, v, jnp.zeros_like(v))
                p = jnp.exp2(part)
                l = l + _sublane_sums(p)
                acc = acc + problem.weighted(v, p)
        m_ref[...], l_ref[...], acc_ref[...] = m, l, acc
        # A sum of sums: NaN and infinity reach it, and it is within block_q of the largest.
        redo_ref[0] = jnp.where(jnp.sum(l) <= SUM_LIMIT, 0, 1)

    tail = kv_len - last * b.block_kv
    if tail == b.block_kv:
        step(b.block_kv)
    else:
        pl.when(j < last)(lambda: step(b.block_kv))
        pl.when(j == last)(lambda: step(tail))

    @pl.when(redo_ref[0] != 0)
    def _() -> None:
        q = qs_ref[...]
        m_ref[...], l_ref[...], acc_ref[...] = m0_ref[...], l0_ref[...], acc0_ref[...]
        size = min(b.block_kv_compute_inner, REDO_KEYS)

        def body(t: jax.Array, carry: None) -> None:
            start = pl.multiple_of(t * size, size)
            left = kv_len - j * b.block_kv - start
            s = problem.scores(k_ref[pl.ds(start, size), :], q)
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < left, s, MASKED)
            v = v_ref[pl.ds(start, size), :]
            v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 0) < left, v, jnp.zeros_like(v))
            state = _online_tile(problem, s, v, (m_ref[...], l_ref[...], acc_ref[...]))
            m_ref[...], l_ref[...], acc_ref[...] = state

        lax.fori_loop(0, b.block_kv // size, body, None)

    @pl.when(j == last)
    def _() -> None:
        _finish(o_ref, l_ref[...], acc_ref[...])


def _short_kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, *, problem: _Problem) -> None:
    """All keys in one block (cross-attention): the maximum is exact, nothing is carried. Grid: (batch x heads, queries).

    Independent chunks of queries keep the MXU busy while another chunk takes its softmax.
    """
    i = pl.program_id(1)
    size, keys = min(problem.blocks.block_q, SHORT_QUERIES), problem.kv_len
    rows = min(_round_up(keys, 128), problem.blocks.block_kv)
    k, v = k_ref[0:rows, :], v_ref[0:rows, :]
    if keys < rows:
        v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 0) < keys, v, jnp.zeros_like(v))

    def chunk_scores(start: int) -> jax.Array:
        first = i * problem.blocks.block_q + start
        return problem.scores(k, problem.prepare_query(q_ref[start : min(start + size, problem.blocks.block_q), :], first))

    starts = range(0, problem.blocks.block_q, size)
    s_next = chunk_scores(0)
    for n, start in enumerate(starts):
        s = s_next
        if n + 1 < len(starts):
            s_next = chunk_scores(starts[n + 1])
        if keys < rows:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < keys, s, MASKED)
        p = jnp.exp2(s - s.max(axis=0, keepdims=True))
        out = problem.weighted(v, p) / _sublane_sums(p).sum(axis=0, keepdims=True)
        o_ref[start : start + s.shape[1], :] = out.T.astype(o_ref.dtype)


def _window_range(i: Any, problem: _Problem) -> tuple[jax.Array, jax.Array]:
    """First and last key block that query block i can see."""
    b, w = problem.blocks, problem.window or 0
    first = jnp.maximum(i * b.block_q - w, 0) // b.block_kv
    return first, jnp.minimum((i * b.block_q + b.block_q - 1 + w) // b.block_kv, problem.kv_steps - 1)


def _window_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, qs_ref: Any, m_ref: Any, l_ref: Any, acc_ref: Any, *, problem: _Problem
) -> None:
    """Keys with |i - j| <= window. Grid: (batch x heads, query blocks, key blocks a query block can see)."""
    i, step = pl.program_id(1), pl.program_id(2)
    b = problem.blocks
    first, last = _window_range(i, problem)
    j = first + step

    @pl.when(step == 0)
    def _() -> None:
        qs_ref[...] = problem.prepare_query(q_ref[...], i * b.block_q)
        m_ref[...] = jnp.full(m_ref.shape, MASKED, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(j <= last)
    def _() -> None:
        q = qs_ref[...]
        size = b.block_kv_compute_inner

        def body(t: jax.Array, carry: None) -> None:
            start = pl.multiple_of(t * size, size)
            s = problem.scores(k_ref[pl.ds(start, size), :], q)
            key = j * b.block_kv + start + lax.broadcasted_iota(jnp.int32, s.shape, 0)
            query = i * b.block_q + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            seen = (key < problem.kv_len) & (jnp.abs(key - query) <= (problem.window or 0))
            v = v_ref[pl.ds(start, size), :]
            row = j * b.block_kv + start + lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(row < problem.kv_len, v, jnp.zeros_like(v))
            # A row that has seen no key yet counts masked ones at exp2(0); its first real key shrinks them to zero.
            state = _online_tile(problem, jnp.where(seen, s, MASKED), v, (m_ref[...], l_ref[...], acc_ref[...]))
            m_ref[...], l_ref[...], acc_ref[...] = state

        lax.fori_loop(0, b.block_kv // size, body, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        _finish(o_ref, l_ref[...], acc_ref[...])


def _call(query: jax.Array, key: jax.Array, value: jax.Array, problem: _Problem, interpret: bool) -> jax.Array:
    """query [N, >= q_len, heads x D], key and value [M, >= kv_len, kv_heads x D] -> the shape of query.

    Either N = M x group and there is one head, or N = M.
    """
    b, d = problem.blocks, problem.head_dim
    heads, kv_heads = query.shape[2] // d, key.shape[2] // d
    group = query.shape[0] // key.shape[0] * heads // kv_heads
    q_steps = pl.cdiv(problem.q_len, b.block_q)
    f32 = jnp.float32
    if problem.window is None:
        # A fresh partial each call: jax 0.10 has an open bug with one kernel object under several grids.
        kernel, kv_steps = functools.partial(_full_kernel, problem=problem), problem.kv_steps

        def kv_block(i: Any, j: Any) -> Any:
            return j
    else:
        kernel = functools.partial(_window_kernel, problem=problem)
        kv_steps = max(int(last) - int(first) + 1 for first, last in (_window_bounds(i, problem) for i in range(q_steps)))

        def kv_block(i: Any, j: Any) -> Any:
            first, last = _window_range(i, problem)
            return jnp.minimum(first + j, last)

    def kv_index(h: Any, i: Any, j: Any = 0) -> tuple:
        return h // (group * kv_heads), kv_block(i, j), h // group % kv_heads

    rows = b.block_q
    state = [pltpu.VMEM((8, rows), f32), pltpu.VMEM((8, rows), f32), pltpu.VMEM((d, rows), f32)]
    scratch = [pltpu.VMEM((rows, d * (2 if problem.folding == "split" else 1)), query.dtype), *state]
    if problem.window is None:
        scratch += [*state, pltpu.SMEM((1,), jnp.int32)]
    grid: tuple[int, ...] = (query.shape[0] * heads, q_steps, kv_steps)
    if problem.short:
        kernel, grid, scratch = functools.partial(_short_kernel, problem=problem), grid[:2], []
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, rows, d), lambda h, i, *j: (h // heads, i, h % heads)),
            pl.BlockSpec((None, b.block_kv, d), kv_index),
            pl.BlockSpec((None, b.block_kv, d), kv_index),
        ],
        out_specs=pl.BlockSpec((None, rows, d), lambda h, i, *j: (h // heads, i, h % heads)),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary") if problem.short else ("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=problem.vmem_limit_bytes,
        ),
        interpret=interpret,
        name="splash_attention",
    )(query, key, value)


def _window_bounds(i: int, problem: _Problem) -> tuple[int, int]:
    b, w = problem.blocks, problem.window or 0
    first = max(i * b.block_q - w, 0) // b.block_kv
    return first, min((i * b.block_q + b.block_q - 1 + w) // b.block_kv, problem.kv_steps - 1)


def chip_name() -> str:
    """Chip that the surrounding trace compiles for: v4, v5e, v5p, v6e or tpu7x.

    Inside ``jax.set_mesh`` of a described topology that is the topology's chip, else the first device's.
    Raises ValueError where that is no TPU.
    """
    version = str(pltpu.get_tpu_info().chip_version)
    return {"7x": "tpu7x", "7": "tpu7x"}.get(version, version)


def _checked_chip(chip: str) -> str:
    if chip not in _CHIPS:
        raise ValueError(f"chip is {chip!r}, wanted one of {', '.join(_CHIPS)}")
    return chip


@dataclasses.dataclass(frozen=True)
class _Chip:
    mxu_depth: int  # rows of the systolic array: what one pass contracts
    vmem_limit_bytes: int  # what the kernel may use of a core's vector memory; the compiler's default is 16 MiB


# Depths and capacities as jax.experimental.pallas.tpu.get_tpu_info lists them; the limit leaves the compiler its share.
_CHIPS = {
    "v4": _Chip(128, 15 * 2**20),
    "v5e": _Chip(128, 110 * 2**20),
    "v5p": _Chip(128, 56 * 2**20),
    "v6e": _Chip(256, 110 * 2**20),
    "tpu7x": _Chip(256, 56 * 2**20),
}

# Long rows of keys: the best of a search by static cycles of the whole grid at 75,600 tokens (docs/KERNEL.md).
_TABLE = {
    "v4": BlockSizes(1024, 2048, 1024, 512),
    "v5e": BlockSizes(1024, 8192, 1024, 1024),
    "v5p": BlockSizes(512, 8192, 1024, 1024),
    "v6e": BlockSizes(2048, 4096, 1024, 1024),
    "tpu7x": BlockSizes(1024, 8192, 512, 512),
}
# Rows of keys that fit one block; v4 has 16 MiB of vector memory.
_SHORT_TABLE = {chip: BlockSizes(1024 if chip == "v4" else 4096, SHORT_KEYS, SHORT_KEYS, SHORT_KEYS) for chip in _CHIPS}
# Not searched: float32 is for checking, its matmuls take six passes and its blocks twice the memory.
_FLOAT32 = BlockSizes(512, 1024, 256, 256)


def default_block_sizes(chip: str, length: int, head_dim: int = 128, kv_length: int | None = None, dtype: Any = jnp.bfloat16) -> BlockSizes:
    """Block sizes of the table for a chip and lengths.

    Args:
        chip: v4, v5e, v5p, v6e or tpu7x.
        length: queries on a device.
        head_dim: 64, 128 or 256; the table was searched for 128.
        kv_length: keys; None is as many as queries.
        dtype: of query, key and value.

    Raises:
        ValueError: unknown chip.
    """
    kv_length = length if kv_length is None else kv_length
    blocks = (_SHORT_TABLE if kv_length <= SHORT_KEYS else _TABLE)[_checked_chip(chip)]
    if head_dim > 128 and kv_length > SHORT_KEYS:  # as many bytes a block of keys as the searched ones
        blocks = dataclasses.replace(blocks, block_kv=max(blocks.block_kv // 2, blocks.block_kv_compute))
    if jnp.dtype(dtype) == jnp.float32:
        blocks = _FLOAT32
    # As few query blocks as the table's, but even ones: a last block of a few queries costs as much as a full one.
    rows = pl.cdiv(length, pl.cdiv(length, blocks.block_q))
    blocks = dataclasses.replace(blocks, block_q=min(blocks.block_q, _round_up(rows, 256)))
    return fit_block_sizes(blocks, length, kv_length)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def fit_block_sizes(blocks: BlockSizes, q_len: int, kv_len: int) -> BlockSizes:
    """The same tiles cut down to arrays that are shorter than they are."""
    inner = min(blocks.block_kv_compute_inner, _round_up(kv_len, 128))
    compute = min(blocks.block_kv_compute // inner * inner, _round_up(kv_len, inner))
    kv = min(blocks.block_kv // compute * compute, _round_up(kv_len, compute))
    return BlockSizes(min(blocks.block_q, _round_up(q_len, 128)), kv, compute, inner)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_sizes: BlockSizes | None = None,
    scale: float | None = None,
    window_size: int | None = None,
    k_smooth: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * query . key^T) . value.

    Args:
        query: [batch, heads, q_length, head_dim] float32 or bfloat16.
        key, value: [batch, kv_heads, kv_length, head_dim], the query's dtype; heads must be a multiple of kv_heads, and
            query head h attends to kv head h // (heads / kv_heads).
        block_sizes: tiles; None takes the table's for the chip that is compiled for. Tiles longer than the arrays are
            cut to them.
        scale: of the scores; None is head_dim ** -0.5.
        window_size: query i sees the keys j with |i - j| <= window_size; None is all keys.
        k_smooth: subtract the mean key first. A constant added to all keys moves every score of a query alike, so the
            result is the same; the rounding of p to bf16 isn't touched, that of the scores is smaller.
        interpret: run the kernel's Python on any backend (tests) instead of compiling it for TPU.

    Returns:
        [batch, heads, q_length, head_dim] in the query's dtype; sums and products accumulate in float32.

    Raises:
        ValueError: shapes, dtypes or settings that the kernel doesn't support; says what was found and wanted.
    """
    _check(query, key, value, window_size)
    if k_smooth:
        key = (key - key.mean(axis=2, keepdims=True, dtype=jnp.float32)).astype(key.dtype)
    q_len, kv_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    problem = _problem(query.dtype, q_len, kv_len, head_dim, block_sizes, scale, window_size, interpret)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    return _call(q, k, v, problem, interpret).reshape(query.shape)


def splash_attention_merged(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    head_dim: int,
    kv_length: int | None = None,
    block_sizes: BlockSizes | None = None,
    window_size: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """:func:`splash_attention` over [batch, length, heads x head_dim], as projections leave it: nothing is transposed.

    Args:
        query, key, value: float32 or bfloat16, [batch, length, features]; head h is features h x head_dim and on.
        head_dim: a multiple of 128 (a head's features are whole lanes).
        kv_length: how many keys count, from the first; the rows after them may hold anything.

    Returns:
        [batch, q_length, heads x head_dim] in the query's dtype.

    Raises:
        ValueError: shapes, dtypes or settings that the kernel doesn't support.
    """
    if head_dim % 128 or query.shape[2] % head_dim:
        raise ValueError(f"head_dim is {head_dim} of {query.shape[2]} features, wanted a multiple of 128 that divides them")
    kv_len = key.shape[1] if kv_length is None else kv_length
    if not 0 < kv_len <= key.shape[1]:
        raise ValueError(f"kv_length is {kv_length}, wanted 1 to the {key.shape[1]} keys given")
    q, k, v = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2] // head_dim, n, head_dim), x.dtype)
        for x, n in ((query, query.shape[1]), (key, kv_len), (value, kv_len))
    )
    _check(q, k, v, window_size)
    problem = _problem(query.dtype, query.shape[1], kv_len, head_dim, block_sizes, None, window_size, interpret)
    return _call(query, key, value, problem, interpret)


def _problem(
    dtype: jnp.dtype, q_len: int, kv_len: int, head_dim: int, block_sizes: BlockSizes | None, scale: float | None,
    window_size: int | None, interpret: bool,
) -> _Problem:  # fmt: skip
    chip = "v6e" if interpret else _checked_chip(chip_name())
    if block_sizes is None:
        block_sizes = default_block_sizes(chip, q_len, head_dim, kv_len, dtype)
    if dtype == jnp.float32:
        folding = "query"
    else:
        # A 256-deep MXU contracts both halves in the pass that 128 would half fill.
        folding = "split" if 2 * head_dim == _CHIPS[chip].mxu_depth else "scores"
    return _Problem(
        blocks=fit_block_sizes(block_sizes, q_len, kv_len),
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        scale=(head_dim**-0.5 if scale is None else float(scale)) * LOG2_E,
        folding=folding,
        window=window_size,
        vmem_limit_bytes=_CHIPS[chip].vmem_limit_bytes,
    )


def _check(query: _Array, key: _Array, value: _Array, window_size: int | None) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            f"query, key, value are {query.shape}, {key.shape}, {value.shape}; wanted [batch, heads, length, head_dim] "
            "with key and value alike"
        )
    if query.dtype not in (jnp.float32, jnp.bfloat16) or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; wanted all float32 or all bfloat16")
    batch, heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key is {key.shape}, wanted batch {batch} and head_dim {head_dim} as the query {query.shape}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, wanted one of {HEAD_DIMS}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads and key {key.shape[1]}; wanted a multiple")
    if q_len == 0 or key.shape[2] == 0:
        raise ValueError(f"lengths are {q_len} queries and {key.shape[2]} keys, wanted at least 1 of each")
    if window_size is not None:
        if window_size < 0:
            raise ValueError(f"window_size is {window_size}, wanted None or at least 0")
        if q_len - 1 - window_size > key.shape[2] - 1:
            raise ValueError(
                f"window_size is {window_size} with {q_len} queries and {key.shape[2]} keys: query {q_len - 1} would "
                f"see no key; wanted at least {q_len - key.shape[2]}"
            )
