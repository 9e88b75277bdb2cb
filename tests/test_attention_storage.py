"""Storage: the documented layout and metadata, both formats, resuming, damaged files; and the analyzer that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_clips import EOS, OTHER, PAD, VIDEO_ID, store_clip

from wan_common.attention_maps import (
    AttentionAnalyzer,
    AttentionSettings,
    AttentionWriter,
    ClipInfo,
    frame_map,
    pool_mean,
    select_targets,
)
from wan_common.errors import ArtifactError, NumericalError, UsageError
from wan_common.latents import latent_frame_of, video_frames_of

# The user guide's metadata fields, all of them.
PUBLISHED = {
    "shape", "dtype", "num_steps", "steps_used", "aggregation_method", "token_word", "video_dimensions", "storage_timestamp",
    "attention_storage_version",
}  # fmt: skip


def maps_of(root: Path) -> Path:
    return root / "attention_maps" / VIDEO_ID


def test_layout_and_every_metadata_field(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=3, weight=lambda word, step, frame: 0.01 * (step + 1))
    folder = maps_of(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"red", "circle", "_other", "_eos", "_pad", "aggregated", "video_metadata.json"}
    assert {path.name for path in (folder / "red").iterdir()} == {
        f"step_00{i}{end}" for i in range(3) for end in (".npz", "_metadata.json")
    }
    assert {path.name for path in (folder / "aggregated").iterdir()} == {
        f"{name}_aggregated{end}" for name in ("red", "circle", "_other", "_eos", "_pad") for end in (".npz", "_metadata.json")
    }
    step = json.loads((folder / "red" / "step_001_metadata.json").read_text())
    assert set(step) >= PUBLISHED
    assert step["shape"] == [3, 4, 6] and step["dtype"] == "float32"
    assert (step["num_steps"], step["steps_used"], step["aggregation_method"]) == (1, [1], "none")
    assert step["token_word"] == "red" and step["attention_storage_version"] == "1.1.0"
    assert step["video_dimensions"] == {"width": 96, "height": 64, "fps": 16, "frames": 9}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", step["storage_timestamp"])
    assert step["latent_grid"] == [3, 4, 6] and step["timestep"] == pytest.approx(1000 - 1000 / 3)
    assert step["token_indices"] == [0] and step["token_ids"] == [1000] and step["averaged_over"] == ["block", "head"]
    assert step["num_inference_steps"] == 3 and step["spatial_downsample_factor"] == 1
    whole = json.loads((folder / "aggregated" / "red_aggregated_metadata.json").read_text())
    assert set(whole) >= PUBLISHED
    assert (whole["num_steps"], whole["steps_used"], whole["aggregation_method"]) == (3, [0, 1, 2], "mean")
    assert whole["averaged_over"] == ["block", "head", "step"] and whole["timestep"] is None
    with np.load(folder / "aggregated" / "red_aggregated.npz") as archive:
        np.testing.assert_allclose(archive["attention_map"], 0.02, rtol=1e-6)
    video = json.loads((folder / "video_metadata.json").read_text())
    assert video["clip"]["prompt"] == "red circle" and [token["name"] for token in video["tokens"]] == ["red", "circle"]


def test_the_user_guides_own_calls(tmp_path: Path) -> None:
    store_clip(tmp_path)
    analyzer = AttentionAnalyzer(str(tmp_path / "attention_maps"))
    assert analyzer.get_available_videos() == [VIDEO_ID]
    assert analyzer.get_available_tokens(VIDEO_ID) == ["red", "circle"]
    attention_info = analyzer.load_step(VIDEO_ID, "circle", 2)
    assert attention_info.attention_map.shape == (3, 4, 6)
    assert attention_info.metadata.video_dimensions["frames"] == 9
    all_steps = analyzer.load_all_steps(VIDEO_ID, "circle")
    assert list(all_steps) == [0, 1, 2]
    np.testing.assert_allclose(all_steps[2].attention_map, 0.02, rtol=1e-6)
    assert analyzer.get_available_steps(VIDEO_ID, "red") == [0, 1, 2]
    assert analyzer.has_aggregated(VIDEO_ID, "red")
    assert analyzer.load_aggregated(VIDEO_ID, "red").metadata.aggregation_method == "mean"


def test_special_groups_are_stored_and_listed_on_request(tmp_path: Path) -> None:
    store_clip(tmp_path)
    analyzer = AttentionAnalyzer(tmp_path / "attention_maps")
    assert analyzer.get_available_tokens(VIDEO_ID, include_special=True) == ["red", "circle", "_other", "_eos", "_pad"]
    for name, value in (("_other", OTHER), ("_eos", EOS), ("_pad", PAD)):
        np.testing.assert_allclose(analyzer.load_step(VIDEO_ID, name, 0).attention_map, value, rtol=1e-6)
    assert analyzer.load_step(VIDEO_ID, "_eos", 0).metadata.token_indices == [3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("form", "suffix"), [("numpy", ".npz"), ("torch", ".pt")])
@pytest.mark.parametrize("compress", [True, False])
def test_formats(tmp_path: Path, form: str, suffix: str, dtype: str, compress: bool) -> None:
    store_clip(tmp_path, weight=lambda word, step, frame: 0.125 * (frame + 1), storage_format=form, aggregated_storage_format=form,
               storage_dtype=dtype, compress_attention=compress, video=False)  # fmt: skip
    path = maps_of(tmp_path) / "red" / f"step_000{suffix}"
    if form == "torch":
        assert torch.load(path, weights_only=True)["attention_map"].shape == (3, 4, 6)
    analyzer = AttentionAnalyzer(tmp_path / "attention_maps")
    for loaded in (analyzer.load_step(VIDEO_ID, "red", 0), analyzer.load_aggregated(VIDEO_ID, "red")):
        assert str(loaded.attention_map.dtype) == loaded.metadata.dtype == dtype
        np.testing.assert_array_equal(loaded.attention_map[:, 0, 0], [0.125, 0.25, 0.375])
    assert (maps_of(tmp_path) / "aggregated" / f"red_aggregated{suffix}").exists()


def test_compression_makes_smaller_files(tmp_path: Path) -> None:
    sizes = {}
    for compress in (True, False):
        store_clip(tmp_path / str(compress), size=(512, 512), compress_attention=compress, video=False)
        sizes[compress] = (maps_of(tmp_path / str(compress)) / "red" / "step_000.npz").stat().st_size
    assert sizes[True] < sizes[False] / 4


def test_without_aggregates_the_mean_is_computed(tmp_path: Path) -> None:
    store_clip(tmp_path, weight=lambda word, step, frame: 0.1 * step, store_aggregated_attention=False, video=False)
    assert not (maps_of(tmp_path) / "aggregated").exists()
    analyzer = AttentionAnalyzer(tmp_path / "attention_maps")
    assert not analyzer.has_aggregated(VIDEO_ID, "red")
    loaded = analyzer.load_aggregated(VIDEO_ID, "red")
    np.testing.assert_allclose(loaded.attention_map, 0.1, rtol=1e-6)
    assert loaded.metadata.steps_used == [0, 1, 2] and loaded.metadata.averaged_over[-1] == "step"


def test_downsampling_keeps_the_mean_at_ragged_edges(tmp_path: Path) -> None:
    values = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)
    pooled = pool_mean(values, 2)
    assert pooled.shape == (3, 4)
    assert pooled[0, 0] == values[:2, :2].mean() and pooled[2, 3] == values[4, 6] and pooled[2, 0] == values[4, :2].mean()
    store_clip(tmp_path, size=(112, 80), spatial_downsample_factor=2, video=False, weight=lambda word, step, frame: values / 100)
    loaded = AttentionAnalyzer(tmp_path / "attention_maps").load_step(VIDEO_ID, "red", 0)
    assert loaded.metadata.spatial_downsample_factor == 2 and loaded.metadata.latent_grid == [3, 5, 7]
    np.testing.assert_allclose(loaded.attention_map[0], pooled / 100, rtol=1e-6)


def writer(
    root: Path, start_step: int = 0, fingerprint: str = "a", steps: int = 4, grid: tuple[int, int, int] = (1, 2, 3), **settings: object
) -> AttentionWriter:
    targets = select_targets([{"word": "red", "span": [0, 3], "tokens": [0], "target": False}], 2)
    info = ClipInfo(48, 32, 1, 16, grid, steps, 2, 8, "red", [5, 1], fingerprint)
    return AttentionWriter(
        root, VIDEO_ID, targets, AttentionSettings.from_mapping({"store_attention": True, **settings}), info, start_step=start_step
    )


def test_per_head_and_per_block_axes(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((4, 5, 2, 1, 2, 3)).astype(np.float32)  # G, block, head, F, H, W
    with writer(tmp_path, steps=1, store_per_block=True, store_per_head=True) as storage:
        storage.step(0, maps, 999.0)
        storage.finish()
    loaded = AttentionAnalyzer(tmp_path).load_step(VIDEO_ID, "red", 0)
    assert loaded.metadata.axes == ["block", "head", "frame", "y", "x"] and loaded.metadata.averaged_over == []
    np.testing.assert_array_equal(loaded.attention_map, maps[0])
    np.testing.assert_allclose(frame_map(loaded), maps[0].mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(frame_map(loaded, block=3), maps[0, 3].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(frame_map(loaded, block=3, head=1), maps[0, 3, 1], rtol=1e-6)
    with pytest.raises(UsageError, match="--block 5: there are 5"):
        frame_map(loaded, block=5)


def test_asking_for_a_head_that_was_averaged_away(tmp_path: Path) -> None:
    store_clip(tmp_path, video=False)
    loaded = AttentionAnalyzer(tmp_path / "attention_maps").load_step(VIDEO_ID, "red", 0)
    with pytest.raises(UsageError, match="store_per_head: true"):
        frame_map(loaded, head=0)


def test_resume_gives_the_same_files_as_an_uninterrupted_run(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((4, 4, 1, 2, 3)).astype(np.float32)  # step, G, F, H, W
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with writer(whole) as storage:
        for step in range(4):
            storage.step(step, maps[step], step)
        storage.finish()
    with writer(parts) as storage:
        storage.step(0, maps[0], 0)
        storage.step(1, maps[1], 1)
        storage.flush()
        assert (parts / VIDEO_ID / "red" / "step_001.npz").exists()  # what a checkpoint may promise after flush
    with writer(parts, start_step=2) as storage:
        for step in (2, 3):
            storage.step(step, maps[step], step)
        storage.finish()
    first, second = (AttentionAnalyzer(folder).load_aggregated(VIDEO_ID, "red").attention_map for folder in (whole, parts))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, maps[:, 0].mean(axis=0), rtol=1e-6)


def test_resume_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    """In every folder: a kill may hit the steps, the means over them, or the video's metadata."""
    maps = np.zeros((4, 1, 2, 3), np.float32)
    with writer(tmp_path) as storage:
        for step in range(4):
            storage.step(step, maps, step)
        storage.finish()
    folders = [tmp_path / VIDEO_ID, *(path for path in (tmp_path / VIDEO_ID).iterdir() if path.is_dir())]
    assert {"red", "aggregated"} < {folder.name for folder in folders}
    for folder in folders:
        (folder / ".tmp-half-written.npz").write_bytes(b"half")
    with writer(tmp_path, start_step=4):
        assert not list(tmp_path.rglob(".tmp-*"))


