"""What runs on a TPU, interpreted on CPU: the norm and RoPE kernel, the written-out exchange, the whole step on meshes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demo_model.build import ModelSizes
from tests.tiny_models import DEFAULTS, build_tiny
from wan_common.attention import AttentionOptions, Prepare, merged_attention, self_attention_layout
from wan_common.denoiser import Capture, build_denoiser, halves_permutation, read_config
from wan_common.latents import draw_noise
from wan_common.mesh import MeshShape, make_mesh
from wan_common.rope_kernel import norm_rope, rope_tables
from wan_common.scheduler import initial_state, load_scheduler, step_table

HEAD_DIM = 128  # what the kernels are made for
WIDE = ModelSizes(
    text_dim=48, text_layers=1, text_heads=4, text_head_dim=12, text_ffn=64, heads=6, head_dim=HEAD_DIM, layers=2, ffn=96, freq_dim=32,
    vae_base_dim=4,
)  # fmt: skip
HEIGHT, WIDTH, FRAMES = 48, 80, 5  # 30 tokens: no mesh of eight divides them


def angles(length: int) -> tuple[np.ndarray, np.ndarray]:
    """RoPE's cosine and sine [S, D / 2]."""
    theta = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)[None]
    return np.cos(theta), np.sin(theta)


def expected(x: np.ndarray, weight: np.ndarray | None, rotate: bool, groups: int, eps: float = 1e-6) -> np.ndarray:
    """RMSNorm and RoPE in float64, as diffusers writes them: pairs interleaved; then the order the kernel works in."""
    batch, length, features = x.shape
    heads = features // HEAD_DIM
    x = x.astype(np.float64)
    if weight is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    if rotate:
        cos, sin = angles(length)
        pairs = x.reshape(batch, length, heads, HEAD_DIM // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        cos, sin = cos[None, :, None], sin[None, :, None]
        x = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(batch, length, features)
    x = x[..., halves_permutation(heads, HEAD_DIM)]
    return x.reshape(batch, length, groups, features // groups).swapaxes(1, 2)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("length", "heads", "groups"), [(300, 6, 3), (16, 2, 1), (517, 4, 4)])  # 256 tokens a grid step
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_norm_rope(dtype: jnp.dtype, tolerance: float, length: int, heads: int, groups: int, normed: bool, rotate: bool) -> None:
    random = np.random.default_rng(length)
    x = np.asarray(jnp.asarray(random.standard_normal((2, length, heads * HEAD_DIM)), dtype).astype(jnp.float32))
    weight = random.uniform(0.5, 1.5, heads * HEAD_DIM).astype(np.float32) if normed else None
    order = halves_permutation(heads, HEAD_DIM)  # the rows of to_q, to_k and their norms are permuted at load time
    cos, sin = (np.repeat(t, 2, axis=-1)[None, :, None].astype(np.float32) for t in angles(length))
    out = norm_rope(
        jnp.asarray(x[..., order], dtype), head_dim=HEAD_DIM, weight=None if weight is None else jnp.asarray(weight[order]),
        eps=1e-6 if normed else None, tables=rope_tables(jnp.asarray(cos), jnp.asarray(sin)) if rotate else None, groups=groups,
        interpret=True,
    )  # fmt: skip
    wanted = expected(x, weight, rotate, groups)
    assert out.dtype == dtype and out.shape == wanted.shape
    assert np.abs(np.asarray(out, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("head_dim", "groups"), [(96, 1), (128, 4)])
def test_norm_rope_refuses(head_dim: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim is {head_dim} and groups {groups} of 768 features, wanted a multiple of 128"):
        norm_rope(jnp.zeros((1, 16, 768)), head_dim=head_dim, groups=groups, interpret=True)


def test_a_window_needs_whole_sequences() -> None:
    mesh = make_mesh(MeshShape(1, 8, 1))  # six heads do not divide by eight: queries are split
    x = jnp.zeros((1, 64, 6 * HEAD_DIM))
    tables = rope_tables(jnp.ones((1, 64, 1, HEAD_DIM)), jnp.zeros((1, 64, 1, HEAD_DIM)))
    with pytest.raises(ValueError, match="window_size needs whole sequences on a device: choose a mesh whose tp \\* sp divides"):
        merged_attention(
            x, x, x, AttentionOptions("splash", window_size=8, interpret=True), mesh, self_attention_layout(mesh, 1, 6),
            head_dim=HEAD_DIM, prepare=(Prepare(None, 1e-6),) * 2, tables=tables, kv_length=64,
        )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("wide") / "wide", sizes=WIDE)


def one_step(model: Path, shape: MeshShape, options: AttentionOptions, capture: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Latents after a guided step in fp32, and the maps of two words."""
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    denoiser = build_denoiser(
        read_config(model / "transformer", "WanTransformer3DModel"), mesh, height=HEIGHT, width=WIDTH, frames=FRAMES,
        text_length=DEFAULTS["max_sequence_length"], dtype="float32", fsdp=True, options=options,
        capture=Capture(per_head=True, per_block=True) if capture else None,
    )  # fmt: skip
    random = np.random.default_rng(0)
    prompt, negative = random.standard_normal((2, 1, *denoiser.text_shape)).astype(np.float32)
    prompt[:, 9:], negative[:, 1:] = 0, 0
    groups = np.zeros((2, denoiser.text_shape[0], 2), np.float32)
    groups[:, 3, 0] = groups[:, 5:7, 1] = 1
    table = step_table(load_scheduler(model / "scheduler", 3.0), 2)
    state = denoiser.put_state(initial_state(draw_noise(denoiser.latent_shape, 5), table.order))
    state, info = denoiser.jitted()(
        denoiser.load(model / "transformer"), state, denoiser.put_embeds(prompt, negative), np.int32(table.timesteps[0]),
        np.float32(5), denoiser.rows(table, 0), jnp.asarray(groups) if capture else None,
    )  # fmt: skip
    return np.asarray(state["sample"]), None if info["maps"] is None else np.asarray(info["maps"])


@pytest.mark.parametrize(
    "shape",
    [MeshShape(2, 2, 1), MeshShape(2, 1, 2), MeshShape(1, 8, 1), MeshShape(2, 2, 2), MeshShape(1, 2, 3), MeshShape(2, 1, 4)],
    ids=str,
)  # Ulysses over sp; heads over tp; six heads on eight devices; both; all six split; tp that does not divide
def test_the_step_equals_xla(shape: MeshShape, model: Path, plain: tuple[np.ndarray, np.ndarray]) -> None:
    latents, maps = one_step(model, shape, AttentionOptions("splash", interpret=True), capture=True)
    assert np.linalg.norm(latents - plain[0]) / np.linalg.norm(plain[0]) <= 1e-5
    assert maps is not None and maps.shape == plain[1].shape
    assert np.abs(maps - plain[1]).max() <= 1e-5 and plain[1].max() > 0.01


@pytest.fixture(scope="module")
def plain(model: Path) -> tuple[np.ndarray, np.ndarray]:
    latents, maps = one_step(model, MeshShape(), AttentionOptions("xla"), capture=True)
    assert maps is not None
    return latents, maps


def test_options_reach_the_kernel(model: Path, plain: tuple[np.ndarray, np.ndarray]) -> None:
    """K smoothing changes nothing; a window of four tokens changes the result, alike on both paths."""
    smooth, _ = one_step(model, MeshShape(2, 2, 1), AttentionOptions("splash", k_smooth=True, interpret=True))
    assert np.linalg.norm(smooth - plain[0]) / np.linalg.norm(plain[0]) <= 1e-5
    narrow, _ = one_step(model, MeshShape(2, 2, 1), AttentionOptions("splash", window_size=4, interpret=True))
    by_xla, _ = one_step(model, MeshShape(), AttentionOptions("xla", window_size=4))
    assert np.linalg.norm(narrow - by_xla) / np.linalg.norm(by_xla) <= 1e-5
    assert np.linalg.norm(narrow - plain[0]) / np.linalg.norm(plain[0]) > 1e-4
