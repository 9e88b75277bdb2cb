"""What stage 2 stores with ``--store_attention`` against a dense softmax recomputed by hooks on diffusers' own modules."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from diffusers import UniPCMultistepScheduler, WanPipeline
from jax.sharding import Mesh

import stage1_text_encoder
import stage2_transformer
from wan_common.attention_maps import AttentionAnalyzer, groups_matrix
from wan_common.denoiser import Capture, build_denoiser, read_config
from wan_common.errors import run_command
from wan_common.tensor_io import load_tensors

# What is compared, the bound (issue 4), what was observed on 2 CPU cores.
MAPS_ABSOLUTE = 1e-3  # fp32, a head of a block: 1.0e-5; averaged: 2.2e-6 on one device and on eight
MASS_ABSOLUTE = 1e-3  # 5.1e-6
BF16_ABSOLUTE = 5e-3  # averaged over blocks and heads: 9.4e-4 in the first step; query and key are bf16 there
FLOPS_RATIO = 1.25  # 1.06 with four words, at 180 image tokens and 512 text tokens
STEPS, HEIGHT, WIDTH, FRAMES, GUIDANCE = 3, 64, 96, 5, 5.0
GRID = (2, 4, 6)
PROMPT, NEGATIVE = "a (red) circle and a red skateboarder", "blurry red"
VIDEO = "prompt_001_vid_001"
ALL_GROUPS = ["red", "red#2", "skateboarder", "_other", "_eos", "_pad"]


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    found = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *args: found)


def run_stages(
    folder: Path, *flags: str, dtype: str = "float32", prompt: str = PROMPT, encoded: Path | None = None, **block: object
) -> AttentionAnalyzer:
    """Stages 1 and 2; or stage 2 alone on what ``encoded`` holds."""
    config = folder / "attention.yaml"
    folder.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump({"attention_analysis": {"store_attention": True, **block}}))
    common = ["--model_id", "demo_model", "--output_dir", str(folder), "--dtype", dtype]
    if encoded is None:
        stage1_text_encoder.main([*common, "--prompt", prompt, "--negative_prompt", NEGATIVE])
    stage2_transformer.main([
        *common, "--input_dir", str(encoded or folder), "--config", str(config), "--height", str(HEIGHT), "--width", str(WIDTH), "--frames",
        str(FRAMES), "--num_inference_steps", str(STEPS), "--guidance_scale", str(GUIDANCE), "--seed", "3", *flags,
    ])  # fmt: skip
    return AttentionAnalyzer(folder / "attention_maps")


@functools.cache
def dense_weights(folder: Path) -> np.ndarray:
    """[steps, 2 (prompt, negative), blocks, heads, image tokens, text tokens] fp32 from diffusers' pipeline, in torch alone."""
    tensors, _ = load_tensors(folder / "stage1_embeddings.safetensors")
    pipe = WanPipeline.from_pretrained("demo_model", torch_dtype=torch.float32)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    kept: list[torch.Tensor] = []

    def hook(attn: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        query, key = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(text)))
        )
        kept.append(torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)[0])

    for block in pipe.transformer.blocks:
        block.attn2.register_forward_pre_hook(hook, with_kwargs=True)
    prompt, negative = (torch.tensor(np.asarray(tensors[name], np.float32)) for name in ("prompt_embeds", "negative_prompt_embeds"))
    with torch.no_grad():
        pipe(
            prompt_embeds=prompt, negative_prompt_embeds=negative, height=HEIGHT, width=WIDTH, num_frames=FRAMES, guidance_scale=GUIDANCE,
            num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(3), output_type="latent",
        )  # fmt: skip
    blocks = len(pipe.transformer.blocks)
    assert len(kept) == STEPS * 2 * blocks  # the pipeline runs the prompt, then the negative prompt
    return torch.stack(kept).reshape(STEPS, 2, blocks, *kept[0].shape).numpy()


