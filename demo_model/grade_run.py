"""Grade this repository's own pipeline: the held-out captions through generate.py, with the attention maps that it stores.

    python -m demo_model.grade_run [--model_id demo_model] [--output_dir DIR] [--json docs/demo_model/grading_run.json]

`grade.py` judges the model through diffusers and hooks; this judges what a user gets: the mp4 files, and the maps that
`visualize_attention.py` reads. One seed for all captions. A finished run in `--output_dir` is graded as it is.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import generate
from demo_model.build import write_json
from demo_model.grade import grade_clip, map_iou
from demo_model.train.captions import HeldOut, held_out
from wan_common.attention_maps import AttentionAnalyzer
from wan_common.video import read_video

logger = logging.getLogger(__name__)


def run(items: list[HeldOut], output: Path, flags: list[str]) -> None:
    """All captions through the three stages, maps of every word stored; what is current is not made again."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("".join(f"{item.caption}\n" for item in items), encoding="utf-8")
    generate.main(["--prompts_file", str(prompts), "--output_dir", str(output), "--store_attention", *flags])


def word_share(analyzer: AttentionAnalyzer, video: str, word: str) -> np.ndarray:
    """The word's share among the real tokens (end mark included) in the middle half of the steps, `[frames, rows, columns]`."""
    steps = analyzer.get_available_steps(video, word)
    total, pad = 0.0, 0.0
    for step in steps[len(steps) // 4 : len(steps) - len(steps) // 4]:
        total = total + analyzer.load_step(video, word, step).attention_map.astype(np.float64)
        pad = pad + (1 - analyzer.load_step(video, "_pad", step).attention_map.astype(np.float64))
    return np.asarray(total / pad)


def grade(items: list[HeldOut], output: Path) -> dict[str, Any]:
    """Shares right and mean IoU of the shape's word, with every clip's result."""
    analyzer = AttentionAnalyzer(output / "attention_maps")
    rows = []
    for number, item in enumerate(items, 1):
        clip = np.stack(list(read_video(output / "videos" / f"prompt_{number:03d}" / "video_001.mp4")))
        seen = grade_clip(clip)
        right = {key: value == getattr(item, key) for key, value in asdict(seen).items()}
        share = word_share(analyzer, f"prompt_{number:03d}_vid_001", item.shape)
        rows.append({"caption": item.caption, "seen": asdict(seen), "right": right, "iou": map_iou(share, clip)})
    shares = {key: float(np.mean([row["right"][key] for row in rows])) for key in rows[0]["right"]}
    return {"captions": len(rows), "right": shares, "mean_iou": float(np.mean([row["iou"] for row in rows])), "clips": rows}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="demo_model")
    parser.add_argument("--output_dir", type=Path, help="keep the run here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, help="only the first captions")
    parser.add_argument("--json", type=Path, help="write every clip's grades here")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    items = held_out()[: args.limit]
    with tempfile.TemporaryDirectory(prefix="wan_grade_") as temporary:
        output = args.output_dir or Path(temporary)
        run(items, output, ["--model_id", args.model_id, "--seed", str(args.seed)])
        result = grade(items, output)
    right = ", ".join(f"{key} {100 * value:.1f}%" for key, value in result["right"].items())
    print(f"{result['captions']} held-out captions through the stages: {right}; mean IoU of the shape's word {result['mean_iou']:.2f}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
