"""All attention videos, pictures and reports of one clip: how long, how much memory. Target: 50 steps x 8 words at 480p in 180 s.

    python -m benchmarks.bench_attention_visualizer [--steps 50] [--words 8] [--size 832x480] [--frames 81]

Stores synthetic maps (smooth noise, and a spot that moves along the diagonal for the first two words) with stage 2's own writer,
writes a matching video, then runs visualize_attention.py in a process of its own. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from wan_common.attention_maps import AttentionSettings, AttentionWriter, ClipInfo, select_targets
from wan_common.latents import latent_frame_of
from wan_common.video import write_video

ROOT = Path(__file__).resolve().parent.parent


def store(folder: Path, steps: int, words: int, width: int, height: int, frames: int) -> float:
    """Write the maps and the video; seconds spent writing maps."""
    grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
    entries = [{"word": f"word{i}", "span": [8 * i, 8 * i + 5], "tokens": [i], "target": False} for i in range(words)]
    prompt = " ".join(str(entry["word"]) for entry in entries)
    targets = select_targets(entries, words + 1)
    info = ClipInfo(width, height, frames, 16, grid, steps, words + 1, 512, prompt, list(range(words + 1)))
    rng = np.random.default_rng(0)
    noise = np.stack([cv2.GaussianBlur(rng.random(grid[1:]), (0, 0), 2) for _ in range(words)]).astype(np.float32)
    rows, columns = np.mgrid[: grid[1], : grid[2]]

    def centre(frame: int) -> tuple[float, float]:
        share = frame / max(1, grid[0] - 1)
        return grid[1] * (0.3 + 0.4 * share), grid[2] * (0.2 + 0.6 * share)

    spots = np.stack([np.exp(-(((rows - y) / 3) ** 2) - ((columns - x) / 3) ** 2) for y, x in map(centre, range(grid[0]))])
    begun = time.perf_counter()
    (folder / "attention_maps").mkdir(parents=True)
    settings = AttentionSettings(store_attention=True)
    with AttentionWriter(folder / "attention_maps", "prompt_001_vid_001", targets, settings, info) as writer:
        for step in range(steps):
            maps = np.empty((words + 3, *grid), np.float32)
            maps[:words] = 0.02 * noise[:, None] + 0.005 * rng.random((words, *grid), np.float32)
            maps[:2] += 0.15 * (step + 1) / steps * spots
            maps[-3], maps[-2] = 0, 0.1
            maps[-1] = 1 - maps[:-1].sum(axis=0)
            writer.step(step, maps, 1000 - 1000 * step / steps)
        writer.finish()
    seconds = time.perf_counter() - begun

    def picture(index: int) -> np.ndarray:
        y, x = centre(latent_frame_of(index))
        frame = np.full((height, width, 3), 60, np.uint8)
        return cv2.circle(frame, (round(x * 16 + 8), round(y * 16 + 8)), height // 10, (200, 30, 30), -1)

    write_video(folder / "output_video.mp4", (picture(index) for index in range(frames)), 16)
    return seconds


def main() -> None:
    """Store, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=81)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        stored = store(run, args.steps, args.words, width, height, args.frames)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        command = [sys.executable, str(ROOT / "visualize_attention.py"), "--input_dir", str(run), "--output_dir", str(run / "out")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        files = [path for path in (run / "out").rglob("*") if path.is_file()]
        print(json.dumps({
            "steps": args.steps, "words": args.words, "size": args.size, "frames": args.frames, "store_seconds": round(stored, 1),
            "seconds": round(seconds, 1), "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "peak_rss_mib": after.ru_maxrss // 1024, "files": len(files), "megabytes": round(sum(p.stat().st_size for p in files) / 1e6),
            "report_megabytes": round((run / "out" / "attention_report.html").stat().st_size / 1e6, 1), "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }))  # fmt: skip


if __name__ == "__main__":
    main()
