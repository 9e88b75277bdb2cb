"""The same numbers on any mesh: seed 004 left an inconsistency of exactly this kind unsolved."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_models import DEFAULTS, TINY, build_tiny
from wan_common.attention import self_attention_layout
from wan_common.denoiser import Denoiser, build_denoiser, read_config
from wan_common.errors import UsageError
from wan_common.latents import draw_noise
from wan_common.mesh import MeshShape, choose_mesh_shape, make_mesh, picture_mesh_shape, prepare_jax
from wan_common.scheduler import initial_state, load_scheduler, step_table
from wan_common.vae import load_vae_decoder

RELATIVE_L2 = 1e-4  # issue 2; observed 8e-7: fp32 sums are split differently
STEPS = 2
HEIGHT, WIDTH, FRAMES = 48, 80, 5  # 2 x 3 x 5 = 30 tokens: no mesh of eight divides them, so padding is in play
# Issue 2's list, as (dp, tp, sp), and how twelve heads are laid out on each.
MESHES = {(1, 1, 1): 1, (2, 4, 1): 4, (1, 8, 1): 1, (2, 2, 2): 4, (1, 1, 8): 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare_jax()  # the compilation cache
    return build_tiny(tmp_path_factory.mktemp("mesh") / "tiny")


def build(model: Path, shape: MeshShape, fsdp: bool) -> Denoiser:
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    config = read_config(model / "transformer", "WanTransformer3DModel")
    return build_denoiser(
        config, mesh, height=HEIGHT, width=WIDTH, frames=FRAMES, text_length=DEFAULTS["max_sequence_length"], dtype="float32", fsdp=fsdp
    )  # fmt: skip


def denoise(model: Path, shape: MeshShape, fsdp: bool) -> np.ndarray:
    """Latents after STEPS guided steps; embeddings are random with zeros past a length, as stage 1 leaves them."""
    denoiser = build(model, shape, fsdp)
    random = np.random.default_rng(0)
    prompt, negative = random.standard_normal((2, 1, *denoiser.text_shape)).astype(np.float32)
    prompt[:, 9:], negative[:, 1:] = 0, 0
    table = step_table(load_scheduler(model / "scheduler", 3.0), STEPS)
    state = denoiser.put_state(initial_state(draw_noise(denoiser.latent_shape, 5), table.order))
    params, embeds, step = denoiser.load(model / "transformer"), denoiser.put_embeds(prompt, negative), denoiser.jitted()
    for i in range(STEPS):
        state, info = step(params, state, embeds, np.int32(table.timesteps[i]), np.float32(5), denoiser.rows(table, i), None)
        assert bool(info["finite"])
    assert step._cache_size() == 1
    return np.asarray(state["sample"])


@pytest.fixture(scope="module")
def on_one_device(model: Path) -> np.ndarray:
    return denoise(model, MeshShape(), fsdp=False)


@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "fsdp"])
@pytest.mark.parametrize("dp_tp_sp", list(MESHES)[1:], ids=str)
def test_latents_agree(dp_tp_sp: tuple[int, int, int], fsdp: bool, model: Path, on_one_device: np.ndarray) -> None:
    dp, tp, sp = dp_tp_sp
    shape = MeshShape(dp=dp, sp=sp, tp=tp)
    latents = denoise(model, shape, fsdp)
    distance = np.linalg.norm(latents - on_one_device) / np.linalg.norm(on_one_device)
    logging.info("%s: %.1e", shape, distance)
    assert distance <= RELATIVE_L2
    layout = self_attention_layout(make_mesh(shape), 2, TINY.heads)
    assert int(np.prod([make_mesh(shape).shape[axis] for axis in layout.heads], initial=1)) == MESHES[dp_tp_sp]


def test_one_device_with_fsdp_is_the_same_program(model: Path, on_one_device: np.ndarray) -> None:
    np.testing.assert_array_equal(denoise(model, MeshShape(), fsdp=True), on_one_device)


def test_weights_are_really_split(model: Path) -> None:
    """A mesh that only replicates would pass the tests above."""
    name, whole = "blocks.*.attn1.to_q.weight", (3, 144, 144)
    for shape, fsdp, wanted in [
        (MeshShape(2, 1, 4), False, (3, 36, 144)), (MeshShape(2, 1, 4), True, (3, 36, 72)), (MeshShape(1, 8, 1), True, (3, 144, 18)),
        (MeshShape(2, 2, 2), True, (3, 72, 36)), (MeshShape(1, 8, 1), False, whole),
    ]:  # fmt: skip
        weight = build(model, shape, fsdp).plan[name].struct
        assert weight.shape == whole
        assert weight.sharding.shard_shape(weight.shape) == wanted, (shape, fsdp)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(32, 64, 1, 8), (64, 48, 4, 2), (96, 96, 2, 4), (64, 56, 8, 1)]
)  # fmt: skip
def test_vae_agrees(model: Path, height: int, width: int, rows: int, columns: int) -> None:
    latents = np.random.default_rng(1).standard_normal((1, 16, 2, height // 8, width // 8)).astype(np.float32)
    decoded = []
    for devices in (1, 8):
        shape = picture_mesh_shape(devices, height // 8, width // 8)
        decoder = load_vae_decoder(model, "float32", make_mesh(shape, jax.devices()[:devices]))
        decoded.append(np.concatenate(list(decoder.decode(latents))))
        if devices == 8:
            split = decoder.picture_sharding(height // 8, width // 8).shard_shape((1, 16, 1, height // 8, width // 8))
            assert split[3:] == (height // 8 // rows, width // 8 // columns)
    one, eight = decoded
    assert one.shape == (5, height, width, 3) and one.std() > 1
    difference = np.abs(one.astype(int) - eight.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # only where fp32 sums fall on either side of a half


@pytest.mark.parametrize(
    ("devices", "height", "width", "wanted"),
    [
        (8, 480, 832, MeshShape(1, 8, 1)), (16, 480, 832, MeshShape(1, 8, 2)), (16, 720, 1280, MeshShape(1, 16, 1)),
        (8, 832, 480, MeshShape(1, 4, 2)), (6, 96, 96, MeshShape(1, 6, 1)), (5, 96, 96, MeshShape(5, 1, 1)), (1, 96, 96, MeshShape()),
        (16, 96, 96, MeshShape(1, 4, 4)), (32, 480, 832, MeshShape(1, 8, 4)), (64, 480, 832, MeshShape(2, 8, 4)),
    ],
)  # fmt: skip
def test_the_vaes_mesh(devices: int, height: int, width: int, wanted: MeshShape) -> None:
    assert picture_mesh_shape(devices, height // 8, width // 8) == wanted


@pytest.mark.parametrize(
    ("devices", "batch", "given", "wanted"),
    [
        (8, 2, {}, MeshShape(2, 4, 1)), (8, 1, {}, MeshShape(1, 8, 1)), (8, 2, {"use_dp": False}, MeshShape(1, 8, 1)),
        (8, 2, {"tp": 4}, MeshShape(2, 1, 4)), (8, 2, {"sp": 2}, MeshShape(2, 2, 2)), (1, 2, {}, MeshShape(1, 1, 1)),
        (8, 2, {"dp": 1, "sp": 2}, MeshShape(1, 2, 4)), (3, 2, {}, MeshShape(1, 3, 1)),
    ],
)  # fmt: skip
def test_choice_of_mesh(devices: int, batch: int, given: dict[str, int], wanted: MeshShape) -> None:
    assert choose_mesh_shape(devices, batch, **given) == wanted


@pytest.mark.parametrize(
    ("devices", "batch", "given", "message"),
    [
        (8, 2, {"tp": 3}, "--tp 3: does not divide the 8 devices"), (8, 1, {"dp": 2}, "--dp 2: the batch has 1 row"),
        (8, 2, {"dp": 2, "tp": 4, "sp": 2}, "make 16 devices, 8 were found"), (8, 2, {"sp": 0}, "does not divide"),
        (8, 2, {"tp": 8}, "--tp 8"),
    ],
)  # fmt: skip
def test_impossible_meshes_are_refused(devices: int, batch: int, given: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_mesh_shape(devices, batch, **given)


def test_bf16_latents_agree_in_kind(model: Path) -> None:
    """bf16 weights take the same path: embeddings are cast, the solver's memory stays fp32."""
    mesh = make_mesh(MeshShape(2, 2, 2))
    config = read_config(model / "transformer", "WanTransformer3DModel")
    denoiser = build_denoiser(config, mesh, height=32, width=32, frames=1, text_length=8, dtype="bfloat16", fsdp=True)
    kept = {name for name, weight in denoiser.plan.items() if weight.struct.dtype == np.float32}
    wanted = {"scale_shift_table", "blocks.*.scale_shift_table", "blocks.*.norm2.weight", "condition_embedder.time_embedder.linear_1.bias"}
    assert wanted <= kept
    assert denoiser.plan["blocks.*.attn1.to_q.weight"].struct.dtype == jnp.bfloat16
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(denoiser.abstract_inputs(2)[1]))
