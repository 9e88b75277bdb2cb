"""The synthetic world: flat shapes that move over flat backgrounds, drawn with numpy, with captions and masks.

Every scene follows from a `numpy.random.Generator`, so data set index i is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from demo_model.words import BACKGROUND_COLORS, DIRECTIONS, HELD_OUT_BACKGROUNDS, OBJECT_COLORS, SHAPES, SIZES

FRAMES, HEIGHT, WIDTH = 17, 96, 96
TRAVEL = (36.0, 48.0)  # pixels an object moves in one clip
# A lone object passes the middle of the picture within this many pixels. With positions anywhere, the mean clip of a caption
# is a blur, and shape and direction carried too little of the loss to be learnt in hours of a CPU (docs/LOG.md).
OFF_CENTRE = 9.0
MARGIN = 2.0  # pixels between an object and the frame
STILL = "still"
Combination = tuple[str, str, str, str]  # colour, shape, background, direction


@dataclass(frozen=True)
class Actor:
    """One object: what it is and its straight path. Positions are pixel centres (x, y) of its bounding box."""

    color: str
    shape: str
    direction: str  # a key of DIRECTIONS or STILL
    size: str  # a key of SIZES, "" for unnamed
    radius: float
    start: tuple[float, float]
    travel: float


@dataclass(frozen=True)
class Scene:
    """What one clip shows."""

    actors: tuple[Actor, ...]
    background: str
    caption: str = ""

    def combinations(self) -> list[Combination]:
        """(colour, shape, background, direction) of each actor."""
        return [(a.color, a.shape, self.background, a.direction) for a in self.actors]


def graded_combinations() -> list[Combination]:
    """Every combination the held-out list is drawn from: a moving object whose colour differs from the background's."""
    return [
        (color, shape, background, direction)
        for color in OBJECT_COLORS
        for shape in SHAPES
        for background in HELD_OUT_BACKGROUNDS
        for direction in DIRECTIONS
        if color != background
    ]


def half_extent(shape: str, radius: float) -> tuple[float, float]:
    """Half width and half height of a shape's bounding box, in pixels."""
    if shape == "square":
        return 0.886 * radius, 0.886 * radius  # the area of the circle
    if shape == "triangle":
        return 1.178 * radius, 1.02 * radius  # equilateral with inradius 0.68 r
    return radius, radius


