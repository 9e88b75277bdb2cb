"""Drawing a denoising (what keeping it costs stage 2: bench_stage2_extras.py). Last line: JSON.

  python -m benchmarks.bench_visualize_frames [--steps 50] [--repeats 3] [--skip figures writer draw memory]

- figures: one 10x10 picture by matplotlib alone (the ceiling's opposite), and by PanelFigure, and its PNG;
- writer: how long StepLatentsWriter.step holds up the denoising at 720p, beside writing the same file in place;
- draw: visualize_frames.py on clips of --steps steps at three sizes, a process each: seconds (goal: 30 on 2 idle cores),
  seconds of CPU with ffmpeg's, peak memory;
- memory: the peak with five times the steps.
The clips are noise that turns into a pattern along the schedule, written by StepLatentsWriter: what is drawn does not matter here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"demo": (17, 96, 96), "480p": (81, 480, 832), "720p": (81, 720, 1280)}  # frames, height, width


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of ``call`` after one run that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return round(1000 * statistics.median(seconds), 1)


def bench_figures(repeats: int) -> dict[str, float]:
    """Milliseconds a picture."""
    from matplotlib.figure import Figure

    from wan_common.frame_figures import SIGMA_BAR, PanelFigure, rendered
    from wan_common.frame_views import encode_png

    picture = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)

    def plain() -> np.ndarray:
        figure = Figure(figsize=(10, 10), layout="constrained")
        axes = figure.subplots()
        figure.colorbar(axes.imshow(picture), ax=axes, label="level")
        axes.set(xlabel="x", ylabel="y")
        figure.suptitle("first line\nsecond line")
        return rendered(figure)

    panel = PanelFigure((10, 10), [""], SIGMA_BAR, (1280, 720), ("x", "y"))
    drawn = panel.draw([picture], "first line\nsecond line", 0.5)
    return {
        "matplotlib_ms": median_ms(plain, repeats + 2),
        "panel_figure_ms": median_ms(lambda: panel.draw([picture], "first line\nsecond line", 0.5), 10 * repeats),
        "png_ms": median_ms(lambda: encode_png(drawn), 10 * repeats),
    }


def clip_metadata(steps: int, frames: int, height: int, width: int) -> dict[str, Any]:
    """What stage 2 would put into the headers."""
    return {"num_inference_steps": steps, "seed": 0, "fingerprint": "bench", "frames": frames, "height": height, "width": width, "fps": 16}


def make_clip(folder: Path, steps: int, frames: int, height: int, width: int) -> None:
    """Write a clip's step latents."""
    from wan_common.step_latents import StepLatentsWriter

    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    pattern = np.float32(np.sin(np.arange(shape[4]) / 5) + np.cos(np.arange(shape[3]) / 5)[:, None])
    levels = np.linspace(1, 0, steps + 1)
    with StepLatentsWriter(folder, clip_metadata(steps, frames, height, width)) as writer:
        writer.initial_noise(noise)
        for i, (level, following) in enumerate(itertools.pairwise(levels)):
            x0 = (1 - level) * pattern + 0.3 * level * noise
            writer.step(i, (1 - following) * pattern + following * noise, np.float32(x0), round(999 * level, 3), level, following)


def bench_writer(repeats: int) -> dict[str, float]:
    """Milliseconds that a step's writing costs the caller, at 720p."""
    import jax
    import jax.numpy as jnp

    from wan_common.step_latents import StepLatentsWriter
    from wan_common.tensor_io import save_tensors

    frames, height, width = SIZES["720p"]
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), shape, jnp.float32))
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"latents": x, "predicted_x0": x}

        def in_place() -> None:
            save_tensors(Path(folder) / "in_place.safetensors", {k: np.asarray(v).astype(np.float16) for k, v in tensors.items()})

        held, whole = [], []
        with StepLatentsWriter(Path(folder) / "clip", clip_metadata(100, frames, height, width)) as writer:
            for i in range(2 * repeats + 1):
                begun = time.perf_counter()
                writer.step(i, x, x, 0.0, 1.0, 0.0)
                held.append(time.perf_counter() - begun)
                writer.flush()  # as if the next step took long enough
                whole.append(time.perf_counter() - begun)
        return {
            "in_place_ms": median_ms(in_place, repeats),
            "held_up_ms": round(1000 * statistics.median(held[1:]), 1),
            "behind_ms": round(1000 * statistics.median(whole[1:]), 1),
            "megabytes_a_step": round(2 * x.size * 2 / 1e6, 1),
        }


def draw_here(folder: str, steps: int, size: str) -> None:
    """In a process of its own: make a clip, draw it with the command, print seconds and the peak memory."""
    import visualize_frames

    make_clip(Path(folder) / "step_latents", steps, *SIZES[size])
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    begun = time.perf_counter()
    sys.stdout = sys.stderr
    visualize_frames.main(["--input_dir", folder, "--output_dir", f"{folder}/views", "--model_id", "demo_model"])
    seconds = round(time.perf_counter() - begun, 2)
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - before
    print(json.dumps({"seconds": seconds, "cpu_seconds": round(spent, 2), "peak_mib": peak}), file=sys.__stdout__)


def bench_draw(steps: int, size: str) -> dict[str, float]:
    """``draw_here`` in a process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--draw", folder, "--steps", str(steps), "--size", size]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=("figures", "writer", "draw", "memory"))
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=tuple(SIZES), default="demo", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw_here(args.draw, args.steps, args.size)
        return
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "steps": args.steps}
    parts: dict[str, Callable[[], Any]] = {
        "figures": lambda: bench_figures(args.repeats),
        "writer": lambda: bench_writer(args.repeats),
        "draw": lambda: {size: bench_draw(args.steps, size) for size in SIZES},
        "memory": lambda: {f"{n}_steps": bench_draw(n, "480p")["peak_mib"] for n in (10, 50)},
    }
    for name, part in parts.items():
        if name not in args.skip:
            result[name] = part()
            print(f"{name}: {result[name]}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
