"""English captions of scenes, in several phrasings, with the object or background each word speaks of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo_model.build import build_tokenizer
from demo_model.train.world import STILL, Actor, Combination, Scene, graded_combinations

HELD_OUT_FILE = Path(__file__).resolve().parent.parent / "held_out_captions.json"
NOTHING, BACKGROUND = -1, -2  # what a word speaks of, when it is no object; objects are 0, 1, ...
Word = tuple[str, int]

_PARTICIPLES = ("moving", "moving", "moving", "going", "sliding", "drifting")
_FINITE = ("moves", "moves", "moves", "goes", "slides", "drifts")
_STILL = ("standing still", "staying still", "sitting still", "that does not move")
_SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}


@dataclass(frozen=True)
class HeldOut:
    """One fixed test caption, the noise seed it is drawn with, and what it must show."""

    caption: str
    seed: int
    color: str
    shape: str
    background: str
    direction: str

    @property
    def combination(self) -> Combination:
        """(colour, shape, background, direction)."""
        return (self.color, self.shape, self.background, self.direction)


def held_out() -> list[HeldOut]:
    """The 60 fixed captions whose combinations training never sees."""
    return [HeldOut(**item) for item in json.loads(HELD_OUT_FILE.read_text(encoding="utf-8"))]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _object(rng: np.random.Generator, actor: Actor, number: int) -> list[Word]:
    size = [(_pick(rng, _SIZE_WORDS[actor.size]), NOTHING)] if actor.size else []
    words = [*size, (actor.color, number), (actor.shape, number)]
    article = _article(words[0][0]) if rng.random() < 0.93 else "the"
    return [(article, NOTHING), *words]


def _motion(rng: np.random.Generator, actor: Actor, finite: bool) -> list[Word]:
    if actor.direction == STILL:
        return _plain(_pick(rng, _STILL))
    verb = _pick(rng, _FINITE if finite else _PARTICIPLES)
    word = actor.direction
    longer = f"to the {word}" if word in ("left", "right") and rng.random() < 0.5 else f"{word}wards"
    return _plain(f"{verb} {word if rng.random() < 0.8 else longer}")


def _background(rng: np.random.Generator, name: str, leading: bool) -> list[Word]:
    name = "grey" if name == "gray" and rng.random() < 0.2 else name
    if leading and rng.random() < 0.5:
        return [(name, BACKGROUND), ("background", BACKGROUND)]
    preposition = _pick(rng, ("on", "on", "on", "against", "over"))
    noun = _pick(rng, ("background", "background", "background", "backdrop"))
    plain = _plain("plain") if rng.random() < 0.1 else []
    article = "a" if plain else _article(name)
    return [*_plain(f"{preposition} {article}"), *plain, (name, BACKGROUND), (noun, BACKGROUND)]


def _plain(text: str) -> list[Word]:
    return [(word, NOTHING) for word in text.split()]


def compose(rng: np.random.Generator, scene: Scene) -> list[Word]:
    """A caption as words with their subjects; a comma is a word of its own. Now and then it leaves something unsaid."""
    style = rng.random()
    finite = style < 0.25
    objects: list[Word] = []
    order = list(range(len(scene.actors)))
    if len(order) == 2 and rng.random() < 0.5:
        order.reverse()
    for position, number in enumerate(order):
        actor = scene.actors[number]
        silent = len(order) == 1 and rng.random() < 0.02
        motion = [] if silent else _motion(rng, actor, finite)
        objects += [*(_plain("and") if position else []), *_object(rng, actor, number), *motion]
    if rng.random() < 0.02:
        return objects
    leading = 0.8 < style
    background = _background(rng, scene.background, leading)
    if leading:
        return [*background, (",", NOTHING), *objects]
    prefix = _plain("a video of") if 0.25 <= style < 0.32 else []
    return [*prefix, *objects, *background]


def text_of(words: list[Word]) -> str:
    """The caption as a user would type it."""
    return " ".join(word for word, _ in words).replace(" ,", ",")


@cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


@cache
def _word_ids(word: str) -> tuple[int, ...]:
    if word == ",":
        return (_tokenizer().token_to_id(","),)
    return tuple(_tokenizer().encode(word, add_special_tokens=False).ids)


def tokens_of(words: list[Word]) -> tuple[list[int], list[int]]:
    """Token ids with the end mark, and each token's subject; the same ids the tokenizer gives for `text_of(words)`."""
    ids, subjects = [], []
    for word, subject in words:
        pieces = _word_ids(word)
        ids += pieces
        subjects += [subject] * len(pieces)
    return [*ids, 1], [*subjects, NOTHING]


def choose_held_out(seed: int = 2026, count: int = 60) -> list[HeldOut]:
    """Draw the held-out list: the two sentences of the README first, the rest so that every value stays frequent."""
    rng = np.random.default_rng(seed)
    chosen: list[Combination] = [("red", "circle", "blue", "right"), ("green", "square", "white", "up")]
    pool = [c for c in graded_combinations() if c not in chosen]
    while len(chosen) < count:
        # Take the candidate whose values are rarest so far; ties are broken by the generator.
        order = rng.permutation(len(pool))
        counts = {(i, v): sum(c[i] == v for c in chosen) for i in range(4) for v in {p[i] for p in pool}}
        best = min(order, key=lambda k: sum(counts[(i, v)] for i, v in enumerate(pool[int(k)])))
        chosen.append(pool.pop(int(best)))
    phrasings = (
        "{a} {color} {shape} moving {direction} on {b} {background} background",
        "{a} {color} {shape} moves {direction} on {b} {background} background",
        "{background} background, {a} {color} {shape} moving {direction}",
    )
    result = []
    for index, (color, shape, background, direction) in enumerate(chosen):
        phrasing = phrasings[0] if index < 40 else phrasings[1] if index < 50 else phrasings[2]
        words = {"color": color, "shape": shape, "background": background, "direction": direction}
        caption = phrasing.format(a=_article(color), b=_article(background), **words)
        result.append(HeldOut(caption, 1000 + index, color, shape, background, direction))
    return result