def test_resume_refuses_steps_of_another_run_or_missing_ones(tmp_path: Path) -> None:
    maps = np.zeros((4, 1, 2, 3), np.float32)
    with writer(tmp_path) as storage:
        storage.step(0, maps, 0)
        storage.flush()
    with pytest.raises(ArtifactError, match=r"of another run .clip differ.*--force"):
        writer(tmp_path, start_step=1, fingerprint="b")
    with pytest.raises(ArtifactError, match="settings differ"):
        writer(tmp_path, start_step=1, storage_dtype="float16")
    with pytest.raises(ArtifactError, match=r"step_001\.npz: missing, and the run resumes at step 2"):
        writer(tmp_path, start_step=2)


def test_a_new_run_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    with writer(tmp_path) as storage:
        for step in range(4):
            storage.step(step, np.zeros((4, 1, 2, 3), np.float32), step)
        storage.finish()
    with writer(tmp_path, steps=2) as storage:
        storage.step(0, np.ones((4, 1, 2, 3), np.float32), 0)
        storage.flush()
    assert AttentionAnalyzer(tmp_path).get_available_steps(VIDEO_ID, "red") == [0]


def test_not_finite_maps_stop_the_run_and_name_the_step(tmp_path: Path) -> None:
    maps = np.zeros((4, 1, 2, 3), np.float32)
    maps[1, 0, 0, 0] = np.nan
    with writer(tmp_path) as storage, pytest.raises(NumericalError, match="attention of step 2 is not finite"):
        storage.step(2, maps, 0)
        storage.flush()


