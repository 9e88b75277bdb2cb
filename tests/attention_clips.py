"""Synthetic clips with known attention, for the tests of the attention tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wan_common.attention_maps import AttentionSettings, AttentionWriter, ClipInfo, select_targets
from wan_common.video import write_video

VIDEO_ID = "prompt_001_vid_001"
PAD, EOS, OTHER = 0.5, 0.1, 0.05


def store_clip(
    root: Path,
    words: Sequence[str] = ("red", "circle"),
    *,
    size: tuple[int, int] = (96, 64),
    frames: int = 9,
    steps: int = 3,
    weight: Callable[[int, int, int], np.ndarray | float] | None = None,
    video: bool = True,
    video_id: str = VIDEO_ID,
    prompt: str | None = None,
    finish: bool = True,
    **settings: object,
) -> ClipInfo:
    """Store a clip under ``root``: ``weight(word, step, latent frame)`` is its map [H, W]; pads, EOS and the rest are constant.

    The grid is (latent frames, height / 16, width / 16). Written with the stage's own writer. Also writes a gray video.
    """
    width, height = size
    grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
    entries = [{"word": word, "span": [8 * i, 8 * i + len(word)], "tokens": [i], "target": False} for i, word in enumerate(words)]
    num_tokens = len(words) + 2  # one more that is nobody's target, and EOS
    targets = select_targets(entries, num_tokens)
    info = ClipInfo(width, height, frames, 16, grid, steps, num_tokens, 32, " ".join(words) if prompt is None else prompt,
                    [1000 + i for i in range(num_tokens)], "print", extra={"seed": 0})  # fmt: skip
    options = AttentionSettings.from_mapping({"store_attention": True, **settings})
    (root / "attention_maps").mkdir(parents=True, exist_ok=True)
    with AttentionWriter(root / "attention_maps", video_id, targets, options, info) as writer:
        for step in range(steps):
            maps = np.empty((len(targets) + 3, *grid), np.float32)
            for word in range(len(targets)):
                for frame in range(grid[0]):
                    maps[word, frame] = 0.01 * (word + 1) if weight is None else weight(word, step, frame)
            maps[-3:] = np.array([OTHER, EOS, PAD], np.float32)[:, None, None, None]
            shape = (maps.shape[0], *([1] * (len(options.axes) - 3)), *grid)
            writer.step(step, maps.reshape(shape), 1000 - 1000 * step / steps)
        if finish:
            writer.finish()
    if video:
        write_video(root / "output_video.mp4", (np.full((height, width, 3), 90, np.uint8) for _ in range(frames)), 16)
    return info
