"""From a prompt as typed to clean text, its words, and the tokens of each word."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from wan_common.errors import UsageError

logger = logging.getLogger("prompt")

# A word: letters and digits, joined by apostrophes or hyphens. Scripts written without spaces give one word a character.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt ready for the tokenizer.

    Attributes:
        text: cleaned as diffusers does (``prompt_clean``), attention markers stripped.
        targets: character spans of the words that were marked as ``(word)``.
    """

    text: str
    targets: tuple[tuple[int, int], ...] = ()


def parse_prompt(raw: str, keep_parentheses: bool = False) -> Prompt:
    r"""Clean ``raw`` and take the attention markers out: ``(word)`` marks, ``\(`` and ``\)`` are literal parentheses.

    A parenthesis without its partner is ordinary text. With ``keep_parentheses`` nothing is a marker.

    Raises:
        UsageError: nothing is left to encode.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    cleaned = prompt_clean(raw)
    if keep_parentheses:
        prompt = Prompt(cleaned)
    else:
        prompt = _strip_markers(cleaned)
    if not prompt.text:
        raise UsageError("--prompt: empty; describe the video, for example --prompt 'a red circle moving right on a blue background'")
    return prompt


def _strip_markers(text: str) -> Prompt:
    opened: list[int] = []
    pairs: dict[int, int] = {}
    escaped = {m.start() for m in re.finditer(r"\\[()]", text)}
    for i, char in enumerate(text):
        if i - 1 in escaped:
            continue
        if char == "(":
            opened.append(i)
        elif char == ")" and opened:
            pairs[opened.pop()] = i
    dropped = escaped | set(pairs) | set(pairs.values())
    position = []  # of each character in the text that stays
    kept: list[str] = []
    for i, char in enumerate(text):
        position.append(len(kept))
        if i not in dropped and not (char == " " and (not kept or kept[-1] == " ")):
            kept.append(char)
    position.append(len(kept))
    stripped = "".join(kept)
    spans = []
    for begin, end in sorted(pairs.items()):
        a, b = position[begin], position[end]
        while a < b and stripped[a] == " ":
            a += 1
        while b > a and stripped[b - 1] == " ":
            b -= 1
        inside_another = any(other < begin and end < pairs[other] for other in pairs)
        if a < b and not inside_another:
            spans.append((a, b))
    result = stripped.rstrip()
    if spans:
        marked = ", ".join(repr(result[a:b]) for a, b in spans)
        logger.info("attention targets: %s; markers are stripped before encoding (\\( keeps one, --keep_parentheses all)", marked)
    return Prompt(result, tuple((a, b) for a, b in spans if b <= len(result)))


def words_of(prompt: Prompt) -> list[tuple[tuple[int, int], bool]]:
    """Character spans of the words, in order, and whether each is a target; a marked phrase is one word."""
    words = [(span, True) for span in prompt.targets]
    for match in _WORD.finditer(prompt.text):
        a, b = match.span()
        if not any(a < end and start < b for start, end in prompt.targets):
            words.append(((a, b), False))
    return sorted(words)


def spread_bytes(pieces: list[str], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give each byte piece (``<0xE7>``) the span of its own character.

    Tokenizers spell what they do not know in UTF-8 bytes, and give all bytes of a run the span of the whole run: a marked
    character would take its neighbours with it. A run whose normalised text has another length than its span stays.
    """
    spread = list(offsets)
    is_byte = [_BYTE.fullmatch(piece) is not None for piece in pieces]
    first = 0
    while first < len(pieces):
        last = first + 1
        if is_byte[first]:
            while last < len(pieces) and is_byte[last] and offsets[last] == offsets[first]:
                last += 1
            begin, end = offsets[first]
            try:
                text = bytes(int(piece[3:5], 16) for piece in pieces[first:last]).decode()
            except UnicodeDecodeError:  # cut at the encoder's length
                text = ""
            if len(text) == end - begin:
                of_character = [begin + i for i, char in enumerate(text) for _ in char.encode()]
                spread[first:last] = [(i, i + 1) for i in of_character]
        first = last
    return spread


def token_words(prompt: Prompt, offsets: list[tuple[int, int]], num_tokens: int) -> list[dict[str, Any]]:
    """For each word ``{"word", "span", "tokens", "target"}``; words past the encoder's length are left out.

    Args:
        offsets: character span of every token, as a fast tokenizer gives them (special tokens are empty spans).
        num_tokens: real tokens, EOS (the last of them) included.
    """
    entries = []
    for (start, end), target in words_of(prompt):
        tokens = []
        for index, (a, b) in enumerate(offsets[: num_tokens - 1]):
            overlap = prompt.text[max(a, start) : min(b, end)]
            if overlap.strip():
                tokens.append(index)
        if tokens:
            entries.append({"word": prompt.text[start:end], "span": [start, end], "tokens": tokens, "target": target})
    return entries