def signed_distance(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; `x`, `y` are relative to the bounding box's centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    if shape == "triangle":  # upright; its centroid lies 0.34 r below the box's centre
        y = y - 0.34 * radius
        return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.68 * radius
    raise ValueError(f"shape {shape!r} is not one of {SHAPES}")


def render(
    scene: Scene,
    frames: np.ndarray | None = None,
    window: tuple[int, int, int, int] | None = None,
    palette: dict[str, tuple[float, float, float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: What to draw.
        frames: Frame indices, default all 17 (any float: 16.0 is the end of the path).
        window: (top, left, height, width) to draw only a part; default the whole 96x96 picture.
        palette: Replaces colours, keys "background" and the actor's number as text ("0"), sRGB 0..255.

    Returns:
        Clip `[F, h, w, 3]` float32 in 0..255 with antialiased edges, and coverage `[actors, F, h, w]` in 0..1.
    """
    palette = palette or {}
    time = np.arange(FRAMES, dtype=np.float32) if frames is None else np.asarray(frames, np.float32)
    top, left, height, width = window or (0, 0, HEIGHT, WIDTH)
    ys = (np.arange(top, top + height, dtype=np.float32) + 0.5)[None, :, None]
    xs = (np.arange(left, left + width, dtype=np.float32) + 0.5)[None, None, :]
    background = np.asarray(palette.get("background", BACKGROUND_COLORS[scene.background]), np.float32)
    clip = np.broadcast_to(background, (len(time), height, width, 3)).copy()
    masks = np.zeros((len(scene.actors), len(time), height, width), np.float32)
    for number, actor in enumerate(scene.actors):
        dx, dy = DIRECTIONS.get(actor.direction, (0, 0))
        along = actor.travel * time / (FRAMES - 1)
        cx = (actor.start[0] + dx * along)[:, None, None]
        cy = (actor.start[1] + dy * along)[:, None, None]
        distance = signed_distance(actor.shape, actor.radius, xs - cx, ys - cy)
        masks[number] = np.clip(0.5 - distance, 0.0, 1.0)
        color = np.asarray(palette.get(str(number), OBJECT_COLORS[actor.color]), np.float32)
        alpha = masks[number][..., None]
        clip = clip * (1 - alpha) + color * alpha
    return clip, masks


def place(rng: np.random.Generator, actor: Actor, area: tuple[float, float, float, float]) -> Actor:
    """Give an actor a random start so that its whole path stays in `area` (x0, y0, x1, y1), shortening its travel to fit."""
    half_width, half_height = half_extent(actor.shape, actor.radius)
    x0, y0, x1, y1 = area[0] + half_width, area[1] + half_height, area[2] - half_width, area[3] - half_height
    dx, dy = DIRECTIONS.get(actor.direction, (0, 0))
    travel = min(actor.travel, (x1 - x0) if dx else (y1 - y0) if dy else 0.0)
    low_x, high_x = x0 - min(0, dx * travel), x1 - max(0, dx * travel)
    low_y, high_y = y0 - min(0, dy * travel), y1 - max(0, dy * travel)
    start = (float(rng.uniform(low_x, max(low_x, high_x))), float(rng.uniform(low_y, max(low_y, high_y))))
    return replace(actor, start=start, travel=travel)


def random_actor(rng: np.random.Generator, color: str, shape: str, direction: str, size: str | None = None) -> Actor:
    """An actor of random size (named in 35% of cases) and travel, not yet placed."""
    if size is None:
        size = str(rng.choice(["small", "large"])) if rng.random() < 0.35 else ""
    radius = float(rng.uniform(*SIZES[size]))
    return Actor(color, shape, direction, size, radius, (0.0, 0.0), float(rng.uniform(*TRAVEL)))


def single_scene(rng: np.random.Generator, combination: Combination, size: str | None = None) -> Scene:
    """A scene with one object of the given colour, shape, background and direction."""
    color, shape, background, direction = combination
    actor = random_actor(rng, color, shape, direction, size)
    dx, dy = DIRECTIONS.get(direction, (0, 0))
    half_width, half_height = (h + MARGIN for h in half_extent(shape, actor.radius))
    travel = min(actor.travel, WIDTH - 2 * half_width if dx else HEIGHT - 2 * half_height)
    middle_x, middle_y = WIDTH / 2 + rng.uniform(-OFF_CENTRE, OFF_CENTRE), HEIGHT / 2 + rng.uniform(-OFF_CENTRE, OFF_CENTRE)
    room_x, room_y = half_width + abs(dx) * travel / 2, half_height + abs(dy) * travel / 2
    middle_x = float(np.clip(middle_x, room_x, WIDTH - room_x))
    middle_y = float(np.clip(middle_y, room_y, HEIGHT - room_y))
    start = (middle_x - dx * travel / 2, middle_y - dy * travel / 2)
    return Scene((replace(actor, start=start, travel=float(travel)),), background)


def double_scene(rng: np.random.Generator, background: str) -> Scene:
    """Two different small objects, each in its own half, moving along the same axis (either way each)."""
    horizontal = rng.random() < 0.5
    directions = ["left", "right"] if horizontal else ["up", "down"]
    colors = [c for c in OBJECT_COLORS if c != background]
    picked = [str(c) for c in rng.choice(colors, 2, replace=False)]
    halves = [0, 1] if rng.random() < 0.5 else [1, 0]
    actors = []
    for color, half in zip(picked, halves, strict=True):
        actor = random_actor(rng, color, str(rng.choice(SHAPES)), str(rng.choice(directions)), size="small")
        actor = replace(actor, size="")
        near, far = MARGIN + half * 46.0, MARGIN + 46.0 + half * 46.0
        area = (MARGIN, near, WIDTH - MARGIN, far) if horizontal else (near, MARGIN, far, HEIGHT - MARGIN)
        actors.append(place(rng, actor, area))
    return Scene(tuple(actors), background)


def random_scene(rng: np.random.Generator, excluded: frozenset[Combination], doubles: float, still: float) -> Scene:
    """A training scene: one object (or two, with probability `doubles`), none of whose combinations is excluded.

    `still` is the probability that a single object stands still.
    """
    while True:
        background = str(rng.choice(list(BACKGROUND_COLORS)))
        if rng.random() < doubles:
            scene = double_scene(rng, background)
        else:
            direction = STILL if rng.random() < still else str(rng.choice(list(DIRECTIONS)))
            color = str(rng.choice([c for c in OBJECT_COLORS if c != background]))
            scene = single_scene(rng, (color, str(rng.choice(SHAPES)), background, direction))
        if not excluded.intersection(scene.combinations()):
            return scene
