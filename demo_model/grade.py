"""Does a clip show what its caption says? Plain image analysis that knows nothing of the model.

    python -m demo_model.grade [--model_id demo_model] [--guidance 2.5 1] [--json docs/demo_model/grading.json]

Generates the 60 held-out captions with diffusers in float32 (17 frames at 96x96, 20 steps), measures background,
colour, shape and direction of motion in the pixels, and how well the attention of the object's word covers the object.
`grade_clip` grades any clip, whoever made it.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

from demo_model.build import write_json
from demo_model.train.captions import HeldOut, held_out
from demo_model.train.world import half_extent, signed_distance
from demo_model.words import BACKGROUND_COLORS, DIRECTIONS, OBJECT_COLORS, SHAPES

logger = logging.getLogger(__name__)

MIN_AREA = 60  # pixels; smaller spots are no object (the smallest object of the world has about 270)
MIN_MOTION = 8.0  # pixels between the first and the last quarter of the clip; the world's objects travel 28 to 42


@dataclass(frozen=True)
class Seen:
    """What a clip shows; empty text where nothing was found."""

    background: str
    color: str
    shape: str
    direction: str  # "still" when it moves less than MIN_MOTION


def _nearest(value: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.square(value - np.asarray(names[name], np.float64)).sum()))


def object_masks(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background colour `[3]` and the largest connected foreign region of each frame `[F, H, W]` bool.

    Args:
        clip: `[F, H, W, 3]` uint8.
    """
    border = np.concatenate([clip[:, :3].reshape(-1, 3), clip[:, -3:].reshape(-1, 3)])
    sides = np.concatenate([clip[:, :, :3].reshape(-1, 3), clip[:, :, -3:].reshape(-1, 3)])
    background = np.median(np.concatenate([border, sides]).astype(np.float64), axis=0)
    masks = np.zeros(clip.shape[:3], bool)
    for index, frame in enumerate(clip):
        foreign = np.sqrt(np.square(frame.astype(np.float64) - background).sum(-1)) > 60.0
        count, labels, stats, _ = cv2.connectedComponentsWithStats(foreign.astype(np.uint8), connectivity=8)
        if count > 1:
            largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            if stats[largest, cv2.CC_STAT_AREA] >= MIN_AREA:
                masks[index] = labels == largest
    return background, masks


