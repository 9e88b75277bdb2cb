"""The words of the demo world: what the tokenizer keeps whole and the captions are made of.

Everything else a user may type falls back to single characters and then to bytes, so any prompt tokenises.
"""

from __future__ import annotations

# Object and background colours, sRGB. Far apart from each other, so that a plain nearest-colour rule can grade a clip.
OBJECT_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (150, 40, 190),
    "orange": (250, 130, 20),
}
BACKGROUND_COLORS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "blue": (35, 70, 220),
    "green": (30, 170, 50),
    "pink": (250, 170, 200),
    # Every object colour is a background too. With blue and green alone in both lists, which of two colours was the
    # background followed from the pair in all other captions, and the model never learned to read it (docs/LOG.md).
    **{name: OBJECT_COLORS[name] for name in ("red", "yellow", "purple", "orange")},
}
HELD_OUT_BACKGROUNDS: tuple[str, ...] = ("white", "black", "gray", "blue", "green", "pink")  # of the 60 graded captions
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
# Unit steps (dx, dy) in picture coordinates: y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES: dict[str, tuple[float, float]] = {"small": (12.0, 15.0), "": (15.5, 20.5), "large": (20.5, 24.0)}  # radius, px

# Words of the caption templates (see train/captions.py) and their everyday neighbours.
TEMPLATE_WORDS: tuple[str, ...] = (
    "a an the and on in of to with at over against it its is that this there one two "
    "background screen backdrop scene video clip shape object "
    "moving moves move going goes sliding slides slide travelling travels drifting drifts traveling flying flies "
    "leftwards rightwards upwards downwards leftward rightward upward downward top bottom side "
    "still standing staying stays stands not does motionless sits sitting resting while from across towards "
    "big little tiny huge plain solid grey violet box ball disc plus rectangle colored coloured"
).split()

# Frequent English words and fragments: only so that ordinary prompts are not cut into single letters.
COMMON_PIECES: tuple[str, ...] = (
    "cat dog grass sky sun moon sea water street city house tree flower car boat bird fish man woman girl boy "
    "people person child hand face eye light dark night day morning evening running walking playing jumping "
    "white black pink brown gold silver color through under near between by for as was are be he she they we you "
    "camera shot close slow fast cinematic realistic style beautiful bright high low quality 2 3 4"
).split()
FRAGMENTS: tuple[str, ...] = (
    "ing ed er est ly ion tion ness ment able ful less es s th he in er an re on at en nd ti or te of it al ar "
    "st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
).split()


def all_words() -> list[str]:
    """Every whole-word piece, lower case, without duplicates, in a fixed order."""
    world = [*OBJECT_COLORS, *BACKGROUND_COLORS, *SHAPES, "cross", *DIRECTIONS, *(s for s in SIZES if s)]
    return list(dict.fromkeys([*world, *TEMPLATE_WORDS, *COMMON_PIECES]))
