"""Videos, overlays, figures and the command line: what is planted in the maps must come out where and when it was planted."""

from __future__ import annotations

import dataclasses
import logging
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from attention_clips import EOS, OTHER, PAD, VIDEO_ID, store_clip
from matplotlib.figure import Figure
from PIL import Image

import visualize_attention
from wan_common import attention_canvas
from wan_common.attention_canvas import Canvas, blend, colour_table, printable
from wan_common.attention_maps import AttentionAnalyzer, AttentionSettings, VisualizationParams
from wan_common.attention_visualizer import AttentionVisualizer, _Histogram, robust_range, visualize_run
from wan_common.errors import ArtifactError, NumericalError, UsageError, run_command
from wan_common.latents import latent_frame_of
from wan_common.video import probe, read_video, write_video

GRAY = 90
SMALL = VisualizationParams(figsize=(4, 3))


def visualizer_of(root: Path, **options: object) -> AttentionVisualizer:
    return AttentionVisualizer(AttentionAnalyzer(root / "attention_maps"), **{"figsize": (4, 3), "progress": False, **options})


def picture_in(frame: np.ndarray) -> tuple[slice, slice]:
    """Where the gray clip lies in the canvas: the rows and columns that are mostly gray."""
    gray = (np.abs(frame.astype(int) - GRAY) < 9).all(axis=2)
    rows, columns = np.flatnonzero(gray.mean(axis=1) > 0.25), np.flatnonzero(gray.mean(axis=0) > 0.25)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def square_of(frame: int, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Top left cell of the planted 2x2 square in latent ``frame``: it moves along the diagonal."""
    frames, height, width = grid
    share = frame / max(1, frames - 1)
    return round(share * (height - 2)), round(share * (width - 2))


def plant(grid: tuple[int, int, int], noise: float = 0.0) -> object:
    rng = np.random.default_rng(0)

    def weight(word: int, step: int, frame: int) -> np.ndarray:
        values = 0.01 + noise * rng.random(grid[1:])
        if word == 1:
            y, x = square_of(frame, grid)
            values[y : y + 2, x : x + 2] = 0.4
        return values

    return weight


# ----------------------------------------------------------------------------------------------------------- the planted case


@pytest.mark.parametrize("noise", [0.0, 0.01], ids=["flat", "noisy"])
@pytest.mark.parametrize(
    ("size", "frames"),
    [((160, 96), 1), ((96, 160), 5), ((160, 96), 17), ((208, 80), 33), ((96, 96), 81)],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_planted_square_comes_out_over_that_square_at_the_right_frames(
    tmp_path: Path, size: tuple[int, int], frames: int, noise: float
) -> None:
    grid = ((frames - 1) // 4 + 1, size[1] // 16, size[0] // 16)
    store_clip(tmp_path, size=size, frames=frames, steps=2, weight=plant(grid, noise))
    path = visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "circle", tmp_path / "over.mp4", tmp_path / "output_video.mp4")
    seen = list(read_video(path))
    assert len(seen) == frames and probe(path)["fps"] == 16
    rows, columns = picture_in(seen[0])
    cell = (rows.stop - rows.start) / grid[1]
    assert (columns.stop - columns.start) / grid[2] == pytest.approx(cell, rel=0.05)
    for index, frame in enumerate(seen):
        change = np.abs(frame[rows, columns].astype(int) - GRAY).max(axis=2)
        y, x = square_of(latent_frame_of(index), grid)
        hot = np.argwhere(change > 60)
        assert hot.size, f"nothing is hot in frame {index}"
        # Half a cell: bilinear edges and video compression move the centre by up to 0.35 of a cell at the border of the picture.
        np.testing.assert_allclose(hot.mean(axis=0) / cell, (y + 1, x + 1), atol=0.5, err_msg=f"frame {index}")
        cold = np.ones_like(change, bool)
        cold[int(max(0, (y - 1) * cell)) : int((y + 3) * cell), int(max(0, (x - 1) * cell)) : int((x + 3) * cell)] = False
        assert change[cold].size == 0 or np.percentile(change[cold], 99) < 25, f"frame {index}"


def test_the_other_word_is_not_hot_there(tmp_path: Path) -> None:
    store_clip(tmp_path, size=(160, 96), frames=5, steps=2, weight=plant((2, 6, 10)))
    path = visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "red", tmp_path / "over.mp4", tmp_path / "output_video.mp4")
    for frame in read_video(path):
        rows, columns = picture_in(frame)
        assert np.abs(frame[rows, columns].astype(int) - GRAY).max() < 25


def test_downsampled_maps_land_on_the_same_square(tmp_path: Path) -> None:
    def weight(word: int, step: int, frame: int) -> np.ndarray:
        values = np.full((5, 7), 0.01)
        values[4:, 6:] = 0.4  # the cut cell in the corner
        return values

    store_clip(tmp_path, size=(112, 80), frames=1, steps=1, weight=weight, spatial_downsample_factor=2)
    path = visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "red", tmp_path / "over.mp4", tmp_path / "output_video.mp4")
    frame = next(iter(read_video(path)))
    rows, columns = picture_in(frame)
    hot = np.argwhere(np.abs(frame[rows, columns].astype(int) - GRAY).max(axis=2) > 60)
    cell = (rows.stop - rows.start) / 5
    assert hot.min(axis=0)[0] > 3.7 * cell and hot.min(axis=0)[1] > 5.7 * cell  # only the corner, not the 2x2 cell around it


@pytest.mark.parametrize("size", [(320, 192), (80, 48), (200, 130)], ids=str)
def test_overlay_on_a_video_of_another_size(tmp_path: Path, size: tuple[int, int]) -> None:
    grid = (2, 6, 10)
    store_clip(tmp_path, size=(160, 96), frames=5, steps=1, weight=plant(grid), video=False)
    original = write_video(tmp_path / "other.mp4", (np.full((size[1], size[0], 3), GRAY, np.uint8) for _ in range(5)), 16)
    path = visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "circle", tmp_path / "over.mp4", original)
    frame = list(read_video(path))[4]
    rows, columns = picture_in(frame)
    hot = np.argwhere(np.abs(frame[rows, columns].astype(int) - GRAY).max(axis=2) > 60).mean(axis=0)
    extent = np.array([rows.stop - rows.start, columns.stop - columns.start])
    np.testing.assert_allclose(hot / extent, (5 / 6, 9 / 10), atol=0.06)


def test_overlay_on_a_video_of_another_length_is_refused_or_stretched(tmp_path: Path) -> None:
    grid = (3, 6, 10)
    store_clip(tmp_path, size=(160, 96), frames=9, steps=1, weight=plant(grid), video=False)
    original = write_video(tmp_path / "other.mp4", (np.full((96, 160, 3), GRAY, np.uint8) for _ in range(18)), 16)
    visualizer = visualizer_of(tmp_path)
    with pytest.raises(ArtifactError, match=r"other\.mp4: 18 frames, the maps belong to a video of 9; .*--stretch_time"):
        visualizer.generate_attention_video(VIDEO_ID, "circle", tmp_path / "over.mp4", original)
    assert not (tmp_path / "over.mp4").exists()
    path = visualizer.generate_attention_video(VIDEO_ID, "circle", tmp_path / "over.mp4", original, stretch_time=True)
    seen = list(read_video(path))
    assert len(seen) == 18
    rows, columns = picture_in(seen[0])
    for index, latent in ((0, 0), (17, 2)):
        hot = np.argwhere(np.abs(seen[index][rows, columns].astype(int) - GRAY).max(axis=2) > 60).mean(axis=0)
        cell = (rows.stop - rows.start) / 6
        np.testing.assert_allclose(hot / cell, np.array(square_of(latent, grid)) + 1, atol=0.5)


def test_missing_or_broken_original_video(tmp_path: Path) -> None:
    store_clip(tmp_path, video=False)
    with pytest.raises(ArtifactError, match=r"none\.mp4: no such video; make it with stage3_vae_decoder\.py"):
        visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "red", tmp_path / "o.mp4", tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ArtifactError, match="not a readable video"):
        visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "red", tmp_path / "o.mp4", tmp_path / "text.mp4")


def test_overlay_of_one_step(tmp_path: Path) -> None:
    def weight(word: int, step: int, frame: int) -> np.ndarray:
        values = np.full((6, 10), 0.01)
        values[0, step] = 0.5
        return values

    store_clip(tmp_path, size=(160, 96), frames=1, steps=3, weight=weight)
    visualizer = visualizer_of(tmp_path)
    for step in range(3):
        path = visualizer.generate_attention_video(VIDEO_ID, "red", tmp_path / f"{step}.mp4", tmp_path / "output_video.mp4", step=step)
        frame = next(iter(read_video(path)))
        rows, columns = picture_in(frame)
        hot = np.argwhere(np.abs(frame[rows, columns].astype(int) - GRAY).max(axis=2) > 60)
        cell = (rows.stop - rows.start) / 6
        assert hot.mean(axis=0)[1] / cell == pytest.approx(step + 0.5, abs=0.4)


def test_alpha_sets_the_opacity_and_leaves_the_rest_alone() -> None:
    frame = np.full((40, 40, 3), GRAY, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1:3, 1:3] = 1
    for alpha in (0.0, 0.5, 1.0):
        picture = blend(frame, weights, colour_table("hot"), 0.0, 1.0, alpha)
        assert abs(int(picture[20, 20, 0]) - round(GRAY + alpha * (255 - GRAY))) <= 1
        assert (picture[0, 0] == GRAY).all()


# ----------------------------------------------------------------------------------------------------------- videos over steps


@pytest.mark.parametrize(("between", "frames"), [(0, 4), (2, 10)])
def test_attention_video_shows_every_step_and_the_blends(tmp_path: Path, between: int, frames: int) -> None:
    store_clip(tmp_path, steps=4, weight=lambda word, step, frame: 0.05 + 0.1 * step, video=False)
    visualizer = visualizer_of(tmp_path, normalize="none", colormap="gray")
    path = visualizer.generate_attention_video(VIDEO_ID, "red", tmp_path / "red.mp4", interpolation_steps=between)
    info = probe(path)
    assert (info["frames"], info["fps"], info["size"]) == (frames, 10, (400, 300))
    seen = list(read_video(path))
    canvas, _, _ = next(visualizer._evolution(VIDEO_ID, "red", between))
    for x, y, width, height in canvas.boxes:  # three latent frames
        # gray, 0..1: a tile's level is the weight itself (video compression moves it by a few units of 255)
        levels = [frame[y + height // 2, x + width // 2].mean() / 255 for frame in seen]
        np.testing.assert_allclose(levels, np.linspace(0.05, 0.35, frames), atol=0.02)


def test_the_defaults_of_the_guide() -> None:
    import inspect

    made = inspect.signature(AttentionVisualizer.__init__).parameters
    assert (made["figsize"].default, made["colormap"].default, made["fps"].default) == ((12, 8), "hot", 10)
    call = inspect.signature(AttentionVisualizer.generate_attention_video).parameters
    assert list(call)[1:10] == [
        "video_id", "token_word", "output_path", "original_video_path", "overlay_alpha", "interpolation_steps", "include_timestamp",
        "use_aggregated", "step",
    ]  # fmt: skip
    assert (call["overlay_alpha"].default, call["interpolation_steps"].default, call["use_aggregated"].default) == (0.6, 2, False)
    assert inspect.signature(AttentionVisualizer.generate_aggregated_attention_map).parameters["aggregate_steps"].default is True


def test_aggregated_video_is_static_and_lasts_three_seconds(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=3, weight=plant((3, 4, 6)), video=False)
    path = visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "circle", tmp_path / "a.mp4", use_aggregated=True)
    seen = list(read_video(path))
    assert len(seen) == 30
    assert np.abs(seen[0].astype(int) - seen[-1]).mean() < 2
    path = visualizer_of(tmp_path, static_duration=0.5).generate_attention_video(
        VIDEO_ID, "circle", tmp_path / "b.mp4", use_aggregated=True, fps=4
    )
    assert probe(path)["frames"] == 2 and probe(path)["fps"] == 4


def test_timestamp_and_avi(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=2, video=False)
    visualizer = visualizer_of(tmp_path)
    pictures = {}
    for stamp in (False, True):
        path = visualizer.generate_attention_video(VIDEO_ID, "red", tmp_path / f"{stamp}.avi", include_timestamp=stamp)
        assert path.read_bytes()[:4] == b"RIFF"
        pictures[stamp] = list(read_video(path))[-1]
    below = slice(270, 300)
    assert np.abs(pictures[True][below].astype(int) - pictures[False][below]).max() > 60
    assert np.abs(pictures[True][60:250].astype(int) - pictures[False][60:250]).mean() < 3
    with pytest.raises(UsageError, match=r"\.mp4 or \.avi"):
        visualizer.generate_attention_video(VIDEO_ID, "red", tmp_path / "x.gif")


def test_colorbar_can_be_left_out(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=1, video=False)
    frames = {}
    for bar in (True, False):
        path = visualizer_of(tmp_path, include_colorbar=bar).generate_attention_video(VIDEO_ID, "red", tmp_path / f"{bar}.mp4")
        frames[bar] = next(iter(read_video(path)))
    right = (slice(60, 260), slice(330, 350))
    assert frames[True][right].std() > 40 > frames[False][right].std()


def test_odd_figure_sizes_become_even() -> None:
    canvas = Canvas((401, 301), "t", "s", ["a"], (16, 9), colour_table("hot"), None)
    assert canvas.render([np.zeros((9, 16), np.uint8)], "x").shape == (302, 402, 3)


# ----------------------------------------------------------------------------------------------------------------- ranges


def test_small_spot_is_not_lost_in_the_percentile() -> None:
    values = np.random.default_rng(0).uniform(0, 0.01, (20, 30, 40))
    values[3, 4, 5] = 0.8
    limits = robust_range(values)
    assert limits.high == pytest.approx(0.2) and limits.low < 0.001


def test_ranges_of_constant_maps() -> None:
    assert robust_range(np.full((3, 4), 0.25)) == attention_range(0.0, 0.25)
    assert robust_range(np.zeros((3, 4))).high > 0
    spot = np.full((100, 100), 0.1)
    spot[0, 0] = 0.9
    assert robust_range(spot).high == pytest.approx(0.225)


def attention_range(low: float, high: float) -> object:
    from wan_common.attention_visualizer import Range

    return Range(low, high)


def test_streamed_percentiles_agree_with_numpy() -> None:
    values = np.random.default_rng(0).lognormal(-5, 1, (40, 5000)).clip(0, 1)
    histogram = _Histogram()
    for row in values:
        histogram.add(row)
    for percent in (1, 50, 99):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=0.01)  # bins are 0.3% wide


def test_each_normalisation_and_its_printed_range(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def weight(word: int, step: int, frame: int) -> np.ndarray:
        return np.linspace(0, 1, 24).reshape(4, 6) * (0.1, 0.4)[word] * (frame + 1) / 3

    store_clip(tmp_path, steps=2, weight=weight, video=False)
    caplog.set_level(logging.INFO)
    highs = {}
    for normalize in ("global", "word", "frame", "none"):
        visualizer = visualizer_of(tmp_path, normalize=normalize)
        shared = visualizer._shared_range(VIDEO_ID, "red", evolution=True)
        picture = weight(0, 0, 0)
        highs[normalize] = visualizer._range(shared, picture).high
        visualizer.generate_attention_video(VIDEO_ID, "red", tmp_path / f"{normalize}.mp4", interpolation_steps=0)
        assert re.search(rf"red: colours from \S+ to \S+ \(--normalize {normalize}", caplog.text)
    assert highs["global"] > 0.3 and 0.08 < highs["word"] <= 0.1 and highs["frame"] < 0.034 and highs["none"] == 1
    pictures = {name: next(iter(read_video(tmp_path / f"{name}.mp4"))).astype(float).mean() for name in highs}
    assert pictures["frame"] > pictures["word"] > pictures["global"] > pictures["none"]


def test_over_real_words(tmp_path: Path) -> None:
    store_clip(tmp_path, weight=lambda word, step, frame: 0.1, video=False)
    real = visualizer_of(tmp_path, over="real").generate_aggregated_attention_map(VIDEO_ID, "red")
    np.testing.assert_allclose(real, 0.1 / (1 - PAD - EOS), rtol=1e-5)
    share = visualizer_of(tmp_path).statistics(VIDEO_ID).share
    np.testing.assert_allclose(share, 0.1 / (1 - PAD - EOS), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "max"}, "--normalize 'max'; wanted one of global, word, frame, none"),
        ({"over": "words"}, "--over 'words'"),
        ({"percentile": 10}, "--percentile 10"),
        ({"colormap": "hott"}, "--colormap 'hott': matplotlib has no such colour map; similar: hot"),
        ({"figsize": (0, 3)}, "figsize"),
        ({"fps": 0}, "fps >= 1"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict, message: str) -> None:
    store_clip(tmp_path, video=False)
    with pytest.raises(UsageError, match=re.escape(message)):
        visualizer_of(tmp_path, **options)


# ----------------------------------------------------------------------------------------------------------------- figures


def test_aggregated_map_is_the_mean(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 3, 3, 4, 6)).astype(np.float32) / 10
    store_clip(tmp_path, weight=lambda word, step, frame: values[word, step, frame], video=False)
    visualizer = visualizer_of(tmp_path)
    mean = visualizer.generate_aggregated_attention_map(
        video_id=VIDEO_ID, token_word="circle", aggregate_steps=True, save_path=tmp_path / "m.png"
    )
    np.testing.assert_allclose(mean, values[1].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        visualizer.generate_aggregated_attention_map(VIDEO_ID, "circle", aggregate_steps=False), values[1], rtol=1e-6
    )
    assert Image.open(tmp_path / "m.png").size == (400, 300)


def test_temporal_comparison(tmp_path: Path) -> None:
    store_clip(
        tmp_path, ["red", "$x^2$", "红色", "a_b"], steps=6, weight=lambda word, step, frame: 0.01 * (word + 1) * (step + 1), video=False
    )
    figure = visualizer_of(tmp_path).generate_temporal_comparison(VIDEO_ID, tokens=["red", "$x^2$", "红色"], save_path=tmp_path / "cmp.png")
    assert isinstance(figure, Figure)
    curves = figure.subfigs[0].axes[0]
    np.testing.assert_allclose(curves.get_lines()[1].get_ydata(), 0.02 * np.arange(1, 7), rtol=1e-5)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["red", "$x^2$", printable("红色")[0]]
    assert len(figure.subfigs[1].axes) == 3 * 5 + 1  # three words at five steps, and the colour bar
    assert Image.open(tmp_path / "cmp.png").width == 400
    with pytest.raises(UsageError, match="there are: red"):
        visualizer_of(tmp_path).generate_temporal_comparison(VIDEO_ID, ["dog"])


def test_step_heatmaps_montage_and_animation(tmp_path: Path) -> None:
    store_clip(tmp_path, ["dark", "bright"], steps=3, weight=lambda word, step, frame: (0.01, 0.2)[word], video=False)
    visualizer = visualizer_of(tmp_path, figsize=(6, 4))
    paths = visualizer.save_step_heatmaps(VIDEO_ID, tmp_path / "out")
    assert [path.name for path in paths] == [
        "attention_step_000.png", "attention_step_001.png", "attention_step_002.png", "attention_montage.png", "attention_animation.gif",
    ]  # fmt: skip
    matrix, bins = visualizer._heatmap(VIDEO_ID, 0)
    assert matrix.shape == (3 * bins, 5)  # rows: image tokens by latent frame; columns: words, other, EOS, pad
    np.testing.assert_allclose(matrix[0], [0.01, 0.2, OTHER, EOS, PAD], rtol=1e-5)
    picture = np.asarray(Image.open(paths[0]))
    assert picture.shape == (400, 600, 3)
    # x: text tokens. Two fifths into the axes are the two words; "whiter is more"
    row = picture[200].astype(int).sum(axis=1)
    inside = np.flatnonzero(picture[200].astype(int).sum(axis=1) < 60)  # the dark word's column
    assert inside.size > 30 and row[inside[-1] + 15] > 600
    animation = Image.open(paths[-1])
    assert animation.n_frames == 3 and animation.format == "GIF" and animation.info["duration"] == 100
    assert Image.open(paths[-2]).size[0] >= 600


def test_heatmap_rows_average_image_tokens(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 30, 52)).astype(np.float32) / 10
    store_clip(tmp_path, ["red"], size=(832, 480), frames=5, steps=1, weight=lambda word, step, frame: values[frame], video=False)
    matrix, bins = visualizer_of(tmp_path)._heatmap(VIDEO_ID, 0)
    assert bins == 240 and matrix.shape == (480, 4)
    np.testing.assert_allclose(matrix[:, 0].reshape(2, 240).mean(axis=1), values.mean(axis=(1, 2)), rtol=1e-2)
    np.testing.assert_allclose(matrix[1, 0], values[0].ravel()[6:13].mean(), rtol=1e-4)  # row 1: tokens 6.5 to 13, cut to whole ones


def test_analysis_report(tmp_path: Path) -> None:
    def weight(word: int, step: int, frame: int) -> np.ndarray | float:
        if word == 0:
            values = np.full((4, 6), 1e-6)
            values[1, 1] = 0.24  # all in one token: mean 0.01
            return values
        return 0.02 if (word == 1) == (step < 2) else 0.005

    prompt = "<script>alert(1)</script> | a *red* circle"
    store_clip(tmp_path, ["spot", "early", "late|r"], steps=4, weight=weight, video=False, prompt=prompt)
    statistics = visualizer_of(tmp_path).statistics(VIDEO_ID)
    assert [word for word, _ in statistics.strongest()] == ["early", "early", "late|r", "late|r"]
    assert statistics.importance[0][0] in ("early", "late|r")
    np.testing.assert_allclose(statistics.spread[0], [1 / 72 * 3, 1, 1], rtol=1e-2)  # one token of 24 in each of three frames
    path = visualizer_of(tmp_path).write_analysis_report(VIDEO_ID, tmp_path / "attention_analysis_report.md")
    text = path.read_text()
    for heading in ("## Token importance", "## Step evolution", "## Attention entropy", "## Strongest token of each step"):
        assert heading in text
    assert "<script>" not in text and r"&lt;script&gt;alert(1)&lt;/script&gt; \| a \*red\* circle" in text
    assert re.search(r"\| 0 \| 1000 \| early \| 0.02 \|", text) and re.search(r"\| 3 \| 250 \| late\\\|r \| 0.02 \|", text)
    assert re.search(r"\| spot \| 0.01 \| 2.50% \| 0.24 \|", text)


def test_statistics_entropy_is_of_the_groups(tmp_path: Path) -> None:
    store_clip(tmp_path, ["red"], weight=lambda word, step, frame: 1 - PAD - EOS - OTHER, video=False)
    shares = np.array([1 - PAD - EOS - OTHER, OTHER, EOS, PAD])
    np.testing.assert_allclose(visualizer_of(tmp_path).statistics(VIDEO_ID).entropy, -(shares * np.log2(shares)).sum(), rtol=1e-4)


def test_words_no_font_has_become_code_points(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention_canvas._font_files()[0]
    monkeypatch.setattr(attention_canvas, "_font_files", lambda: [own])
    attention_canvas.printable.cache_clear()
    attention_canvas._warn_missing.cache_clear()
    try:
        assert printable("a 红 кот")[0] == "a \\u7ea2 кот"
        assert "Noto Sans CJK" in caplog.text
        assert not any("lastresort" in name.lower() for name in attention_canvas._font_files())
    finally:
        attention_canvas.printable.cache_clear()


# --------------------------------------------------------------------------------------------------------------- all at once


def test_everything_of_a_run(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=2, weight=plant((3, 4, 6)))
    written = visualize_run(tmp_path, tmp_path / "out", params=SMALL)
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    videos = {
        f"attention_videos/{VIDEO_ID}_{word}_{kind}.mp4" for word in ("red", "circle") for kind in ("attention", "overlay", "aggregated")
    }
    pictures = {
        "attention_step_000.png",
        "attention_step_001.png",
        "attention_montage.png",
        "attention_animation.gif",
        "temporal_comparison.png",
    }
    assert names == videos | pictures | {"attention_analysis_report.md", "attention_report.html"}
    assert all(path.stat().st_size > 0 for path in written)
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_several_clips_and_no_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_clip(tmp_path, steps=1, video=False)
    store_clip(tmp_path, steps=1, video=False, video_id="prompt_002_vid_001")
    written = visualize_run(tmp_path, tmp_path / "out", params=SMALL)
    assert "output_video.mp4: no such video, so no overlays; run stage3_vae_decoder.py first" in caplog.text
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert f"{VIDEO_ID}/attention_report.html" in names and "prompt_002_vid_001/attention_step_000.png" in names
    assert f"attention_videos/{VIDEO_ID}_red_attention.mp4" in names and not any("overlay" in name for name in names)
    with pytest.raises(UsageError, match="choose with --video-id"):
        visualize_run(tmp_path, tmp_path / "out", original_video=tmp_path / "x.mp4")


def test_negative_prompt_without_words(tmp_path: Path) -> None:
    """An empty negative prompt has no words, only EOS and pads: pictures of those, no videos, one report for both."""
    store_clip(tmp_path, steps=2)
    store_clip(tmp_path, [], steps=2, video=False, video_id=VIDEO_ID + "_negative", prompt="")
    written = visualize_run(tmp_path, tmp_path / "out", params=SMALL)
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert f"{VIDEO_ID}_negative/attention_analysis_report.md" in names and "attention_report.html" in names
    assert sum(name.endswith("attention_report.html") for name in names) == 1


def test_a_gap_in_the_steps_stops_and_a_run_still_going_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_clip(tmp_path, steps=4, video=False, finish=False)
    red = tmp_path / "attention_maps" / VIDEO_ID
    for folder in red.iterdir():
        if folder.is_dir():
            (folder / "step_003.npz").unlink()
    visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "red", tmp_path / "red.mp4")
    assert "3 of 4 steps are stored so far" in caplog.text
    (red / "circle" / "step_001.npz").unlink()
    with pytest.raises(ArtifactError, match=r"circle/step_001\.npz: missing .*rerun stage2"):
        visualizer_of(tmp_path).generate_attention_video(VIDEO_ID, "circle", tmp_path / "circle.mp4")
    assert not (tmp_path / "circle.mp4").exists()


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    peaks = {}
    for steps in (4, 32):
        root = tmp_path / str(steps)
        store_clip(root, size=(512, 512), frames=17, steps=steps, video=False)
        visualizer = visualizer_of(root)
        visualizer.statistics(VIDEO_ID)  # imports and font caches
        visualizer = visualizer_of(root)
        tracemalloc.start()
        visualizer.statistics(VIDEO_ID)
        for canvas, pictures, status in visualizer._evolution(VIDEO_ID, "red", 1):
            canvas.render(pictures, status)
        peaks[steps] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[32] < 1.15 * peaks[4]  # observed 1.01


# ------------------------------------------------------------------------------------------------------------ command line


def test_help_lists_every_option_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        visualize_attention.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--attention-dir", "--video-id", "--token", "--output", "--original-video", "--overlay-alpha", "--use-aggregated", "--colormap",
        "--fps", "--figsize", "--interpolation-steps", "--include-timestamp", "--video-format", "--list", "--report", "--normalize",
    ):  # fmt: skip
        assert re.search(rf"^\s+{option}\b", text, re.MULTILINE), option


def test_the_guides_three_commands(tmp_path: Path) -> None:
    store_clip(tmp_path, ["kiss"], steps=2)
    base = ["--attention-dir", str(tmp_path / "attention_maps"), "--video-id", VIDEO_ID, "--token", "kiss", "--figsize", "4,3"]
    visualize_attention.main([*base, "--output", str(tmp_path / "v" / "kiss_analysis.mp4")])
    original = ["--original-video", str(tmp_path / "output_video.mp4"), "--overlay-alpha", "0.6"]
    visualize_attention.main([*base, *original, "--output", str(tmp_path / "v" / "kiss_overlay.mp4")])
    visualize_attention.main([*base, "--use-aggregated", "--output", str(tmp_path / "v" / "kiss_aggregated.mp4")])
    frames = {path.stem: probe(path)["frames"] for path in (tmp_path / "v").glob("*.mp4")}
    assert frames == {"kiss_analysis": 4, "kiss_overlay": 9, "kiss_aggregated": 30}


def test_every_looks_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_clip(tmp_path, steps=3)
    common = ["--input_dir", str(tmp_path), "--token", "red", "--figsize", "5,3"]
    visualize_attention.main([
        *common, "--output", str(tmp_path / "a"), "--video-format", "avi", "--fps", "7", "--interpolation-steps", "1",
        "--include-timestamp",
        "--colormap", "viridis", "--normalize", "word", "--percentile", "95", "--over", "real", "--no-colorbar",
    ])  # fmt: skip
    info = probe(tmp_path / "a.avi")
    assert (info["frames"], info["fps"], info["size"]) == (5, 7, (500, 300))
    visualize_attention.main(
        [*common, "--output_dir", str(tmp_path / "o"), "--step", "1", "--static_duration", "1", "--interpolation-steps", "3"]
    )
    assert probe(tmp_path / "o" / "attention_videos" / f"{VIDEO_ID}_red_attention.mp4")["frames"] == 10
    assert "--interpolation-steps has no effect" in caplog.text


def test_config_file_and_flags_over_it(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=3, video=False)
    config = tmp_path / "looks.yaml"
    looks = {"figsize": [4, 3], "fps": 5, "interpolation_steps": 0, "video_format": "avi"}
    config.write_text(yaml.safe_dump({"seed": 3, "attention_analysis": {"visualization_params": looks}}))
    common = ["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "o"), "--token", "red", "--config", str(config)]
    visualize_attention.main(common)
    info = probe(tmp_path / "o" / "attention_videos" / f"{VIDEO_ID}_red_attention.avi")
    assert (info["frames"], info["fps"], info["size"]) == (3, 5, (400, 300))
    visualize_attention.main([*common, "--output", str(tmp_path / "x.mp4"), "--fps", "8", "--interpolation-steps", "1"])
    info = probe(tmp_path / "x.mp4")
    assert (info["frames"], info["fps"], info["size"]) == (5, 8, (400, 300))


def test_the_runs_folder_of_the_config_and_flags_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, word in (("a", "red"), ("b", "blue"), ("c", "green")):
        store_clip(tmp_path / name, [word], steps=1, video=False)
    config = tmp_path / "pipeline.yaml"

    def listed(yaml_options: dict[str, object], *flags: str) -> str:
        config.write_text(yaml.safe_dump(yaml_options))
        visualize_attention.main(["--config", str(config), "--list", *flags])
        return capsys.readouterr().out

    a, b, c = (str(tmp_path / name) for name in "abc")
    assert "  red: " in listed({"input_dir": a, "model_id": "demo_model"})
    assert "  blue: " in listed({"input_dir": a, "output_dir": b})  # stage 2 reads input_dir and writes the maps to output_dir
    assert "  green: " in listed({"input_dir": a, "output_dir": b}, "--input_dir", c)
    assert "  red: " in listed({"output_dir": b}, "--attention-dir", f"{a}/attention_maps")
    visualize_attention.main(["--config", str(config), "--report", "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["attention_report.html"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["attention_maps"]  # the run itself is only read
    args, looks = visualize_attention.parse_args([])
    assert (args.input_dir, args.output_dir, looks) == (Path("stage_outputs"), None, VisualizationParams())


def test_the_demo_config_has_every_key_and_the_guides_values() -> None:
    block = yaml.safe_load(Path("configs/attention_visualization_demo.yaml").read_text())["attention_analysis"]
    settings = AttentionSettings.from_mapping(block)
    assert set(block) == {field.name for field in dataclasses.fields(AttentionSettings)}
    assert set(block["visualization_params"]) == {field.name for field in dataclasses.fields(VisualizationParams)}
    assert settings.store_attention and settings.visualization_params == VisualizationParams()


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_clip(tmp_path, steps=3, video=False)
    visualize_attention.main(["--input_dir", str(tmp_path), "--list"])
    text = capsys.readouterr().out
    assert f"{VIDEO_ID}  red circle" in text and "  red: steps 0-2 (3), aggregated" in text and "_pad (special)" in text


def test_report_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_clip(tmp_path, steps=2)
    visualize_attention.main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--report"])
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["attention_report.html"]
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "attention_report.html")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--token", "dog"], 2, "there are: red, circle"),
        (["--token", "red", "--video-id", "nope"], 2, f"it has: {VIDEO_ID}"),
        (["--token", "red", "--colormap", "hott"], 2, "similar: hot"),
        (["--token", "red", "--overlay-alpha", "2"], 2, "wanted 0.0 to 1.0"),
        (["--token", "red", "--output", "x.gif"], 2, "mp4"),
        (["--token", "red", "--output", "x.avi", "--video-format", "mp4"], 2, "disagree"),
        (["--token", "red", "--report"], 2, "exclude each other"),
        (["--output", "x.mp4"], 2, "--output needs --token"),
        (["--use-aggregated"], 2, "--use-aggregated needs --token"),
        (["--token", "red", "--head", "1"], 2, "store_per_head: true"),
        (["--token", "red", "--step", "9"], 3, "step_009.npz: missing (steps 0 to 1 are there)"),
        (["--token", "red", "--original-video", "none.mp4"], 3, "none.mp4: no such video"),
        (["--config", "none.yaml"], 2, "--config none.yaml: No such file"),
        (["--attention-dir", "nowhere"], 3, "stage2_transformer.py with --store_attention"),
    ],
)
def test_errors_name_the_remedy_and_the_exit_code(
    tmp_path: Path, arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store_clip(tmp_path, steps=2, video=False)
    given = [*([] if "--attention-dir" in arguments else ["--input_dir", str(tmp_path)]), "--output_dir", str(tmp_path / "out"), *arguments]
    assert run_command(visualize_attention.main, given) == code
    assert message in capfd.readouterr().err


def test_not_finite_map_is_exit_code_four(tmp_path: Path) -> None:
    store_clip(tmp_path, steps=2, video=False)
    np.savez(tmp_path / "attention_maps" / VIDEO_ID / "red" / "step_001.npz", attention_map=np.full((3, 4, 6), np.inf, np.float32))
    with pytest.raises(NumericalError):
        visualize_attention.main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--token", "red"])
