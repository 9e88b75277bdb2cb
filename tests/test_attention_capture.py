"""Capture: the chunked softmax mass against a dense fp32 softmax in torch, and the choice of words."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wan_common.attention_maps import (
    AttentionSettings,
    Target,
    VisualizationParams,
    groups_matrix,
    select_targets,
    special_targets,
    token_attention,
)
from wan_common.errors import ArtifactError, UsageError

# case: bound (observed): why. fp32 products summed in another order; scores reach +-40, so exp amplifies their rounding.
FP32_BOUND = 1e-5  # 1.8e-6
BF16_BOUND = 2e-5  # 1.9e-6 against torch on the same bf16 values: products of bf16 are exact in fp32
TARGETS = [Target("a", (1, 2), "a"), Target("b", (4,), "b")]


def dense(query: np.ndarray, key: np.ndarray, groups: np.ndarray, scale: float | None = None) -> np.ndarray:
    """[B, H, G, S] by the textbook: the whole softmax, in torch."""
    q, k = torch.tensor(query).float(), torch.tensor(key).float()
    weights = torch.softmax(q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5), dim=-1)
    return (weights @ torch.tensor(groups)).transpose(-1, -2).numpy()


def inputs(batch: int = 2, heads: int = 8, queries: int = 96, keys: int = 37, dim: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(batch, heads, queries, dim)).astype(np.float32) * 3
    key = rng.normal(size=(batch, heads, keys, dim)).astype(np.float32) * 3
    return query, key, groups_matrix(TARGETS, 9, keys)


@pytest.mark.parametrize("chunk", [1, 7, 32, 96, 1024], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("queries", [1, 96, 97])
def test_equals_dense_softmax_for_every_chunking(queries: int, chunk: int) -> None:
    query, key, groups = inputs(queries=queries)
    found = np.asarray(token_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(groups), query_chunk=chunk))
    assert found.shape == (2, 8, 5, queries) and found.dtype == np.float32
    np.testing.assert_allclose(found, dense(query, key, groups), atol=FP32_BOUND, rtol=0)
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=1e-5)


def test_mean_over_heads_and_own_scale() -> None:
    query, key, groups = inputs()
    found = token_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(groups), average_heads=True, scale=0.1, query_chunk=40)
    np.testing.assert_allclose(np.asarray(found), dense(query, key, groups, 0.1).mean(axis=1), atol=FP32_BOUND, rtol=0)


def test_bf16_inputs_are_accumulated_in_fp32() -> None:
    query, key, groups = inputs()
    q, k = jnp.asarray(query, jnp.bfloat16), jnp.asarray(key, jnp.bfloat16)
    found = np.asarray(token_attention(q, k, jnp.asarray(groups)))
    want = dense(np.asarray(q, np.float32), np.asarray(k, np.float32), groups)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=BF16_BOUND, rtol=0)


def test_own_groups_for_each_batch_row() -> None:
    query, key, groups = inputs()
    other = groups_matrix([Target("x", (0,), "x"), Target("y", (5, 6, 7), "y")], 12, key.shape[2])
    found = np.asarray(token_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(np.stack([groups, other]))))
    np.testing.assert_allclose(found[0], dense(query, key, groups)[0], atol=FP32_BOUND, rtol=0)
    np.testing.assert_allclose(found[1], dense(query, key, other)[1], atol=FP32_BOUND, rtol=0)


def test_scores_far_apart_do_not_overflow() -> None:
    query, key, groups = inputs()
    found = np.asarray(token_attention(jnp.asarray(query * 100), jnp.asarray(key * 100), jnp.asarray(groups)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("shard", ["heads", "sequence"])
def test_sharded_over_eight_devices_keeps_chunks_local(shape: tuple[int, int], shard: str) -> None:
    query, key, groups = inputs(batch=8)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("dp", "tp"))
    ways = shape[1]
    spec = P("dp", "tp") if shard == "heads" else P("dp", None, "tp")
    options = {"head_shards": ways} if shard == "heads" else {"query_shards": ways}
    place = [NamedSharding(mesh, spec), NamedSharding(mesh, P("dp", "tp") if shard == "heads" else P("dp")), NamedSharding(mesh, P())]
    step = jax.jit(lambda q, k, g: token_attention(q, k, g, query_chunk=5, average_heads=True, **options), in_shardings=place)
    found = np.asarray(step(query, key, groups))
    np.testing.assert_allclose(found, dense(query, key, groups).mean(axis=1), atol=FP32_BOUND, rtol=0)
    # Nothing but one sum over the head shards may cross devices, whatever the number of chunks.
    text = step.lower(query, key, groups).compile().as_text()
    counts = {name: len(re.findall(rf"= \S+ {name}\(", text)) for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute")}
    assert counts == {"all-reduce": int(shard == "heads" and ways > 1), "all-gather": 0, "all-to-all": 0, "collective-permute": 0}


def test_never_holds_the_whole_score_matrix() -> None:
    query, key, groups = inputs(batch=1, heads=4, queries=4096, keys=256)
    memory = jax.jit(lambda q, k, g: token_attention(q, k, g, query_chunk=64)).lower(query, key, groups).compile().memory_analysis()
    scores = 4 * 4096 * 256 * 4
    assert memory.temp_size_in_bytes < scores / 4  # observed 0.12 of it: a padded copy of the queries and one chunk


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, groups = inputs()
    with pytest.raises(ValueError, match="T = 37 keys"):
        token_attention(query, key, groups[:5])
    with pytest.raises(ValueError, match="not divisible"):
        token_attention(query, key, groups, query_shards=7)
    with pytest.raises(ValueError, match="must agree"):
        token_attention(query, key[:, :3], groups)


# ---------------------------------------------------------------------------------------------------------------- targets


def words(*entries: tuple[str, list[int]], marked: tuple[int, ...] = (), spaced: bool = True) -> list[dict]:
    result, position = [], 0
    for number, (text, tokens) in enumerate(entries):
        result.append({"word": text, "span": [position, position + len(text)], "tokens": tokens, "target": number in marked})
        position += len(text) + spaced
    return result


PROMPT = words(("A", [0]), ("Red", [1]), ("skateboarder", [2, 3, 4]), ("on", [5]), ("a", [6]), ("red", [7]), ("circle.", [8, 9]))


def names(targets: list[Target]) -> dict[str, tuple[int, ...]]:
    return {target.name: target.token_indices for target in targets}


def test_all_words_with_repeats_and_pieces() -> None:
    assert names(select_targets(PROMPT, 11)) == {
        "A": (0,), "Red": (1,), "skateboarder": (2, 3, 4), "on": (5,), "a#2": (6,), "red#2": (7,), "circle.": (8, 9),
    }  # fmt: skip


def test_marked_words_come_first_then_the_given() -> None:
    marked = [dict(word, target=number == 5) for number, word in enumerate(PROMPT)]
    assert list(names(select_targets(marked, 11))) == ["red#2"]
    assert list(names(select_targets(marked, 11, ["skateboarder", "RED#2"]))) == ["red#2", "skateboarder"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("red", {"Red": (1,)}),
        ("RED#2", {"red#2": (7,)}),
        ("circle", {"circle.": (8, 9)}),
        ("red  circle", {"red circle.": (7, 8, 9)}),
        ("Red Skateboarder", {"Red skateboarder": (1, 2, 3, 4)}),
    ],
)
def test_asking_for_words_and_phrases(asked: str, found: dict[str, tuple[int, ...]]) -> None:
    assert names(select_targets(PROMPT, 11, [asked])) == found


def test_scripts_without_spaces() -> None:
    chinese = words(("红", [0]), ("色", [1]), ("圆圈", [2, 3]), ("和", [4]), ("红", [5]), ("色", [6]), spaced=False)
    assert names(select_targets(chinese, 8, ["红色"])) == {"红色": (0, 1)}
    assert names(select_targets(chinese, 8, ["红色#2"])) == {"红色#2": (5, 6)}
    assert names(select_targets(chinese, 8, ["圆圈"])) == {"圆圈": (2, 3)}
    assert select_targets(chinese, 8, ["圆圈"])[0].folder == "圆圈"


def test_words_that_share_a_token_count_once() -> None:
    shared = words(("红", [0]), ("色", [0]), ("圆", [1]), ("圈", [1, 2]), spaced=False)
    assert names(select_targets(shared, 4)) == {"红色": (0,), "圆圈": (1, 2)}
    assert names(select_targets(shared, 4, ["红色"])) == {"红色": (0,)}
    np.testing.assert_array_equal(groups_matrix(select_targets(shared, 4), 4, 6).sum(axis=1), 1)


def test_a_hash_that_the_prompt_itself_has() -> None:
    assert names(select_targets(words(("c", [0]), ("c#2", [1])), 3, ["c#2"])) == {"c#2": (1,)}


@pytest.mark.parametrize("asked", ["dog", "red#3", "circle red", "skate", ""])
def test_a_word_that_is_not_there_lists_those_that_are(asked: str) -> None:
    with pytest.raises(UsageError, match="its words are: A, Red, skateboarder, on, a#2, red#2, circle") as caught:
        select_targets(PROMPT, 11, [asked])
    assert repr(asked) in str(caught.value)


def test_words_cut_off_by_the_length_limit(caplog: pytest.LogCaptureFixture) -> None:
    cut = words(("red", [0]), ("circle", []))
    assert list(names(select_targets(cut, 2))) == ["red"]
    assert "circle" in caplog.text
    with pytest.raises(UsageError, match="max_sequence_length"):
        select_targets(cut, 2, ["circle"])
    with pytest.raises(UsageError, match="max_sequence_length"):
        select_targets([cut[0], dict(cut[1], target=True)], 2)


def test_tokens_outside_the_prompt_are_a_bad_artifact() -> None:
    with pytest.raises(ArtifactError, match=r"stage1_text_encoder\.py --force"):
        select_targets(words(("red", [0]), ("circle", [1])), 2)


@pytest.mark.parametrize(
    ("word", "folder"),
    [("../../etc", "etc"), ("a/b", "a_b"), ("<img>", "img"), ("red#2", "red#2"), ("aggregated", "aggregated-word"), ("CON", "CON-word"),
     ("_pad", "pad"), (".hidden", "hidden"), ("don't", "don_t"), ("кот", "кот"), ("$x^2$", "x_2")],
)  # fmt: skip
def test_folders_are_safe(word: str, folder: str) -> None:
    assert select_targets(words((word, [0])), 2)[0].folder == folder


def test_folders_never_collide_and_stay_short() -> None:
    targets = select_targets(words(("a/b", [0]), ("a_b", [1]), ("!!", [2]), ("长" * 200, [3])), 5)
    folders = [target.folder for target in targets]
    assert folders[:2] == ["a_b", "a_b-2"] and folders[2].startswith("token-") and len(folders[3].encode()) <= 100
    assert len({folder.casefold() for folder in folders}) == 4


def test_groups_partition_the_keys() -> None:
    matrix = groups_matrix(TARGETS, 9, 20)
    assert matrix.dtype == np.float32 and matrix.shape == (20, 5)
    np.testing.assert_array_equal(matrix.sum(axis=1), 1)
    assert [list(np.flatnonzero(column)) for column in matrix.T] == [[1, 2], [4], [0, 3, 5, 6, 7], [8], list(range(9, 20))]
    assert [target.name for target in special_targets(TARGETS, 9, 20)] == ["a", "b", "_other", "_eos", "_pad"]
    assert groups_matrix([], 1, 4).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]  # the empty prompt


# --------------------------------------------------------------------------------------------------------------- settings


def test_settings_take_every_key_of_the_guide() -> None:
    params = {
        "figsize": [12, 8], "colormap": "hot", "overlay_alpha": 0.6, "static_duration": 3.0, "fps": 10, "interpolation_steps": 2,
        "include_colorbar": True, "video_format": "mp4",
    }  # fmt: skip
    block = {
        "store_attention": True, "store_aggregated_attention": True, "aggregated_storage_format": "torch", "storage_format": "torch",
        "compress_attention": True, "storage_dtype": "float32", "store_per_head": True, "store_per_block": True,
        "spatial_downsample_factor": 2, "auto_generate_videos": True, "auto_generate_per_video": True, "store_negative": True,
        "visualization_params": params,
    }  # fmt: skip
    settings = AttentionSettings.from_mapping(block)
    assert settings.axes == ("block", "head", "frame", "y", "x")
    assert settings.visualization_params == VisualizationParams()  # the guide's values are the defaults
    assert AttentionSettings.from_mapping({}) == AttentionSettings()
    assert {field for field in AttentionSettings.__dataclass_fields__} == set(block)
    assert {field for field in VisualizationParams.__dataclass_fields__} == set(params)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"store_atention": True}, "unknown key 'store_atention'; it has store_attention"),
        ({"store_attention": "yes"}, "store_attention: 'yes' is a str; wanted a bool"),
        ({"storage_format": "zarr"}, "storage_format: 'zarr'; wanted numpy or torch"),
        ({"storage_dtype": "bfloat16"}, "wanted float32 or float16"),
        ({"spatial_downsample_factor": 0}, "spatial_downsample_factor: 0"),
        ({"spatial_downsample_factor": True}, "wanted a int"),
        ({"auto_generate_videos": True}, "need store_attention: true"),
        ({"visualization_params": {"fps": 2.5}}, "visualization_params.fps: 2.5 is a float"),
        ({"visualization_params": {"figsize": [12]}}, r"figsize: \[12\]"),
        ({"visualization_params": {"overlay_alpha": 1.5}}, "overlay_alpha: 1.5; wanted 0.0 to 1.0"),
        ({"visualization_params": {"video_format": "gif"}}, "wanted mp4 or avi"),
        ({"visualization_params": ["hot"]}, "wanted a mapping"),
    ],
)
def test_settings_refuse_by_name(block: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AttentionSettings.from_mapping(block)