def expected(analyzer: AttentionAnalyzer, video: str, row: int, encoded: Path) -> dict[str, np.ndarray]:
    """Group -> [steps, blocks, heads, F, H, W], summed over the tokens that its metadata names."""
    weights = dense_weights(encoded)[:, row]
    clip = analyzer.get_video_metadata(video)["clip"]
    result = {}
    for group in analyzer.get_available_tokens(video, include_special=True):
        metadata = analyzer.load_step(video, group, 0).metadata
        tokens = range(clip["num_tokens"], clip["text_length"]) if group == "_pad" else metadata.token_indices
        result[group] = weights[..., list(tokens)].sum(axis=-1).reshape(*weights.shape[:-2], *GRID)
    return result


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> AttentionAnalyzer:
    """Every block and head apart, of both prompts, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        folder = tmp_path_factory.mktemp("stage2") / "apart"
        return run_stages(
            folder, "--attention_tokens", "RED#2", "skateboarder", store_per_head=True, store_per_block=True, store_negative=True
        )


def home(analyzer: AttentionAnalyzer) -> Path:
    return analyzer.attention_dir.parent


def test_every_block_and_head_equals_the_dense_softmax(apart: AttentionAnalyzer) -> None:
    assert apart.get_available_videos() == [VIDEO, VIDEO + "_negative"]
    assert apart.get_available_tokens(VIDEO, include_special=True) == ALL_GROUPS
    for group, want in expected(apart, VIDEO, 0, home(apart)).items():
        for step in range(STEPS):
            found = apart.load_step(VIDEO, group, step)
            assert found.metadata.axes == ["block", "head", "frame", "y", "x"] and found.attention_map.shape == want[step].shape
            np.testing.assert_allclose(found.attention_map, want[step], rtol=0, atol=MAPS_ABSOLUTE, err_msg=f"{group}, step {step}")


def test_the_bound_means_something(apart: AttentionAnalyzer) -> None:
    """Another head, block, step, row, or the transposed picture is further away than the bound allows."""
    want = expected(apart, VIDEO, 0, home(apart))["_pad"]
    negative = expected(apart, VIDEO + "_negative", 1, home(apart))["_pad"]
    found = apart.load_step(VIDEO, "_pad", 1).attention_map
    for what, other in {
        "head": np.roll(found, 1, axis=1), "block": np.roll(found, 1, axis=0), "frame": found[:, :, ::-1], "x": found[..., ::-1],
        "step": want[0], "row": negative[1],
    }.items():  # fmt: skip
        assert np.abs(other - want[1]).max() > 5 * MAPS_ABSOLUTE, what


def test_negative_prompt_equals_the_second_pass(apart: AttentionAnalyzer) -> None:
    video = VIDEO + "_negative"
    assert apart.get_available_tokens(video) == ["blurry", "red"]
    for group, want in expected(apart, video, 1, home(apart)).items():
        for step in range(STEPS):
            found = apart.load_step(video, group, step)
            assert found.metadata.negative
            np.testing.assert_allclose(found.attention_map, want[step], rtol=0, atol=MAPS_ABSOLUTE, err_msg=f"{group}, step {step}")


@pytest.mark.parametrize("devices", [1, 8])
def test_averaged_maps_on_one_device_and_on_a_mesh(
    apart: AttentionAnalyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    use_devices(monkeypatch, devices)
    analyzer = run_stages(tmp_path / "mean", "--attention_tokens", "red#2", "skateboarder", encoded=home(apart))
    worst = 0.0
    for group, want in expected(analyzer, VIDEO, 0, home(apart)).items():
        for step in range(STEPS):
            found = analyzer.load_step(VIDEO, group, step)
            assert found.metadata.averaged_over == ["block", "head"]
            worst = max(worst, np.abs(found.attention_map - want[step].mean(axis=(0, 1))).max())
        np.testing.assert_allclose(
            analyzer.load_aggregated(VIDEO, group).attention_map, want.mean(axis=(0, 1, 2)), rtol=0, atol=MAPS_ABSOLUTE
        )
    assert worst < MAPS_ABSOLUTE
    assert json.loads((tmp_path / "mean" / "generation_config.json").read_text())["provenance"]["stage2"]["devices"]["count"] == devices


def test_masses_sum_to_one(apart: AttentionAnalyzer) -> None:
    for step in range(STEPS):
        total = sum(apart.load_step(VIDEO, group, step).attention_map for group in ALL_GROUPS)
        np.testing.assert_allclose(total, 1, rtol=0, atol=MASS_ABSOLUTE)


def test_words_lie_on_the_very_tokens_that_stage_1_saved(apart: AttentionAnalyzer) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("demo_model/tokenizer")
    ids = load_tensors(home(apart) / "stage1_embeddings.safetensors")[0]["token_ids"][0]
    for word, spelled in (("red", "red"), ("red#2", "red"), ("skateboarder", "skateboarder"), ("_eos", tokenizer.eos_token)):
        metadata = apart.load_step(VIDEO, word, 0).metadata
        assert [int(ids[index]) for index in metadata.token_indices] == metadata.token_ids
        assert tokenizer.decode(metadata.token_ids).strip() == spelled
    first, second, pieces = (apart.load_step(VIDEO, word, 0).metadata.token_indices for word in ("red", "red#2", "skateboarder"))
    assert first[0] < second[0] and len(pieces) > 3  # in several pieces


def test_bf16_is_near(apart: AttentionAnalyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, 1)
    analyzer = run_stages(tmp_path / "bf16", "--attention_tokens", "red#2", "skateboarder", dtype="bfloat16", encoded=home(apart))
    for group, want in expected(analyzer, VIDEO, 0, home(apart)).items():
        found = analyzer.load_step(VIDEO, group, 0).attention_map
        np.testing.assert_allclose(found, want[0].mean(axis=(0, 1)), rtol=0, atol=BF16_ABSOLUTE, err_msg=group)


def test_all_words_of_a_script_without_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, 1)
    analyzer = run_stages(tmp_path / "chinese", prompt="红色的圆圈 кот")
    words = analyzer.get_available_tokens(VIDEO)
    assert words == ["红", "色", "的", "圆", "圈", "кот"]  # spelled in bytes; each character has its own (prompts.spread_bytes)
    groups = [*words, "_other", "_eos", "_pad"]
    np.testing.assert_allclose(sum(analyzer.load_step(VIDEO, group, 2).attention_map for group in groups), 1, rtol=0, atol=MASS_ABSOLUTE)


@pytest.mark.parametrize("word", ["dog", "red#3"])
def test_a_word_that_is_not_in_the_prompt(apart: AttentionAnalyzer, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(home(apart))
    flags = ["--model_id", "demo_model", "--input_dir", folder, "--output_dir", folder, "--store_attention", "--attention_tokens", word]
    assert run_command(stage2_transformer.main, [*flags, "--force"]) == 2
    assert "its words are: a, red, circle, and, a#2, red#2, skateboarder" in capfd.readouterr().err


def lowered(capture: Capture | None, groups: np.ndarray | None, frames: int = 17) -> Any:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("dp", "sp", "tp"))
    config = read_config(Path("demo_model") / "transformer", "WanTransformer3DModel")
    denoiser = build_denoiser(config, mesh, height=96, width=96, frames=frames, text_length=512, dtype="float32", capture=capture)
    return denoiser.jitted().lower(*denoiser.abstract_inputs(2), groups)


def test_off_is_the_same_program_and_on_costs_little() -> None:
    without = lowered(None, None)
    assert lowered(Capture(), None).as_text() == without.as_text()
    groups = np.stack([groups_matrix([], 5, 512)] * 2)
    four_words = np.concatenate([np.zeros((2, 512, 4), np.float32), groups], axis=2)
    with_maps = lowered(Capture(), four_words)
    assert with_maps.as_text() != without.as_text()
    flops = {name: one.compile().cost_analysis()["flops"] for name, one in (("off", without), ("on", with_maps))}
    assert flops["on"] < FLOPS_RATIO * flops["off"]
