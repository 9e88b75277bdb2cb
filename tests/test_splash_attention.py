"""The kernel, interpreted on CPU, against a dense softmax in float64 (and what a dense float32 softmax errs itself)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import custom_splash_attention as csa
from custom_splash_attention import BlockSizes, default_block_sizes, splash_attention, splash_attention_merged

BLOCKS = BlockSizes(128, 512, 256, 128)

# Largest |error| / max |v| allowed, one bound a dtype for ordinary and adversarial inputs alike.
#   float32: |logit| 1e4 is 14,427 in log2 units, where the spacing of float32 is 0.001: 7e-4 of a weight. Every float32
#     softmax has it (the dense one errs alike, docs/KERNEL.md). The bound of ordinary logits is FLOAT32_ORDINARY.
#   bfloat16: the output is rounded by up to 2**-8 of max |v|, p before P.V by 2**-9 of itself.
# Observed (docs/KERNEL.md lists every case): float32 ordinary 1.1e-6, |logit| 1e4 1.2e-4; bfloat16 3.8e-3 in all.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-3}
FLOAT32_ORDINARY = 2e-6


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    q_len: int
    kv_len: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 128
    window: int | None = None
    k_smooth: bool = False
    blocks: BlockSizes | None = BLOCKS
    logits: str = "normal"
    scale: float | None = None


CASES = [
    Case("divides", 256, 1024),
    Case("divides nothing", 200, 1301),
    Case("one key", 5, 1),
    Case("one block of keys", 131, 77),
    Case("one long block of keys", 130, 1100, blocks=BlockSizes(128, 2048, 512, 256)),
    Case("tail of a few keys", 128, 1027),
    Case("q longer than kv", 700, 515),
    Case("gqa", 130, 700, heads=6, kv_heads=2),
    Case("mqa", 130, 700, heads=4, kv_heads=1),
    Case("head_dim 64", 200, 1301, head_dim=64),
    Case("head_dim 256", 130, 700, head_dim=256),
    Case("window", 600, 600, window=70),
    Case("window 0", 200, 200, window=0),
    Case("window gqa, longer q", 300, 260, heads=4, window=41),
    Case("window wider than all", 200, 530, window=5000),
    Case("k_smooth", 200, 1301, k_smooth=True),
    Case("scale", 130, 700, scale=0.31),
    Case("seed blocks cut to the arrays", 300, 900, blocks=BlockSizes(3328, 2816, 256, 256)),
    Case("default blocks", 140, 1500, blocks=None),
]
ADVERSARIAL = [
    Case("logits 1e4", 130, 1301, logits="1e4"),
    Case("logits 1e4, short", 130, 77, logits="1e4"),
    Case("logits 1e4, window", 300, 300, logits="1e4", window=60),
    Case("one huge key late", 130, 1301, logits="huge key"),
    Case("huge keys, ever larger", 130, 2101, logits="staircase"),
    Case("equal logits", 130, 1301, logits="equal"),
    Case("equal logits of 1e4", 130, 1301, logits="equal 1e4"),
    Case("tiny and huge norms mixed", 256, 1301, logits="norms"),
    Case("first keys far below the rest", 130, 1301, logits="low start"),
    Case("first keys far above the rest", 130, 1301, logits="high start"),
    Case("all far below zero", 130, 1301, logits="below"),
]


def inputs(case: Case, dtype: str) -> list[jax.Array]:
    """q, k, v [1, heads, length, head_dim] of a case, rounded to its dtype."""
    rng = np.random.default_rng(sum(map(ord, case.name)))
    q = rng.standard_normal((1, case.heads, case.q_len, case.head_dim))
    k = rng.standard_normal((1, case.kv_heads, case.kv_len, case.head_dim))
    v = rng.standard_normal(k.shape)
    if case.logits == "1e4":  # the largest of q.k / sqrt(d) becomes 1e4
        q *= 1e4 / np.abs(q @ k.swapaxes(-1, -2) / math.sqrt(case.head_dim)).max()
    elif case.logits == "huge key":  # 800 nats above the others for half of the queries, 800 below for the rest
        q = np.abs(q) * np.where(np.arange(case.q_len) % 2, 1, -1)[:, None]
        k[..., 1200, :] = 100
    elif case.logits == "staircase":
        q = np.abs(q)
        for n, at in enumerate(range(100, case.kv_len, 130)):
            k[..., at, :] = 12.0 * n
    elif case.logits == "equal":
        k[:] = k[..., :1, :]
    elif case.logits == "equal 1e4":
        q, k = np.full_like(q, 32.0), np.full_like(k, 27.625)
    elif case.logits == "norms":
        q *= 10.0 ** rng.uniform(-6, 2, q.shape[:3])[..., None]
        k *= 10.0 ** rng.uniform(-6, 2, k.shape[:3])[..., None]
    elif case.logits in ("low start", "high start"):
        q = np.abs(q)
        k[..., :300, :] -= 40 if case.logits == "low start" else -40
    elif case.logits == "below":
        q, k = np.abs(q), -np.abs(k) * 60
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def dense(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, precision: type) -> np.ndarray:
    """softmax(scale q k^T) v with every step in `precision`."""
    q, k, v = (np.asarray(x.astype(jnp.float32)).astype(precision) for x in (q, k, v))
    k, v = (np.repeat(x, case.heads // case.kv_heads, axis=1) for x in (k, v))
    s = (q @ k.swapaxes(-1, -2)) * precision(case.head_dim**-0.5 if case.scale is None else case.scale)
    if case.window is not None:
        distance = np.arange(case.q_len)[:, None] - np.arange(case.kv_len)
        s = np.where(np.abs(distance) <= case.window, s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)) @ v


def run(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    out = splash_attention(
        q, k, v, block_sizes=case.blocks, scale=case.scale, window_size=case.window, k_smooth=case.k_smooth, interpret=True
    )
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out.astype(jnp.float32))


def observe(case: Case, dtype: str) -> tuple[float, float]:
    """Largest error of the kernel and of a dense float32 softmax, over max |v|."""
    q, k, v = inputs(case, dtype)
    exact = dense(case, q, k, v, np.float64)
    unit = float(jnp.abs(v.astype(jnp.float32)).max())
    return np.abs(run(case, q, k, v) - exact).max() / unit, np.abs(dense(case, q, k, v, np.float32) - exact).max() / unit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_dense_softmax(case: Case, dtype: str) -> None:
    error, _ = observe(case, dtype)
    # K smoothing rounds k - mean(k) to the keys' dtype once more.
    assert error <= (FLOAT32_ORDINARY if dtype == "float32" else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ADVERSARIAL, ids=lambda c: c.name)
def test_exact_for_adversarial_logits(case: Case, dtype: str) -> None:
    error, _ = observe(case, dtype)
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["one huge key late", "huge keys, ever larger", "first keys far below the rest"])
def test_steps_that_outgrow_their_reference_are_done_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in ADVERSARIAL if c.name == name)
    q, k, v = inputs(case, "float32")
    assert np.isfinite(run(case, q, k, v)).all()
    monkeypatch.setattr(csa, "SUM_LIMIT", math.nan)  # nothing is within it: every step is done again
    assert np.abs(run(case, q, k, v) - dense(case, q, k, v, np.float64)).max() < 1e-3
    monkeypatch.setattr(csa, "SUM_LIMIT", math.inf)  # an infinite sum passes: without the second try it reaches the output
    assert not np.isfinite(run(case, q, k, v)).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("divides nothing", "one block of keys", "window")], ids=lambda c: c.name)
def test_padding_may_hold_anything(case: Case) -> None:
    """Arrays longer than the lengths they hold, as blocks in vector memory are: NaN in every padded place."""
    for dtype in ("float32", "bfloat16"):
        q, k, v = inputs(case, dtype)
        problem = csa._Problem(
            blocks=BLOCKS, q_len=case.q_len, kv_len=case.kv_len, head_dim=case.head_dim, scale=0.125,
            folding="query" if dtype == "float32" else "split", window=case.window, vmem_limit_bytes=2**24,
        )  # fmt: skip

        def call(fill: float) -> np.ndarray:
            padded = (
                jnp.pad(x[0], ((0, 0), (0, -x.shape[2] % 512), (0, 0)), constant_values=fill)  # noqa: B023
                for x in (q, k, v)  # noqa: B023
            )
            return np.asarray(csa._call(*padded, problem, True)[:, : case.q_len].astype(jnp.float32))  # noqa: B023

        zeros = call(0.0)
        assert np.isfinite(zeros).all()
        np.testing.assert_array_equal(call(math.nan), zeros)


def test_neutral_settings_change_nothing() -> None:
    case = CASES[1]
    q, k, v = inputs(case, "bfloat16")
    plain = run(case, q, k, v)
    np.testing.assert_array_equal(run(dataclasses.replace(case, scale=case.head_dim**-0.5), q, k, v), plain)
    # Two bf16 halves of the query (256-deep arrays) or fp32 scores multiplied (128-deep): the same to float32's rounding.
    chips = {chip: csa._CHIPS[chip] for chip in csa._CHIPS}
    assert {c.mxu_depth for c in chips.values()} == {128, 256}


def test_k_smoothing_changes_only_rounding() -> None:
    case = Case("k_smooth offset", 130, 1301, k_smooth=True)
    q, k, v = inputs(case, "float32")
    k = k + 3.0
    assert np.abs(run(case, q, k, v) - dense(case, q, k, v, np.float64)).max() < 1e-5


def test_nan_in_real_inputs_reaches_the_output() -> None:
    q, k, v = inputs(CASES[1], "float32")
    assert np.isnan(run(CASES[1], q, k.at[0, 0, 700, 3].set(math.nan), v)[0, 0]).all()


def test_runs_under_shard_map_over_heads_and_queries() -> None:
    case = Case("sharded", 256, 700, heads=4, kv_heads=4)
    q, k, v = inputs(case, "float32")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("heads", "queries"))
    query, keys = PartitionSpec(None, "heads", "queries"), PartitionSpec(None, "heads")
    sharded = jax.shard_map(
        lambda q, k, v: splash_attention(q, k, v, block_sizes=BLOCKS, interpret=True),
        mesh=mesh, in_specs=(query, keys, keys), out_specs=query, check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(sharded)(q, k, v), run(case, q, k, v), atol=1e-6)


def test_merged_heads_are_the_same_heads() -> None:
    """[batch, length, heads x head_dim] against [batch, heads, length, head_dim], rows after kv_length holding NaN."""
    case = Case("merged", 130, 700, heads=4)
    q, k, v = inputs(case, "bfloat16")
    merged = [x.swapaxes(1, 2).reshape(1, x.shape[2], -1) for x in (q, k, v)]
    padded = [jnp.pad(x, ((0, 0), (0, 60), (0, 0)), constant_values=math.nan) for x in merged[1:]]
    out = splash_attention_merged(merged[0], *padded, head_dim=128, kv_length=700, block_sizes=BLOCKS, interpret=True)
    apart = np.asarray(out.astype(jnp.float32)).reshape(1, 130, 4, 128).swapaxes(1, 2)
    np.testing.assert_array_equal(apart, run(case, q, k, v))
    with pytest.raises(ValueError, match="head_dim is 96 of 512 features"):
        splash_attention_merged(merged[0], *merged[1:], head_dim=96, interpret=True)
    with pytest.raises(ValueError, match="kv_length is 701, wanted 1 to the 700 keys given"):
        splash_attention_merged(merged[0], *merged[1:], head_dim=128, kv_length=701, interpret=True)


def shaped(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((shaped(4, 64, 128),) * 3, {}, "wanted \\[batch, heads, length, head_dim\\]"),
        ((shaped(1, 2, 8, 128), shaped(1, 2, 8, 128), shaped(1, 2, 9, 128)), {}, "with key and value alike"),
        ((shaped(1, 2, 8, 96),) * 3, {}, "head_dim is 96, wanted one of"),
        ((shaped(1, 3, 8, 128), shaped(1, 2, 8, 128), shaped(1, 2, 8, 128)), {}, "query has 3 heads and key 2"),
        ((shaped(1, 2, 8, 128), shaped(2, 2, 8, 128), shaped(2, 2, 8, 128)), {}, "wanted batch 1"),
        ((shaped(1, 2, 8, 128, dtype="float16"),) * 3, {}, "float16.*wanted all float32 or all bfloat16"),
        ((shaped(1, 2, 8, 128), *(shaped(1, 2, 8, 128, dtype="bfloat16"),) * 2), {}, "wanted all float32 or all"),
        ((shaped(1, 2, 8, 128), shaped(1, 2, 0, 128), shaped(1, 2, 0, 128)), {}, "0 keys, wanted at least 1"),
        ((shaped(1, 2, 8, 128),) * 3, {"window_size": -1}, "window_size is -1"),
        ((shaped(1, 2, 80, 128), shaped(1, 2, 8, 128), shaped(1, 2, 8, 128)), {"window_size": 9}, "wanted at least 72"),
    ],
)
def test_unsupported_settings_raise(arguments: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splash_attention(*arguments, block_sizes=BLOCKS, interpret=True, **settings)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 512, 256, 256), "block_q is 100, wanted a positive multiple of 128"),
        ((128, 512, 256, 100), "block_kv_compute_inner is 100"),
        ((128, 512, 384, 256), "block_kv_compute is 384, wanted a positive multiple of block_kv_compute_inner 256"),
        ((128, 700, 256, 256), "block_kv is 700, wanted a positive multiple of block_kv_compute 256"),
        ((128, 0, 256, 256), "block_kv is 0"),
    ],
)
def test_impossible_block_sizes_raise(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSizes(*sizes)


def test_default_blocks_name_the_chips() -> None:
    for chip in csa._CHIPS:
        for length in (75600, 32760, 512):
            assert isinstance(default_block_sizes(chip, 75600, 128, length), BlockSizes)
    with pytest.raises(ValueError, match="chip is 'v3', wanted one of v4, v5e, v5p, v6e, tpu7x"):
        default_block_sizes("v3", 75600)
