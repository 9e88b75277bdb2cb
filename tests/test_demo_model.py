"""The demo model: its tokenizer, its world, the training's shortcuts against the stock modules, and what it draws."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from demo_model import grade_run
from demo_model.build import MODEL_MAX_LENGTH, ModelSizes, build, build_tokenizer, build_vae
from demo_model.grade import Seen, Watch, generate, grade_clip, word_iou
from demo_model.train import captions, common, data, vae, vae_sequence, world
from demo_model.train.denoiser import Denoiser
from demo_model.train.muon import orthogonalize
from demo_model.words import all_words
from wan_common.errors import ArtifactError
from wan_common.latent_rgb import LatentRGB, fit_latent_rgb, latents_to_rgb, load_latent_rgb, pool_frames

MODEL = Path(__file__).parent.parent / "demo_model"


def test_any_prompt_tokenises_without_unk() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for prompt in (
        "",
        "a RED circle",
        "猫 дом مرحبا नमस्ते 🎉\x00\ufeff",
        "antidisestablishmentarianism! (x) \\( ½ ﬁ",
        "".join(map(chr, range(1, 1500))),
    ):
        ids = tokenizer(prompt).input_ids
        assert ids[-1] == 1 and 2 not in ids and 0 not in ids
    assert tokenizer.decode(tokenizer("猫 дом").input_ids, skip_special_tokens=True) == "猫 дом"
    padded = tokenizer("a red circle", padding="max_length", max_length=MODEL_MAX_LENGTH, truncation=True)
    assert len(padded.input_ids) == MODEL_MAX_LENGTH and sum(padded.attention_mask) == 4


def test_world_words_are_one_piece_each() -> None:
    tokenizer = build_tokenizer()
    for word in all_words():
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word


def test_training_captions_tokenise_as_the_pipeline_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    for index in range(300):
        rng = np.random.default_rng([3, index])
        words = captions.compose(rng, world.random_scene(rng, frozenset(), 0.3, 0.1))
        ids, subjects = captions.tokens_of(words)
        assert tokenizer(captions.text_of(words)).input_ids == ids
        assert len(subjects) == len(ids)


def test_held_out_combinations_never_reach_training() -> None:
    items = captions.held_out()
    combinations = {item.combination for item in items}
    assert len(items) == len(combinations) == 60
    assert [item.__dict__ for item in captions.choose_held_out()] == [item.__dict__ for item in items]
    for item in items:
        assert all(value in item.caption for value in item.combination)
    seen: set[world.Combination] = set()
    for index in range(1500):
        seen.update(data.training_scene(index, frozenset(combinations)).combinations())
    assert not seen & combinations
    for position in range(4):  # every single colour, shape, background and direction is trained on
        assert {c[position] for c in combinations} <= {c[position] for c in seen}


def test_build_is_deterministic_and_complete(tmp_path: Path) -> None:
    sizes = ModelSizes(text_layers=1, layers=1, vae_base_dim=4)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build(tmp_path / name, seed, sizes)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    digests = {n: [hashlib.sha256((tmp_path / n / f).read_bytes()).hexdigest() for f in files] for n in "abc"}
    assert digests["a"] == digests["b"] != digests["c"]
    pipeline = WanPipeline.from_pretrained(tmp_path / "a", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a cat", height=32, width=48, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 5, 32, 48, 3) and np.isfinite(frames).all() and frames.std() > 0.01


def test_whole_clip_vae_equals_the_chunked_one() -> None:
    torch.manual_seed(0)
    model = build_vae(ModelSizes())
    vae._initialise(model, -6.0)
    for parameter in model.parameters():  # residual branches are silent at first: give every path a part
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    clip = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(clip).latent_dist
        mean, log_variance = vae_sequence.encode(model, clip)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(log_variance, posterior.logvar, rtol=1e-4, atol=1e-4)
        expected = model.decode(mean).sample
        torch.testing.assert_close(vae_sequence.decode(model, mean).clamp(-1, 1), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.05


def test_one_weighted_padded_key_equals_five_hundred() -> None:
    torch.manual_seed(0)
    model = Denoiser(ModelSizes(layers=2, text_layers=1)).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.05)
    tokenizer = build_tokenizer()
    prompts = [tokenizer.encode(text).ids for text in ("a red circle moving right on a blue background", "")]
    lengths = torch.tensor([len(ids) for ids in prompts])
    short, full = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 512, dtype=torch.long)
    for row, ids in enumerate(prompts):
        short[row, : len(ids)] = full[row, : len(ids)] = torch.tensor(ids)
    latents, time = torch.randn(2, 16, 3, 4, 6), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        velocity, attention, logits = model(short, lengths, latents, time)
        mask = (torch.arange(512)[None] < lengths[:, None]).long()
        text = model.text_encoder(full, mask).last_hidden_state * mask[..., None]
        expected = model.transformer(latents, time, text, return_dict=False)[0]
    assert expected.std() > 0.1 and logits.shape == (2, 18, 17 + 1)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 18), rtol=1e-4, atol=1e-4)


def test_text_heads_start_by_looking_at_neighbours() -> None:
    torch.manual_seed(0)
    encoder = Denoiser(ModelSizes(layers=1)).text_encoder.eval()
    ids = torch.tensor([build_tokenizer().encode("a red circle moving right on a blue background").ids])
    with torch.no_grad():
        layers = encoder(ids, torch.ones_like(ids), output_attentions=True).attentions
    tokens = torch.arange(2, ids.shape[1] - 2)
    for weights in layers:  # [1, heads, query, key]
        for head, step in enumerate((1, -1, 2)):
            assert weights[0, head, tokens].argmax(-1).tolist() == (tokens + step).tolist()


def test_muon_update_is_nearly_orthogonal() -> None:
    for shape in ((3, 8, 20), (3, 20, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.5 < values.min() and values.max() < 1.4


def test_vae_training_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = vae.VaeTraining(steps=4, crop=16, crop_batch=2, long_from=1.0, whole_from=1.0, evaluate_every=100)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(vae, "held_out_clips", lambda count: torch.zeros(1, 3, 5, 16, 16))
    whole = vae.train(options, common.work_dir(tmp_path / "whole")).state_dict()
    draw = vae.batch

    def killed_at_three(step: int, chosen: vae.VaeTraining) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return draw(step, chosen)

    monkeypatch.setattr(vae, "batch", killed_at_three)
    with pytest.raises(KeyboardInterrupt):
        vae.train(options, common.work_dir(tmp_path / "cut"))
    monkeypatch.setattr(vae, "batch", draw)
    resumed = vae.train(options, common.work_dir(tmp_path / "cut")).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _clip(combination: world.Combination, seed: int = 0, noise: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clip, coverage = world.render(world.single_scene(rng, combination))
    return np.clip(clip + rng.normal(0, noise, clip.shape), 0, 255).round().astype(np.uint8), coverage


@pytest.mark.parametrize("item", captions.held_out()[::6], ids=lambda item: item.caption)
def test_grading_reads_drawn_clips(item: captions.HeldOut) -> None:
    clip, _ = _clip(item.combination, item.seed)
    assert grade_clip(clip) == Seen(item.background, item.color, item.shape, item.direction)


def test_grading_is_not_fooled() -> None:
    clip, _ = _clip(("red", "circle", "white", "right"))
    assert grade_clip(clip[::-1]).direction == "left"
    assert grade_clip(np.repeat(clip[:1], 17, 0)).direction == "still"
    assert grade_clip(clip[..., ::-1]).color == "blue"
    empty = np.full_like(clip, 245)
    assert grade_clip(empty) == Seen("white", "", "", "")


def test_word_iou_of_perfect_and_opposite_maps() -> None:
    clip, coverage = _clip(("red", "square", "white", "right"), seed=3)
    target = data.token_masks(coverage)[0].reshape(180)
    attention = np.full((180, 512), 1e-3)
    attention[:, 2], attention[:, 3] = 0.01 + target, 1.01 - target
    assert word_iou(attention, 2, slice(0, 10), clip) > 0.6
    assert word_iou(attention, 3, slice(0, 10), clip) < 0.1


def test_linear_preview_recovers_a_linear_map(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights, bias = rng.normal(0, 0.1, (16, 3)).astype(np.float32), np.float32([0.1, -0.2, 0.3])
    latents = rng.normal(0, 1, (16, 3, 4, 5)).astype(np.float32)
    rgb = np.einsum("cfhw,ck->fhwk", latents, weights) + bias
    # Video frame 0 shows latent frame 0, frames 4p-3..4p latent frame p.
    frames = np.concatenate([rgb[:1], np.repeat(rgb[1:], 4, 0)]).repeat(8, 1).repeat(8, 2)
    np.testing.assert_allclose(pool_frames(frames), rgb, atol=1e-6)
    fitted, error = fit_latent_rgb([latents], [frames])
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-3)
    assert error < 0.1
    expected = np.clip(np.rint((rgb + 1) * 127.5), 0, 255)
    assert np.abs(latents_to_rgb(latents, fitted).astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="wanted \\[16, frames"):
        latents_to_rgb(latents[:4], fitted)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"weights": [[1, 2, 3]]}', '{"weights": [[1, 2]], "bias": [0, 0, 0]}', '{"weights": [[1, 2, NaN]], "bias": [0, 0, 0]}'],
)
def test_bad_preview_files_name_the_remedy(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "latent_rgb.json").write_text(text)
    with pytest.raises(ArtifactError, match="python -m wan_common.latent_rgb --model_id"):
        load_latent_rgb(tmp_path)


def test_demo_preview_loads() -> None:
    coefficients = load_latent_rgb(MODEL)
    assert isinstance(coefficients, LatentRGB) and coefficients.weights.shape == (16, 3)


def test_subjects_follow_the_words() -> None:
    scene = world.single_scene(np.random.default_rng(0), ("red", "circle", "blue", "left"))
    texts = [captions.compose(np.random.default_rng(seed), scene) for seed in range(40)]
    said = [words for words in texts if "blue" in dict(words)]
    assert len({captions.text_of(words) for words in texts}) > 20 and len(said) > 30
    for words in said:
        ids, subjects = captions.tokens_of(words)
        assert len(ids) == len(words) + 1
        by_word = dict(zip([word for word, _ in words], subjects, strict=False))
        assert by_word["red"] == by_word["circle"] == 0
        assert by_word["blue"] == captions.BACKGROUND


def test_generated_clips_show_what_was_asked() -> None:
    """The whole pipeline in diffusers: two seeds of one held-out caption; all that it says, and attention on the object."""
    pipeline = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    item = captions.HeldOut("a green square moving up on a white background", 1, "green", "square", "white", "up")
    items = [item, dataclasses.replace(item, seed=2)]
    clips, attention = generate(pipeline, items, guidance=2.5, steps=12, watch=Watch(pipeline))
    assert attention is not None
    tokens = pipeline.tokenizer(item.caption).input_ids
    place = tokens.index(pipeline.tokenizer("square").input_ids[0])
    for clip, weights in zip(clips, attention, strict=True):
        seen = grade_clip(clip)
        assert seen == Seen("white", "green", "square", "up")
        assert word_iou(weights, place, slice(0, len(tokens)), clip) > 0.4
    assert np.abs(clips[0].astype(int) - clips[1]).mean() > 2


def test_a_colour_belongs_to_its_noun() -> None:
    """A held-out caption, and its words with the two colours exchanged: a bag of words could not tell them apart."""
    pipeline = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pairs = (("blue", "green"), ("green", "blue"))
    items = [captions.HeldOut(f"a {a} square moving left on a {b} background", 1, a, "square", b, "left") for a, b in pairs]
    clips, _ = generate(pipeline, items, guidance=2.5, steps=12, watch=None)
    assert [grade_clip(clip) for clip in clips] == [Seen(b, a, "square", "left") for a, b in pairs]


def test_the_stages_show_what_was_asked(tmp_path: Path) -> None:
    """The same through generate.py: what the mp4 files show, and the stored attention maps (demo_model/grade_run.py)."""
    grade_run.main(["--limit", "3", "--output_dir", str(tmp_path / "run"), "--json", str(tmp_path / "grades.json")])
    result = json.loads((tmp_path / "grades.json").read_text())
    assert result["captions"] == 3 and result["mean_iou"] > 0.4
    assert result["right"] == {"background": 1.0, "color": 1.0, "shape": 1.0, "direction": 1.0}, result["clips"]
