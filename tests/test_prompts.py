r"""Prompts: cleaned as diffusers does, ``(word)`` markers stripped, and every word's tokens found."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer

from wan_common.errors import ArtifactError, UsageError
from wan_common.prompts import Prompt, parse_prompt, spread_bytes, words_of
from wan_common.text_encoder import tokenize


def targets(prompt: Prompt) -> list[str]:
    return [prompt.text[a:b] for a, b in prompt.targets]


@pytest.mark.parametrize(
    ("raw", "text", "marked"),
    [
        ("a red circle", "a red circle", []),
        ("A (cat) plays (piano)", "A cat plays piano", ["cat", "piano"]),
        ("a (red circle) on (blue)", "a red circle on blue", ["red circle", "blue"]),
        ("(cat)", "cat", ["cat"]),
        (r"a \(small\) cat", "a (small) cat", []),
        (r"a (cat \(grey\)) runs", "a cat (grey) runs", ["cat (grey)"]),
        ("a (cat", "a (cat", []),
        ("a cat)", "a cat)", []),
        ("a ((cat)) runs", "a cat runs", ["cat"]),
        ("a (big (cat)) runs", "a big cat runs", ["big cat"]),
        ("a () cat", "a cat", []),
        ("a ( cat ) runs", "a cat runs", ["cat"]),
        ("the(cat)s", "thecats", ["cat"]),
        ("一只(猫)在弹琴", "一只猫在弹琴", ["猫"]),
        ("  much   space \n here ", "much space here", []),
        ("cats &amp; dogs", "cats & dogs", []),
    ],
)
def test_markers(raw: str, text: str, marked: list[str]) -> None:
    prompt = parse_prompt(raw)
    assert prompt.text == text
    assert targets(prompt) == marked


@pytest.mark.parametrize("raw", ["a (cat) &lt;b&gt;  plays", r"a \(cat\)", "plain", "(((", "ﬁne “quotes” (x)"])
def test_keep_parentheses_is_what_diffusers_does(raw: str) -> None:
    assert parse_prompt(raw, keep_parentheses=True) == Prompt(prompt_clean(raw))


@pytest.mark.parametrize("raw", ["plain words", "cats &amp; dogs", "“curly”   quotes", "a\ttab"])
def test_without_markers_is_what_diffusers_does(raw: str) -> None:
    assert parse_prompt(raw).text == prompt_clean(raw)


@pytest.mark.parametrize("raw", ["", "   ", "()", "( )", "\n"])
def test_nothing_to_encode(raw: str) -> None:
    with pytest.raises(UsageError, match="--prompt: empty; describe the video"):
        parse_prompt(raw)


def test_the_log_says_what_was_stripped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    parse_prompt("a (cat) runs")
    assert "attention targets: 'cat'; markers are stripped" in caplog.text
    caplog.clear()
    parse_prompt("a cat runs")
    assert caplog.text == ""


def test_words() -> None:
    prompt = parse_prompt("It's a (red circle), well-made: 猫犬 123!")
    found = [(prompt.text[a:b], target) for (a, b), target in words_of(prompt)]
    assert found == [
        ("It's", False), ("a", False), ("red circle", True), ("well-made", False), ("猫", False), ("犬", False), ("123", False)
    ]  # fmt: skip


def test_tokens_of_words(demo_model: Path) -> None:
    """Each word's tokens spell it; EOS and padding belong to none."""
    prompts = [parse_prompt("a (red circle) beside two zebras"), parse_prompt("Ünïcode 猫 (moving)"), Prompt("")]
    tokens = tokenize(demo_model, prompts, 48)
    assert tokens.ids.shape == (3, 48) and tokens.ids.dtype == np.int32
    assert tokens.lengths[2] == 1 and tokens.words[2] == []
    first = {word["word"]: word for word in tokens.words[0]}
    assert [w for w, entry in first.items() if entry["target"]] == ["red circle"]
    assert list(first) == ["a", "red circle", "beside", "two", "zebras"]
    for row, prompt in enumerate(prompts):
        length = tokens.lengths[row]
        assert tokens.ids[row, length - 1] == 1 and (tokens.ids[row, length:] == 0).all()  # EOS, then padding
        claimed = [token for word in tokens.words[row] for token in word["tokens"]]
        assert len(claimed) == len(set(claimed)) and all(token < length - 1 for token in claimed)
        for word in tokens.words[row]:
            assert word["tokens"] and prompt.text[slice(*word["span"])] == word["word"]
            assert word["tokens"] == list(range(word["tokens"][0], word["tokens"][-1] + 1))
    assert [w["word"] for w in tokens.words[1]] == ["Ünïcode", "猫", "moving"]


def test_ids_are_those_of_the_stock_tokenizer(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    text = "A red circle, moving right on a (blue) background"
    stock = AutoTokenizer.from_pretrained(demo_model / "tokenizer")
    wanted = stock([text], padding="max_length", max_length=32, truncation=True, return_attention_mask=True)
    tokens = tokenize(demo_model, [parse_prompt(text, keep_parentheses=True)], 32)
    assert tokens.ids.tolist() == wanted["input_ids"] and tokens.lengths.tolist() == [sum(m) for m in wanted["attention_mask"]]


def test_a_long_prompt_is_cut_with_a_warning_that_shows_the_rest(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = parse_prompt("a red circle moving right on a blue (background) slowly")
    tokens = tokenize(demo_model, [prompt], 6)
    assert tokens.lengths[0] == 6 and tokens.ids[0, 5] == 1
    assert "the encoder takes 6: 'on a blue background slowly' is cut off" in caplog.text
    assert [word["word"] for word in tokens.words[0]] == ["a", "red", "circle", "moving", "right"]
    caplog.clear()
    tokenize(demo_model, [prompt], 64)
    assert caplog.text == ""


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer: no such folder; .*--model_id"):
        tokenize(tmp_path, [Prompt("a")], 8)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        tokenize(tmp_path, [Prompt("a")], 8)


def test_byte_pieces_get_their_own_characters(demo_model: Path) -> None:
    """The demo tokenizer spells Chinese in bytes and gives each the span of the whole run; a mark must not take the neighbours."""
    prompt = parse_prompt("a (红色)圆形 in é (東)京")
    tokens = tokenize(demo_model, [prompt], 64)
    by_word = {entry["word"]: entry for entry in tokens.words[0]}
    pieces = AutoTokenizer.from_pretrained(demo_model / "tokenizer").convert_ids_to_tokens(tokens.ids[0])
    for word in ("红色", "圆", "形", "東", "京", "é"):
        spelled = bytes(int(pieces[i][3:5], 16) for i in by_word[word]["tokens"] if pieces[i].startswith("<0x"))
        assert spelled.decode() == word
    assert [e["word"] for e in tokens.words[0] if e["target"]] == ["红色", "東"]


@pytest.mark.parametrize(
    ("pieces", "offsets", "wanted"),
    [
        (["▁a", "<0xC3>", "<0xA9>"], [(0, 1), (1, 2), (1, 2)], [(0, 1), (1, 2), (1, 2)]),
        (["<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>"], [(3, 5)] * 4, [(3, 4), (3, 4), (4, 5), (4, 5)]),
        (["<0xC3>", "<0xA9>", "<0xC3>"], [(3, 5)] * 3, [(3, 5)] * 3),  # cut in the middle of a character
        (["<0xC3>", "<0xA9>"], [(0, 4)] * 2, [(0, 4)] * 2),  # normalisation made four characters one
    ],
)
def test_spread_bytes(pieces: list[str], offsets: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    assert spread_bytes(pieces, offsets) == wanted