def test_maps_of_another_shape_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as storage, pytest.raises(ValueError, match="maps are"):
        storage.step(0, np.zeros((4, 1, 2, 4), np.float32), 0)


# ----------------------------------------------------------------------------------------------------------- what is wrong


def test_no_maps_at_all_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no attention maps here; run stage2_transformer.py with --store_attention"):
        AttentionAnalyzer(tmp_path / "attention_maps")


def test_unknown_video_and_token_list_what_there_is(tmp_path: Path) -> None:
    store_clip(tmp_path, video=False)
    analyzer = AttentionAnalyzer(tmp_path / "attention_maps")
    with pytest.raises(UsageError, match=r"it has: prompt_001_vid_001"):
        analyzer.get_available_tokens("../attention_maps")
    with pytest.raises(UsageError, match=r"'dog' was not stored for prompt_001_vid_001; there are: red, circle"):
        analyzer.load_step(VIDEO_ID, "dog", 0)
    assert analyzer.load_step(VIDEO_ID, "RED", 0).metadata.token_word == "red"


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.write_bytes(b"this is not a map" * 50)
    elif how == "pickle":
        np.savez(path, attention_map=np.array([{"run": "code"}], dtype=object))
    elif how == "other shape":
        np.savez(path, attention_map=np.zeros((1, 2, 3), np.float32))
    elif how == "other key":
        np.savez(path, weights=np.zeros((3, 4, 6), np.float32))
    elif how == "integers":
        np.savez(path, attention_map=np.zeros((3, 4, 6), np.int64))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "foreign", "pickle", "other shape", "other key", "integers"])
