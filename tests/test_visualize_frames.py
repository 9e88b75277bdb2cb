"""Step latents, their pictures and ``visualize_frames.py``.

The clips are denoised by the stock UniPC schedule from real noise, by a toy in place of the transformer: a velocity towards a
known picture, which it believes in more the less noise there is. The decoders are the demo model's own.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import threading
import tracemalloc
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from matplotlib import colormaps
from tiny_models import copy_model

import visualize_frames
from wan_common import frame_debug, frame_views, latent_rgb
from wan_common.errors import ArtifactError, run_command
from wan_common.frame_figures import SIGMA_BAR, PanelFigure, value_bar
from wan_common.latent_rgb import latents_to_rgb, load_latent_rgb
from wan_common.latents import latent_frame_of
from wan_common.scheduler import advance, initial_state, load_scheduler, step_table
from wan_common.step_latents import (
    DTYPES,
    BackgroundWriter,
    StepLatents,
    StepLatentsWriter,
    step_file,
    steps_on_disk,
)  # fmt: skip
from wan_common.tensor_io import load_tensors, save_tensors
from wan_common.video import probe, read_video

MODEL = Path(__file__).parent.parent / "demo_model"
STEPS = 20
FRAMES, HEIGHT, WIDTH = 9, 64, 96
SHAPE = (1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)


def metadata(steps: int = STEPS, seed: int = 0, fingerprint: str = "clip") -> dict[str, object]:
    return {
        "num_inference_steps": steps, "seed": seed, "fingerprint": fingerprint,
        "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 16,
    }  # fmt: skip


def target() -> np.ndarray:
    """A clean clip: a blob that moves over a gradient, in every channel its own."""
    _, channels, frames, height, width = SHAPE
    y, x = np.mgrid[:height, :width] / height
    p = np.arange(frames)[:, None, None]
    blob = ((x - 0.4 - 0.3 * p) ** 2 + (y - 0.5) ** 2 < 0.08).astype(np.float32)
    weights = np.linspace(-1, 1, channels)[:, None, None, None]
    return np.float32(weights * (2 * blob - 0.8) + np.cos(3 * x + y + 5 * weights))[None]


def denoise(folder: Path, steps: int = STEPS, seed: int = 0, dtype: str = "float16") -> np.ndarray:
    """Run the toy denoising through ``StepLatentsWriter``; the final latents, fp32."""
    table = step_table(load_scheduler(MODEL / "scheduler", 3.0), steps)
    noise = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    state = initial_state(jnp.asarray(noise), table.order)
    clean = target()
    with StepLatentsWriter(folder, metadata(steps, seed, f"clip{seed}"), dtype) as writer:
        writer.initial_noise(state["sample"])
        for i, sigma in enumerate(table.sigmas[:-1]):
            belief = (1 - sigma) * clean + sigma * clean.mean(axis=(3, 4), keepdims=True)
            velocity = (state["sample"] - belief) / sigma
            state, x0 = advance(state, velocity, table.predicted_x0[i], table.corrected[i], table.next_sample[i])
            writer.step(i, state["sample"], x0, table.timesteps[i], sigma, table.sigmas[i + 1])
    return np.asarray(state["sample"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one clip of 20 steps."""
    folder = tmp_path_factory.mktemp("run")
    denoise(folder / "step_latents")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the clip's folder to spoil."""
    folder = tmp_path / "run" / "step_latents"
    folder.mkdir(parents=True)
    for path in (run / "step_latents").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def drawn(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of the clip, with two frames and statistics."""
    out = tmp_path_factory.mktemp("drawn") / "views"
    visualize(run, out, "--frames", "0", "8", "--save_tensor_stats")
    return out


def visualize(run: Path, out: Path, *flags: str) -> None:
    visualize_frames.main(["--input_dir", str(run), "--output_dir", str(out), "--model_id", str(MODEL), *flags])


def read_png(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


# ---- writing


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_files_hold_what_was_given(tmp_path: Path, dtype: str) -> None:
    x, x0 = (np.random.default_rng(i).standard_normal(SHAPE).astype(np.float32) for i in range(2))
    with StepLatentsWriter(tmp_path, metadata(1), dtype) as writer:
        writer.initial_noise(jnp.asarray(x0))
        writer.step(0, jnp.asarray(x), x0, np.float32(999), np.float32(0.9), 0.25)
    tensors, header = load_tensors(tmp_path / "step_000.safetensors")
    np.testing.assert_array_equal(tensors["latents"], x.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(tensors["predicted_x0"], x0.astype(DTYPES[dtype]))
    assert tensors["latents"].dtype == DTYPES[dtype]
    step = {"step": "0", "timestep": "999.0", "sigma": repr(float(np.float32(0.9))), "sigma_next": "0.25"}
    assert header == step | {key: str(value) for key, value in metadata(1).items()}
    clip = StepLatents.open(tmp_path)
    np.testing.assert_array_equal(clip.initial_noise(), x0.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(clip.read(clip.steps[0])[0], x.astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_arrays_may_be_donated_to_the_next_step(tmp_path: Path, dtype: str) -> None:
    advance_in_place = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    with StepLatentsWriter(tmp_path, metadata(3), dtype) as writer:
        x = jnp.ones(SHAPE)
        writer.initial_noise(x)
        for i in range(3):
            given = x + i
            writer.step(i, given, given, 0, 1, 0)
            advance_in_place(given)
            assert given.is_deleted()
    for i in range(3):
        assert (load_tensors(tmp_path / step_file(i))[0]["latents"] == 1 + i).all()


def test_sharded_arrays_are_gathered(tmp_path: Path) -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    x = np.random.default_rng(0).standard_normal((1, 16, 1, 8, 8)).astype(np.float32)
    for spec in (jax.P(), jax.P(None, "x")):
        with StepLatentsWriter(tmp_path, metadata(1), "float32") as writer:
            writer.initial_noise(jax.device_put(x, jax.NamedSharding(mesh, spec)))
        np.testing.assert_array_equal(load_tensors(tmp_path / "initial_noise.safetensors")[0]["latents"], x)


def test_writing_happens_behind_the_callers_back_in_order_and_bounded() -> None:
    gate, done = threading.Event(), []
    with BackgroundWriter(depth=2) as writer:
        writer.submit(lambda: (gate.wait(10), done.append(0)))
        writer.submit(done.append, 1)
        assert done == []  # the first call is still waiting, and the caller is already here
        filler = threading.Thread(target=lambda: [writer.submit(done.append, i) for i in (2, 3, 4)])
        filler.start()
        filler.join(0.2)
        assert filler.is_alive()  # two wait in the queue, the third has to wait for room
        gate.set()
        filler.join(10)
        writer.flush()
        assert done == [0, 1, 2, 3, 4]


def test_errors_of_the_thread_surface_once_in_the_next_call(tmp_path: Path) -> None:
    writer = StepLatentsWriter(tmp_path / "clip", metadata())
    (tmp_path / "clip").rmdir()
    x = np.zeros(SHAPE, np.float32)
    writer.step(0, x, x, 0, 1, 0)
    with pytest.raises(OSError, match="clip"):
        writer.flush()
    writer.step(1, x, x, 0, 1, 0)
    with pytest.raises(OSError, match="clip"):
        writer.close()
    writer.close()
    with pytest.raises(KeyError, match="body"), StepLatentsWriter(tmp_path / "other", metadata()) as other:
        (tmp_path / "other").rmdir()
        other.step(0, x, x, 0, 1, 0)
        raise KeyError("the body's own error wins")


def test_a_fresh_clip_removes_the_files_of_an_earlier_run(copy: Path) -> None:
    (copy / ".tmp-step_003-abc.safetensors").write_bytes(b"half")
    (copy / "notes.txt").write_text("the user's")
    StepLatentsWriter(copy, metadata(5)).close()
    assert [path.name for path in copy.iterdir()] == ["notes.txt"]


def test_a_continued_clip_keeps_its_earlier_steps(copy: Path) -> None:
    assert steps_on_disk(copy, "clip0") == STEPS
    assert steps_on_disk(copy, "clip0", "bfloat16") == steps_on_disk(copy, "another") == -1
    (copy / step_file(12)).write_bytes((copy / step_file(12)).read_bytes()[:-1])
    assert steps_on_disk(copy, "clip0") == 12
    x = np.zeros(SHAPE, np.float32)
    with StepLatentsWriter(copy, metadata(fingerprint="clip0"), first_step=7) as writer:
        assert sorted(path.name for path in copy.iterdir()) == ["initial_noise.safetensors", *map(step_file, range(7))]
        for i in range(7, STEPS):
            writer.step(i, x, x, 0, 1, 0)
    assert len(StepLatents.open(copy).steps) == STEPS
    for settings, dtype in ((metadata(), "float16"), (metadata(fingerprint="clip0"), "bfloat16")):
        with pytest.raises(ArtifactError, match=r"0 of the 7 steps before this one are there; restart .*--save_step_latents"):
            StepLatentsWriter(copy, settings, dtype, first_step=7)
    assert len(list(copy.iterdir())) == STEPS + 1  # refusing removed nothing


def test_latents_beyond_the_range_of_float16_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = np.full(SHAPE, 1e5, np.float32)
    with np.errstate(over="ignore"), StepLatentsWriter(tmp_path, metadata()) as writer:
        writer.initial_noise(x)
        writer.step(0, x, x, 0, 1, 0)
    assert [record.message.split(": ")[1] for record in caplog.records if record.levelno == logging.WARNING] == [
        "not finite from here on in float16 (diverged, or beyond its range)"
    ]


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need the metadata seed, fingerprint"):
        StepLatentsWriter(tmp_path, {k: v for k, v in metadata().items() if k not in ("seed", "fingerprint")})
    with pytest.raises(ValueError, match="not int8"):
        StepLatentsWriter(tmp_path, metadata(), "int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write here.*--save_step_latents"):
        StepLatentsWriter(tmp_path / "file" / "clip", metadata())


# ---- reading


def spoil(copy: Path, how: str) -> None:
    path = copy / step_file(7)
    tensors, header = load_tensors(path)
    match how:
        case "missing":
            path.unlink()
        case "last missing":
            (copy / step_file(STEPS - 1)).unlink()
        case "noise missing":
            (copy / "initial_noise.safetensors").unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "text":
            path.write_text("hello")
        case "foreign":
            save_tensors(path, {"weight": np.zeros(3, np.float32)})
        case "no header":
            save_tensors(path, tensors)
        case "another clip":
            save_tensors(path, tensors, header | {"fingerprint": "another"})
        case "another step":
            save_tensors(path, tensors, header | {"step": "8"})
        case "another size":
            save_tensors(path, {name: tensor[..., :4] for name, tensor in tensors.items()}, header)
        case "another dtype":
            save_tensors(path, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, header)
        case "bad number":
            save_tensors(path, tensors, header | {"sigma": "much"})
        case "extra":
            save_tensors(copy / step_file(STEPS), tensors, header)
        case "empty":
            for file in copy.iterdir():
                file.unlink()


SPOILED = {
    "missing": r"step_007.safetensors: missing; 19 of 20 steps are there",
    "last missing": r"step_019.safetensors: missing; 19 of 20 steps are there \(--partial shows",
    "noise missing": r"initial_noise.safetensors: No such file",
    "truncated": r"step_007.safetensors: truncated or foreign: \d+ bytes, the header describes \d+",
    "text": r"step_007.safetensors: not a safetensors file, or truncated",
    "foreign": r"step_007.safetensors: no tensor 'latents' \(it has weight\): not step latents",
    "no header": r"step_007.safetensors: its header has no 'num_inference_steps': not step latents",
    "another clip": r"step_007.safetensors: fingerprint is another, initial_noise.safetensors has clip0: not one clip",
    "another step": r"step_007.safetensors: holds step 8",
    "another size": r"step_007.safetensors: tensors are float16\[1, 16, 3, 8, 4\], .* has float16\[1, 16, 3, 8, 12\]",
    "another dtype": r"step_007.safetensors: tensors are float32\[.*\], .* has float16\[",
    "bad number": r"step_007.safetensors: sigma is 'much', not a number",
    "extra": r"step_020.safetensors: a clip of 20 steps has no such step",
    "empty": r"initial_noise.safetensors: No such file",
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_clips_are_refused_and_nothing_is_written(copy: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    spoil(copy, how)
    with pytest.raises(ArtifactError, match=SPOILED[how] + r".*stage2_transformer.py --save_step_latents"):
        StepLatents.open(copy)
    out = tmp_path / "views"
    assert run_command(visualize_frames.main, ["--input_dir", str(copy.parent), "--output_dir", str(out)]) == 3
    assert not out.exists()


def test_a_run_without_step_latents_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no step_latents folder in it; .*--save_step_latents"):
        visualize_frames.main(["--input_dir", str(tmp_path)])
    with pytest.raises(ArtifactError, match=r"--step_latents step_latents_seed9: no such folder.*--save_step_latents"):
        visualize_frames.main(["--input_dir", str(tmp_path), "--step_latents", "step_latents_seed9"])


def test_partial_clips_are_shown_when_asked_for(copy: Path, tmp_path: Path) -> None:
    for i in range(3, STEPS):
        (copy / step_file(i)).unlink()
    visualize(copy.parent, tmp_path / "views", "--partial")
    assert probe(tmp_path / "views" / frame_debug.DENOISING_VIDEO)["frames"] == 4


# ---- drawing


def test_every_file_of_seed_000(run: Path, drawn: Path) -> None:
    clip = StepLatents.open(run / "step_latents")
    timesteps = [int(step.timestep) for step in clip.steps]
    assert timesteps[0] == 999
    folder = drawn / "frame_debug"
    for kind, size in (
        ("noise", (800, 1000, 3)),
        ("current_image", (1000, 1000, 3)),
        ("predicted_x0", (1000, 1000, 3)),
    ):
        for i in (0, 8):
            pictures = [read_png(folder / f"{kind}_t{t}_frame{i}.png") for t in timesteps]
            assert {picture.shape for picture in pictures} == {size}
            assert len({picture.tobytes() for picture in pictures}) == STEPS
            assert all((folder / f"{kind}_t{t}_frame{i}_stats.json").is_file() for t in timesteps)
    for kind in ("noise", "current_image"):
        assert (folder / f"{kind}_initial_frame0.png").is_file()
    for name, size in (
        ("wan_visualization_denoising_process.mp4", (1000, 1000)),
        ("wan_visualization_noise_evolution.mp4", (1000, 800)),
        ("wan_visualization_side_by_side.mp4", None),
    ):
        found = probe(drawn / name)
        assert (found["codec"], found["pix_fmt"], found["fps"], found["frames"]) == ("h264", "yuv420p", 4, STEPS + 1)
        assert size in (None, found["size"]) and not any(n % 2 for n in found["size"])
    assert not list(drawn.rglob(".tmp-*"))


def test_videos_show_the_pictures(tmp_path: Path) -> None:
    denoise(tmp_path / "step_latents", 2)
    visualize(tmp_path, tmp_path / "views")
    for name, kind in ((frame_debug.DENOISING_VIDEO, "current_image"), (frame_debug.NOISE_VIDEO, "noise")):
        frames = list(read_video(tmp_path / "views" / name))
        for frame, key in ((frames[0], "initial"), (frames[1], "t999")):
            picture = read_png(tmp_path / "views" / "frame_debug" / f"{kind}_{key}_frame0.png")
            assert np.abs(frame.astype(float) - picture).mean() < 3  # 4:2:0 and quality 8


def test_statistics_equal_numpy(run: Path, drawn: Path) -> None:
    for kind, tensor in (("noise", "latents"), ("predicted_x0", "predicted_x0")):
        stats = json.loads((drawn / "frame_debug" / f"{kind}_t999_frame8_stats.json").read_text())
        assert stats["source"] == "step_latents/step_000.safetensors" and stats["tensor"] == tensor
        values = load_tensors(run / stats["source"])[0][tensor]
        assert (stats["shape"], stats["dtype"]) == (list(values.shape), "float16")
        wide = values.astype(np.float64)
        assert [stats[k] for k in ("mean", "std", "min", "max")] == [wide.mean(), wide.std(), wide.min(), wide.max()]
        assert stats["nan_count"] == stats["inf_count"] == 0
    stats = json.loads((drawn / "frame_debug" / "noise_t999_frame8_stats.json").read_text())["shown"]
    plane = load_tensors(run / "step_latents" / "step_000.safetensors")[0]["latents"][0, 0, 2].astype(np.float64)
    assert (stats["shape"], stats["mean"], stats["max"]) == ([8, 12], plane.mean(), plane.max())


def test_statistics_count_what_is_not_finite() -> None:
    values = np.array([1, 2, np.nan, np.inf, -np.inf, 3], np.float16)
    expected = {"mean": 2.0, "std": np.std([1, 2, 3]), "min": 1.0, "max": 3.0, "nan_count": 1, "inf_count": 2}
    assert frame_views.tensor_stats(values) == {"shape": [6], "dtype": "float16"} | expected
    nothing = frame_views.tensor_stats(np.array([np.nan]))
    assert (nothing["mean"], nothing["nan_count"]) == (None, 1)
    assert frame_views.tensor_stats(np.array([3, 5], np.uint8))["mean"] == 4.0


def test_curves_equal_numpy(run: Path, drawn: Path) -> None:
    clip = StepLatents.open(run / "step_latents")
    curves, limit = frame_views.measure(clip, 3)
    x = np.stack([clip.initial_noise(), *(clip.read(step)[0] for step in clip.steps)]).astype(np.float64)
    x0 = np.stack([clip.read(step)[1] for step in clip.steps]).astype(np.float64)
    axes = (1, 2, 3, 4, 5)
    for name, values, start in (("", x, 0), ("x0_", x0, 1)):
        np.testing.assert_allclose(getattr(curves, f"{name}mean")[start:], values.mean(axis=axes), atol=1e-6)
        np.testing.assert_allclose(getattr(curves, f"{name}std")[start:], values.std(axis=axes), rtol=1e-5)
        change = np.sqrt((np.diff(values, axis=0) ** 2).mean(axis=axes))
        np.testing.assert_allclose(getattr(curves, f"{name}change")[start + 1 :], change, rtol=1e-5)
    np.testing.assert_allclose(curves.channel_mean, x.mean(axis=(1, 3, 4, 5)), atol=1e-6)
    np.testing.assert_allclose(curves.channel_std, x.std(axis=(1, 3, 4, 5)), rtol=1e-5)
    assert limit == pytest.approx(max(np.quantile(np.abs(plane[0, 3]), 0.999) for plane in x))
    index = json.loads((drawn / "frame_debug" / "index.json").read_text())["curves"]
    assert index["std"] == [*curves.std] and index["x0_change"][:2] == [None, None]


def test_the_index_maps_steps_to_files(drawn: Path) -> None:
    index = json.loads((drawn / "frame_debug" / "index.json").read_text())
    assert [entry["step"] for entry in index["entries"]] == [None, *range(STEPS)]
    assert index["entries"][1]["files"]["noise"] == {"0": "noise_t999_frame0.png", "8": "noise_t999_frame8.png"}
    files = [n for e in index["entries"] for kind in e["files"].values() for n in kind.values()]
    assert len(files) == 2 * (3 * STEPS + 2)
    assert {*files} < {*index["names"]} == {path.name for path in (drawn / "frame_debug").iterdir()} - {"index.json"}


def test_the_contact_sheet_goes_from_noise_to_the_final_frame(run: Path, drawn: Path) -> None:
    """Its cells are compared with pictures decoded here: the sheet shows them pixel for pixel."""
    sheet = read_png(drawn / frame_debug.CONTACT_SHEET)
    sheet = sheet[:, : sheet.shape[1] // 2]  # x; the other half is x0, whose last row is the same
    clip = StepLatents.open(run / "step_latents")
    coefficients = load_latent_rgb(MODEL)
    size = frame_debug.cell_size(STEPS + 1, 4, SHAPE[3:])
    places = []
    for latents in (clip.initial_noise(), clip.read(clip.steps[0])[0], clip.read(clip.steps[-1])[0]):
        picture = latents_to_rgb(latents[0].astype(np.float32), coefficients)[0]
        cell = frame_debug.fit(picture, size)
        scores = cv2.matchTemplate(sheet, cell, cv2.TM_SQDIFF)
        places.append(np.unravel_index(scores.argmin(), scores.shape))
        assert scores.min() <= 1e-6 * cell.size * 255**2
    (first_y, first_x), (second_y, second_x), (last_y, last_x) = places
    assert first_y < second_y < last_y and first_x == second_x == last_x
    assert last_y - first_y == STEPS * (second_y - first_y)


def test_final_pictures_are_the_last_x0_pixel_for_pixel(run: Path, drawn: Path) -> None:
    clip = StepLatents.open(run / "step_latents")
    x0 = clip.read(clip.steps[-1])[1][0].astype(np.float32)
    expected = latents_to_rgb(x0, load_latent_rgb(MODEL))
    for video_frame, p in ((0, 0), (8, 2)):
        np.testing.assert_array_equal(read_png(drawn / "frame_debug" / f"final_frame{video_frame}.png"), expected[p])


def test_figures_show_values_in_the_colours_of_their_bar() -> None:
    figure = PanelFigure((10, 8), [""], value_bar(2.0), (4, 3), ("x", "y"))
    values = np.zeros((3, 4), np.float32)
    values[1, 2], values[0, 0] = 1.0, np.nan
    drawn = figure.draw([values], "a title\nof two lines")
    wanted = np.round(np.array(colormaps["RdBu_r"](0.75)[:3]) * 255)
    ys, xs = np.nonzero(np.abs(drawn.astype(int) - wanted).max(axis=2) <= 2)
    panel = (xs > 60) & (xs < 880)  # left of the colour bar
    assert panel.sum() > 20_000
    bad_ys, bad_xs = np.nonzero((drawn == frame_views.BAD).all(axis=2))
    assert bad_ys.size > 20_000
    assert bad_ys.max() < ys[panel].min() and bad_xs.max() < xs[panel].min()  # row 0 is on top, column 0 on the left
    again = figure.draw([np.zeros((3, 4), np.float32)], "another")
    assert not (again == frame_views.BAD).all(axis=2).any()  # nothing of the last picture is left
    assert again.shape == drawn.shape == (800, 1000, 3)


def test_the_noise_level_is_marked_on_its_bar() -> None:
    figure = PanelFigure((10, 10), [""], SIGMA_BAR, (96, 64), ("x", "y"))
    rows = []
    for sigma in (1.0, 0.5, 0.0):
        drawn = figure.draw([np.zeros((8, 12, 3), np.uint8)], "", sigma)
        rows.append(np.nonzero((drawn == (255, 0, 0)).all(axis=2))[0].mean())
    assert rows[0] < rows[1] < rows[2]
    assert rows[1] == pytest.approx((rows[0] + rows[2]) / 2, abs=2)


def test_what_is_not_finite_is_magenta_and_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    denoise(tmp_path / "step_latents", 2)
    path = tmp_path / "step_latents" / step_file(1)
    tensors, header = load_tensors(path)
    tensors["predicted_x0"][0, 3, 0, 2, 5] = np.nan
    save_tensors(path, tensors, header)
    visualize(tmp_path, tmp_path / "views", "--save_tensor_stats")
    folder = tmp_path / "views" / "frame_debug"
    bad = (read_png(folder / "final_frame0.png") == frame_views.BAD).all(axis=2)
    assert list(zip(*np.nonzero(bad), strict=True)) == [(2, 5)]
    key = f"t{float(header['timestep']):.6g}"
    assert json.loads((folder / f"predicted_x0_{key}_frame0_stats.json").read_text())["nan_count"] == 1
    assert "NaN or infinity in step_001.safetensors (x0); drawn in magenta" in caplog.text


def with_timesteps(folder: Path, timesteps: list[float]) -> StepLatents:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with StepLatentsWriter(folder, metadata(len(timesteps))) as writer:
        writer.initial_noise(x)
        for i, timestep in enumerate(timesteps):
            writer.step(i, x, x, timestep, 1 - i / 10, 0.9 - i / 10)
    return StepLatents.open(folder)


def test_timesteps_may_repeat_and_be_fractional(tmp_path: Path) -> None:
    clip = with_timesteps(tmp_path / "step_latents", [999, 967.74, 967.74, 500, 500.25, 57])
    keys = ["t999", "t967.74_step1", "t967.74_step2", "t500", "t500.25", "t57"]
    assert frame_views.step_keys(clip) == keys
    visualize(tmp_path, tmp_path / "views")
    names = {path.name for path in (tmp_path / "views" / "frame_debug").glob("noise_t*")}
    assert names == {f"noise_{key}_frame0.png" for key in keys}


def test_pictures_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    with_timesteps(tmp_path / "step_latents", [999, 500])
    out = tmp_path / "views"
    visualize(tmp_path, out, "--frames", "all", "--save_tensor_stats")
    (out / "frame_debug" / "mine.png").write_bytes(b"the user's")
    assert len(list((out / "frame_debug").glob("*_frame8*"))) == 17
    with_timesteps(tmp_path / "step_latents", [999, 400])
    visualize(tmp_path, out)
    kinds = ("noise", "current_image", "predicted_x0")
    wanted = {f"{kind}_{key}_frame0.png" for kind in kinds for key in ("initial", "t999", "t400")}
    wanted -= {"predicted_x0_initial_frame0.png"}
    assert {p.name for p in (out / "frame_debug").iterdir()} == wanted | {"final_frame0.png", "index.json", "mine.png"}


def test_all_frames_are_drawn(tmp_path: Path) -> None:
    with_timesteps(tmp_path / "step_latents", [999])
    visualize(tmp_path, tmp_path / "views", "--frames", "all", "--channel", "15")
    folder = tmp_path / "views" / "frame_debug"
    noise = [(folder / f"noise_t999_frame{i}.png").read_bytes() for i in range(FRAMES)]
    assert [noise.index(picture) for picture in noise] == [0, 1, 1, 1, 1, 5, 5, 5, 5]  # one picture a latent frame
    assert [latent_frame_of(i) for i in range(FRAMES)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_several_seeds_side_by_side(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for seed, steps in ((1, 3), (2, 2)):
        denoise(folder / f"step_latents_seed{seed}", steps, seed)
    out = tmp_path / "views"
    visualize(folder, out)
    for seed, steps in ((1, 3), (2, 2)):
        assert probe(out / f"seed{seed}" / frame_debug.DENOISING_VIDEO)["frames"] == steps + 1
        assert (out / f"seed{seed}" / "frame_debug" / "noise_t999_frame0.png").is_file()
    assert probe(out / frame_debug.CLIPS_VIDEO)["frames"] == 4
    assert read_png(out / frame_debug.CLIPS_SHEET).ndim == read_png(out / frame_debug.CLIPS_PLOT).ndim == 3
    visualize(folder, tmp_path / "one", "--step_latents", "step_latents_seed2")
    assert (tmp_path / "one" / frame_debug.CONTACT_SHEET).is_file() and not (tmp_path / "one" / "seed2").exists()
    names = visualize_frames.parse_args(["--input_dir", str(folder), "--step_latents", "step_latents_seed2", str(run / "step_latents")])
    assert [*visualize_frames.open_clips(names)] == ["seed2", run.name]


def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    peaks = []
    for steps in (6, 24):
        denoise(tmp_path / f"step_latents_{steps}", steps)
        clip = StepLatents.open(tmp_path / f"step_latents_{steps}")
        tracemalloc.start()
        for entry in frame_views.entries(clip):
            assert entry.x.shape == SHAPE
        frame_views.measure(clip, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "9"], "--frames 9: .* has the video frames 0 to 8"),
        (["--frames", "-1"], "--frames -1: .* has the video frames 0 to 8"),
        (["--frames", "all", "0"], "--frames all 0: wanted numbers, or all alone"),
        (["--channel", "16"], "--channel 16: .* have the channels 0 to 15"),
        (["--fps", "0"], "--fps 0.0: wanted more than 0"),
        (["--step_latents", "step_latents", "step_latents"], "a clip is named twice"),
    ],
)
def test_requests_that_cannot_be_met(run: Path, tmp_path: Path, flags: list[str], message: str, caplog: pytest.LogCaptureFixture) -> None:
    argv = ["--input_dir", str(run), "--output_dir", str(tmp_path / "views"), "--model_id", str(MODEL), *flags]
    with pytest.raises(visualize_frames.UsageError, match=message):
        visualize_frames.main(argv)
    assert not (tmp_path / "views").exists()


def test_an_output_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match=r"cannot write here .*--output_dir"):
            visualize_frames.main(["--input_dir", str(run), "--output_dir", str(out), "--model_id", str(MODEL)])
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_pipelines_yaml(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text(
        "visualize_frame_debug: true\nvisualization_output_dir: pictures\nsave_tensor_stats: true\n"
        "output_dir: runs/a\nmodel_id: demo_model\nframes: 81\nfps: 24\n"
    )
    args = visualize_frames.parse_args(["--config", str(config)])
    assert (args.input_dir, args.output_dir, args.model_id) == ("runs/a", "pictures", "demo_model")
    assert args.save_tensor_stats and args.fps == 4.0 and args.frames is None
    args = visualize_frames.parse_args(["--config", str(config), "--output_dir", "b", "--no-save_tensor_stats"])
    assert args.output_dir == "b" and not args.save_tensor_stats
    config.write_text("save_tensor_stats: 3\n")
    with pytest.raises(visualize_frames.UsageError, match="save_tensor_stats is 3, wanted bool"):
        visualize_frames.parse_args(["--config", str(config)])
    args = visualize_frames.parse_args([])
    assert (args.input_dir, args.output_dir, args.dtype) == ("stage_outputs", "wan_visualization_output", "bfloat16")


def test_the_page_names_every_flag_and_file(drawn: Path) -> None:
    page = (MODEL.parent / "docs" / "FRAMES.md").read_text(encoding="utf-8")
    flags = [flag for action in visualize_frames.build_parser()._actions for flag in action.option_strings]
    assert [flag for flag in flags if f"`{flag}" not in page] == []
    clips = (frame_debug.CLIPS_VIDEO, frame_debug.CLIPS_SHEET, frame_debug.CLIPS_PLOT)
    names = [path.name for path in drawn.iterdir() if path.is_file()] + [frame_debug.INDEX, *clips]
    kinds = {path.name.split("_t999")[0] for path in (drawn / "frame_debug").glob("*_t999_frame0.png")}
    names += [f"{kind}_{{key}}_frame{{i}}.png" for kind in kinds] + ["final_frame{i}.png", "{name}_stats.json"]
    assert len(names) == 14 and [name for name in names if name not in page] == []


# ---- which decoder


HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def plain_model(tmp_path: Path) -> Path:
    """The demo model as hub models are published: without ``latent_rgb.json``."""
    folder = copy_model(MODEL, tmp_path / "plain model")
    (folder / latent_rgb.FILE_NAME).unlink()
    return folder


@pytest.fixture
def cached_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a cache of the hub, as :data:`HUB_ID`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    model = copy_model(MODEL, folder / "snapshots" / "0123abc")
    (model / latent_rgb.FILE_NAME).unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    return model


def decoder_named(*flags: str) -> str:
    return visualize_frames.load_decoder(visualize_frames.parse_args([*flags])).name


def pasted(message: str) -> list[str]:
    """The command that ``message`` names, as a shell splits it."""
    return shlex.split(message[message.index("python -m") :].split(" (or decode")[0])


def quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit on one clip instead of 24."""
    fit = latent_rgb.fit_model
    monkeypatch.setattr(latent_rgb, "fit_model", lambda folder: fit(folder, count=1))


def test_without_a_preview_the_vae_decodes(cached_hub_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_timesteps(tmp_path / "run" / "step_latents", [999])
    argv = ["--input_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "views"), "--model_id", HUB_ID]
    with caplog.at_level(logging.INFO):
        visualize_frames.main(argv)
    said = [record.getMessage() for record in caplog.records if latent_rgb.FILE_NAME in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{HUB_ID} has no latent_rgb.json, so its VAE decodes, as with --decoder vae; ")
    assert pasted(said[0]) == ["python", "-m", "wan_common.latent_rgb", "--model_id", HUB_ID]
    assert json.loads((tmp_path / "views" / "frame_debug" / "index.json").read_text())["decoder"] == "vae"
    assert read_png(tmp_path / "views" / "frame_debug" / "final_frame0.png").shape == (HEIGHT, WIDTH, 3)


def test_a_preview_that_is_there_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert decoder_named("--model_id", str(MODEL)) == "rgb"
    assert not caplog.records


def test_the_preview_that_was_asked_for_has_to_be_there(
    plain_model: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "views"
    argv = ["--input_dir", str(run), "--output_dir", str(out), "--model_id", str(plain_model), "--decoder", "rgb"]
    assert run_command(visualize_frames.main, argv) == 3
    message = capfd.readouterr().err.strip()
    assert "latent_rgb.json: no linear preview for this model; fit it: python -m" in message
    assert message.endswith(" (or decode with --decoder vae)") and not out.exists()
    command = pasted(message)
    assert command == ["python", "-m", "wan_common.latent_rgb", "--model_id", str(plain_model)]  # one word, with its space
    quick_fit(monkeypatch)
    latent_rgb.main(command[3:])
    assert decoder_named("--model_id", str(plain_model), "--decoder", "rgb") == "rgb"
    assert decoder_named("--model_id", str(plain_model)) == "rgb"


def test_the_remedy_names_what_a_user_gives(cached_hub_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "copied" / "snapshots" / "0123abc"
    shutil.copytree(cached_hub_model, elsewhere, symlinks=True)
    for folder, name in ((cached_hub_model, HUB_ID), (elsewhere, str(elsewhere)), (Path("a folder"), "a folder")):
        with pytest.raises(ArtifactError, match=r"no linear preview for this model; fit it") as caught:
            load_latent_rgb(folder)
        assert pasted(str(caught.value)) == ["python", "-m", "wan_common.latent_rgb", "--model_id", name]
        assert "--decoder" not in str(caught.value)  # stage 2's --preview_every fails by it too, and has no such flag
    with pytest.raises(ArtifactError, match=rf"--model_id {HUB_ID} \(or decode with --decoder vae\)"):
        decoder_named("--model_id", HUB_ID, "--decoder", "rgb")
    quick_fit(monkeypatch)
    latent_rgb.main(["--model_id", HUB_ID])
    assert decoder_named("--model_id", HUB_ID) == "rgb"


def test_a_damaged_preview_is_an_error_and_not_passed_over(plain_model: Path) -> None:
    (plain_model / latent_rgb.FILE_NAME).write_text("{}")
    for flags in ([], ["--decoder", "rgb"]):
        with pytest.raises(ArtifactError, match=r"not a file of preview coefficients .*fit it: .*--decoder vae"):
            decoder_named("--model_id", str(plain_model), *flags)


def test_neither_preview_nor_vae(plain_model: Path) -> None:
    (plain_model / "vae").unlink()
    with pytest.raises(ArtifactError, match=r"no linear preview for this model, and its VAE is not there.* no vae/ in it"):
        decoder_named("--model_id", str(plain_model))
    with pytest.raises(ArtifactError, match="no vae/ in it"):
        decoder_named("--model_id", str(plain_model), "--decoder", "vae")


# ---- live preview, and the VAE


def test_the_live_preview_shows_x0(tmp_path: Path) -> None:
    coefficients = load_latent_rgb(MODEL)
    x0 = jnp.asarray(target())
    frame_views.write_preview(tmp_path / "preview.png", x0, coefficients, 3, 20)
    picture = read_png(tmp_path / "preview.png")
    expected = latents_to_rgb(target()[0], coefficients)
    height, width = SHAPE[3:]
    scale = frame_views.PREVIEW_WIDTH // (2 * width)
    assert picture.shape == (26 + 2 * (scale * height + 4), 2 * (scale * width + 4), 3)
    for number, p in enumerate((0, 1, 2, 2)):  # video frames 0, 3, 5, 8
        y, x = 26 + number // 2 * (scale * height + 4), number % 2 * (scale * width + 4)
        cell = picture[y : y + scale * height, x : x + scale * width]
        np.testing.assert_array_equal(cell, expected[p].repeat(scale, axis=0).repeat(scale, axis=1))
    assert (picture[:26] > 128).any()  # the caption


def test_the_vae_decoder_shows_what_stage_3_decodes(tmp_path: Path) -> None:
    """The x0 of the last step is the final latents: decoded, they differ by what fp16 rounds of the latents."""
    from wan_common.mesh import MeshShape, make_mesh
    from wan_common.vae import load_vae_decoder

    final = denoise(tmp_path / "step_latents", 3)[:, :, :2, :4, :4]
    clip = StepLatents.open(tmp_path / "step_latents")
    x0 = clip.read(clip.steps[-1])[1].astype(np.float32)[:, :, :2, :4, :4]
    vae = load_vae_decoder(MODEL, "float32", make_mesh(MeshShape(), jax.devices()[:1]))
    expected = np.concatenate(list(vae.decode(final))).astype(int)
    pictures = frame_views.vae_decoder(vae).frames(x0, range(5))
    difference = np.abs(np.stack([*pictures.values()]) - expected)
    # 1 and 0.01 observed; in bf16 a mean of 1.2, where that decoder itself is 1.0 from the fp32 one (untrained weights).
    assert difference.max() <= 2 and difference.mean() < 0.1
    some = frame_views.vae_decoder(vae).frames(x0, [0, 3])
    assert [*some] == [0, 3] and (some[3] == pictures[3]).all()
    x0[0, 0, 1, 0, 0] = np.nan
    assert (frame_views.vae_decoder(vae).frames(x0, [3])[3] == frame_views.BAD).all()
    assert (frame_views.vae_decoder(vae).frames(x0, [0])[0] == pictures[0]).all()  # frame 0 comes before the NaN
