"""The pipeline object of seed 002, generate.py with seed 003's automatic videos, and what keeping things costs when it is off."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import generate
from wan_common.pipeline import WanT2V
from wan_common.video import probe

SMALL = {"num_inference_steps": 2, "height": 32, "width": 48}


def test_one_call_generates_and_draws(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = WanT2V.from_pretrained("demo_model", torch_dtype="float32")
    frames, timing = model.generate_with_attention_visualization("a (red) circle", num_frames=6, output_dir=tmp_path, **SMALL)
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == np.uint8  # 6 is not 4n + 1: as diffusers, the next below
    assert "num_frames 6" in caplog.text
    assert set(timing["stages"]) == {"stage1", "stage2", "stage3"} and timing["total_seconds"] > 0
    for name in ("attention_step_000.png", "attention_montage.png", "attention_animation.gif", "attention_analysis_report.md"):
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "attention_videos" / "prompt_001_vid_001_red_overlay.mp4").is_file()
    assert model.attention_dir is None


def test_enable_and_disable(tmp_path: Path) -> None:
    model = WanT2V("demo_model")
    model.enable_attention_visualization(tmp_path / "drawn")
    model.generate("a red circle", num_frames=1, output_dir=tmp_path / "on", **SMALL)
    assert (tmp_path / "on" / "attention_maps").is_dir() and (tmp_path / "drawn" / "attention_report.html").is_file()
    model.disable_attention_visualization()
    model.generate("a red circle", num_frames=1, output_dir=tmp_path / "off", **SMALL)
    assert not (tmp_path / "off" / "attention_maps").exists()


def test_automatic_videos_of_a_batch(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# two prompts\na (red) circle\n\na (blue) square\n")
    config = {
        "model_id": "demo_model", "prompts_file": str(tmp_path / "prompts.txt"), "videos_per_prompt": 2, "frames": 5, **SMALL,
        "output_dir": str(tmp_path / "run"),
        "attention_analysis": {
            "store_attention": True, "auto_generate_per_video": True, "auto_generate_videos": True,
            "visualization_params": {"figsize": [4, 3], "interpolation_steps": 0},
        },
    }  # fmt: skip
    (tmp_path / "batch.yaml").write_text(yaml.safe_dump(config))
    generate.main(["--config", str(tmp_path / "batch.yaml")])
    for prompt, word in ((1, "red"), (2, "blue")):
        for number in (1, 2):
            folder, clip = tmp_path / "run" / "videos" / f"prompt_{prompt:03d}", f"prompt_{prompt:03d}_vid_{number:03d}"
            assert probe(folder / f"video_{number:03d}.mp4")["frames"] == 5
            for place in (folder / "attention_videos", tmp_path / "run" / "attention_videos"):
                assert (place / f"{clip}_{word}_attention.mp4").is_file(), place
                assert (place / f"{clip}_{word}_overlay.mp4").is_file(), place


def test_step_latents_and_previews_do_not_change_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stage 2 is run both ways, and the text of every step program that it compiles is compared."""
    texts: dict[str, list[str]] = {}
    original = jax.jit

    def run(name: str, *flags: str) -> None:
        texts[name] = []

        def recording(function: object, **options: object) -> object:
            jitted = original(function, **options)
            if getattr(function, "__name__", "") != "step":
                return jitted

            class Recorder:
                def __call__(self, *args: object) -> object:
                    if not texts[name]:
                        texts[name].append(jitted.lower(*args).as_text())
                    return jitted(*args)

                def _cache_size(self) -> int:
                    return jitted._cache_size()

            return Recorder()

        monkeypatch.setattr(jax, "jit", recording)
        small = ["--num_inference_steps", "2", "--height", "32", "--width", "48", "--frames", "5"]
        generate.main(["--model_id", "demo_model", "--prompt", "a circle", "--output_dir", str(tmp_path / name), *small, *flags])
        monkeypatch.setattr(jax, "jit", original)

    run("off")
    run("on", "--save_step_latents", "--preview_every", "1")
    assert (tmp_path / "on" / "step_latents" / "step_001.safetensors").is_file() and (tmp_path / "on" / "preview.png").is_file()
    assert len(texts["off"]) == 1 and texts["off"] == texts["on"]