def test_damaged_step_names_the_file_and_the_remedy(tmp_path: Path, how: str) -> None:
    store_clip(tmp_path, video=False)
    damage(maps_of(tmp_path) / "red" / "step_001.npz", how)
    analyzer = AttentionAnalyzer(tmp_path / "attention_maps")
    for read in (lambda: analyzer.load_step(VIDEO_ID, "red", 1), lambda: list(analyzer.iter_steps(VIDEO_ID, "red"))):
        with pytest.raises(ArtifactError, match=r"step_001.npz: .*rerun stage2_transformer.py with --store_attention --force"):
            read()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"shape": [1]}'])
def test_damaged_metadata_names_the_file(tmp_path: Path, content: str) -> None:
    store_clip(tmp_path, video=False)
    (maps_of(tmp_path) / "red" / "step_001_metadata.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"step_001_metadata.json: .*rerun stage2"):
        AttentionAnalyzer(tmp_path / "attention_maps").load_step(VIDEO_ID, "red", 1)


def test_nan_on_disk_is_a_numerical_error(tmp_path: Path) -> None:
    store_clip(tmp_path, video=False)
    np.savez(maps_of(tmp_path) / "red" / "step_001.npz", attention_map=np.full((3, 4, 6), np.nan, np.float32))
    with pytest.raises(NumericalError, match=r"step_001\.npz"):
        AttentionAnalyzer(tmp_path / "attention_maps").load_step(VIDEO_ID, "red", 1)


def test_metadata_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    store_clip(tmp_path, video=False)
    path = maps_of(tmp_path) / "video_metadata.json"
    data = json.loads(path.read_text())
    data["tokens"][0]["folder"] = "../../secrets"
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="leaves the clip's own"):
        AttentionAnalyzer(tmp_path / "attention_maps").load_step(VIDEO_ID, "red", 0)


def test_maps_in_the_guides_two_dimensional_form(tmp_path: Path) -> None:
    """Files of another writer: [H, W] maps, only the published fields, no video_metadata.json."""
    folder = tmp_path / "vid" / "kiss"
    folder.mkdir(parents=True)
    fields = {
        "shape": [20, 36], "dtype": "float32", "num_steps": 1, "steps_used": [0], "aggregation_method": "mean", "token_word": "kiss",
        "video_dimensions": {"width": 576, "height": 320, "fps": 25, "frames": 65}, "storage_timestamp": "2024-01-15T10:30:45",
        "attention_storage_version": "1.1.0",
    }  # fmt: skip
    np.savez(folder / "step_000.npz", attention_map=np.full((20, 36), 0.5, np.float32))
    (folder / "step_000_metadata.json").write_text(json.dumps(fields))
    analyzer = AttentionAnalyzer(tmp_path)
    assert analyzer.get_available_tokens("vid") == ["kiss"]
    assert frame_map(analyzer.load_step("vid", "kiss", 0)).shape == (1, 20, 36)


def test_time_alignment() -> None:
    assert list(video_frames_of(0)) == [0] and list(video_frames_of(1)) == [1, 2, 3, 4] and list(video_frames_of(20)) == [77, 78, 79, 80]
    for latent in range(21):
        assert {latent_frame_of(frame) for frame in video_frames_of(latent)} == {latent}