def _shape_of(mask: np.ndarray) -> str:
    """The shape whose ideal outline, fitted to the mask's bounding box, overlaps it best."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = part.shape
    scores = {}
    for shape in SHAPES:
        half_width, half_height = half_extent(shape, 1.0)
        y, x = np.mgrid[0:height, 0:width] + 0.5
        ideal = signed_distance(shape, 1.0, (2 * x / width - 1) * half_width, (2 * y / height - 1) * half_height) < 0
        scores[shape] = (ideal & part).sum() / (ideal | part).sum()
    return max(scores, key=lambda shape: float(scores[shape]))


def grade_clip(clip: np.ndarray) -> Seen:
    """Background, object colour, shape and direction of a clip `[F, H, W, 3]` uint8 with one object."""
    background, masks = object_masks(clip)
    found = np.flatnonzero(masks.any((1, 2)))
    name = _nearest(background, BACKGROUND_COLORS)
    if len(found) < len(clip) / 2:
        return Seen(name, "", "", "")
    inner = np.stack([cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for mask in masks]).astype(bool)
    pixels = clip[inner if inner.any() else masks].astype(np.float64)
    color = _nearest(np.median(pixels, axis=0), OBJECT_COLORS)
    votes = [_shape_of(masks[index]) for index in found]
    shape = max(SHAPES, key=votes.count)
    centres = np.array([[np.mean(np.nonzero(masks[i])[1]), np.mean(np.nonzero(masks[i])[0])] for i in found])
    quarter = max(1, len(found) // 4)
    dx, dy = centres[-quarter:].mean(0) - centres[:quarter].mean(0)
    if max(abs(dx), abs(dy)) < MIN_MOTION:
        return Seen(name, color, shape, "still")
    axis = (int(np.sign(dx)), 0) if abs(dx) >= abs(dy) else (0, int(np.sign(dy)))
    return Seen(name, color, shape, next(key for key, value in DIRECTIONS.items() if value == axis))


class Watch:
    """Cross-attention weights of the conditional passes, summed over blocks, heads and the chosen steps."""

    def __init__(self, pipeline: WanPipeline) -> None:
        self.active = False
        self.total: torch.Tensor | float = 0.0  # [B, tokens, text length]
        for block in pipeline.transformer.blocks:
            block.attn2.to_q.register_forward_hook(self._query(block.attn2))
            block.attn2.to_k.register_forward_hook(self._key(block.attn2))

    def _query(self, layer: Any) -> Any:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if self.active:
                self.query = layer.norm_q(output).unflatten(-1, (layer.heads, -1)).transpose(1, 2)

        return hook

    def _key(self, layer: Any) -> Any:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if self.active:  # diffusers projects the query first
                key = layer.norm_k(output).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                weights = (self.query @ key.mT * key.shape[-1] ** -0.5).softmax(-1)
                self.total = self.total + weights.mean(1)

        return hook


@torch.no_grad()
def generate(
    pipeline: WanPipeline, items: list[HeldOut], guidance: float, steps: int, watch: Watch | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Clips `[B, 17, 96, 96, 3]` uint8, and the mean attention over the middle half of the steps `[B, 180, 512]`.

    The same calls, in the same order, as `WanPipeline.__call__`, with a batch of prompts that each have a seed.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    captions = [item.caption for item in items]
    guided = guidance > 1.0
    positive, negative = pipeline.encode_prompt(captions, None, guided, max_sequence_length=512)
    generators = [torch.Generator().manual_seed(item.seed) for item in items]
    latents = pipeline.prepare_latents(len(items), 16, 96, 96, 17, torch.float32, torch.device("cpu"), generators)
    scheduler.set_timesteps(steps)
    for index, time in enumerate(tqdm(scheduler.timesteps, desc=f"guidance {guidance}", mininterval=10)):
        if watch is not None:
            watch.active = steps // 4 <= index < steps - steps // 4
        batch = time.expand(len(items))
        velocity = transformer(latents, batch, positive, return_dict=False)[0]
        if watch is not None:
            watch.active = False
        if guided:
            base = transformer(latents, batch, negative, return_dict=False)[0]
            velocity = base + guidance * (velocity - base)
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    config = pipeline.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    frames = []
    for latent in (latents * std + mean).split(1):
        video = pipeline.vae.decode(latent, return_dict=False)[0]
        frames.append(((video[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    attention = watch.total.numpy() if watch is not None and isinstance(watch.total, torch.Tensor) else None
    if watch is not None:
        watch.total = 0.0
    return np.stack(frames), attention


def word_iou(attention: np.ndarray, column: int, real: slice, clip: np.ndarray) -> float:
    """Overlap of a word's map with the object, mean over the five latent frames.

    The map is the word's share among the real tokens at each of 5 x 6 x 6 places, brought to 96x96 bilinearly; its
    top area has as many pixels as the object's mask in that latent frame.

    Args:
        attention: `[180, 512]`.
        column: The word's token position.
        real: Token positions that count as real.
        clip: `[17, 96, 96, 3]` uint8.
    """
    return map_iou((attention[:, column] / attention[:, real].sum(-1)).reshape(5, 6, 6), clip)


def map_iou(share: np.ndarray, clip: np.ndarray) -> float:
    """:func:`word_iou` of a map `[5, 6, 6]`."""
    _, masks = object_masks(clip)
    values = []
    for p in range(5):
        frames = masks[:1] if p == 0 else masks[4 * p - 3 : 4 * p + 1]
        mask = frames.mean(0) >= 0.5
        if not mask.any():
            values.append(0.0)
            continue
        large = cv2.resize(share[p].astype(np.float32), (96, 96), interpolation=cv2.INTER_LINEAR)
        top = np.zeros(96 * 96, bool)
        top[np.argsort(-large, axis=None, kind="stable")[: int(mask.sum())]] = True
        top = top.reshape(96, 96)
        values.append(float((top & mask).sum() / (top | mask).sum()))
    return float(np.mean(values))


def grade_model(model: str, guidance: float, steps: int, limit: int | None, batch: int) -> tuple[dict[str, Any], np.ndarray]:
    """Grades of the held-out captions: shares right, attention IoU, every clip's result; and the clips."""
    pipeline = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    watch = Watch(pipeline)
    items = held_out()[:limit]
    clips, rows = [], []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        frames, attention = generate(pipeline, part, guidance, steps, watch)
        assert attention is not None
        clips.append(frames)
        for item, clip, weights in zip(part, frames, attention, strict=True):
            seen = grade_clip(clip)
            tokens = pipeline.tokenizer(item.caption).input_ids
            places = {word: tokens.index(pipeline.tokenizer(word).input_ids[0]) for word in (item.shape, item.color)}
            row = {"caption": item.caption, "seed": item.seed, "seen": asdict(seen)}
            row["right"] = {key: getattr(seen, key) == getattr(item, key) for key in asdict(seen)}
            words_only, with_end = slice(0, len(tokens) - 1), slice(0, len(tokens))
            row["iou"] = {
                "shape_word": word_iou(weights, places[item.shape], with_end, clip),
                "shape_word_without_end_mark": word_iou(weights, places[item.shape], words_only, clip),
                "color_word": word_iou(weights, places[item.color], with_end, clip),
            }
            rows.append(row)
    shares = {key: float(np.mean([row["right"][key] for row in rows])) for key in rows[0]["right"]}
    shares["all_four"] = float(np.mean([all(row["right"].values()) for row in rows]))
    iou = {key: float(np.mean([row["iou"][key] for row in rows])) for key in rows[0]["iou"]}
    result = {"guidance": guidance, "steps": steps, "captions": len(rows), "right": shares, "mean_iou": iou, "clips": rows}
    return result, np.concatenate(clips)


def contact_sheet(clips: np.ndarray, columns: int = 6) -> np.ndarray:
    """Frames 0, 8 and 16 of each clip side by side, in a grid, `[H, W, 3]` uint8."""
    strips = [np.concatenate([clip[0], clip[8], clip[16]], 1) for clip in clips]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], 1) for i in range(0, len(strips), columns)]
    return np.concatenate(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="demo_model")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.5, 1.0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, help="only the first captions")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write every clip's grades here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) of the first guidance's clips")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    results = []
    for index, guidance in enumerate(args.guidance):
        result, clips = grade_model(args.model_id, guidance, args.steps, args.limit, args.batch)
        results.append(result)
        right = ", ".join(f"{key} {100 * value:.1f}%" for key, value in result["right"].items())
        iou = ", ".join(f"{key} {value:.2f}" for key, value in result["mean_iou"].items())
        print(f"guidance {guidance:g}, {result['captions']} held-out captions: {right}; mean IoU {iou}")
        if index == 0 and args.sheet:
            cv2.imwrite(str(args.sheet), contact_sheet(clips)[..., ::-1])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
