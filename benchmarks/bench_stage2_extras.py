"""What keeping step latents, or the attention maps of four words, costs stage 2 on the demo model. Last line: JSON.

  python -m benchmarks.bench_stage2_extras [--steps 50] [--repeats 5] [--extras step_latents attention]

Stage 2 as a user runs it, a process each, without and with each extra in turn; the first round fills the compilation cache and is
not counted. Medians of seconds a step, seconds of the whole denoising (files written), and seconds of the process; ratios to the
run without (goals: 1.05 of the whole for step latents, 1.25 for the maps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a (red) (circle) moving (right) on a (blue) background"
EXTRAS = {"step_latents": ["--save_step_latents"], "attention": ["--store_attention"]}


def run_stage2(folder: str, steps: int, flags: list[str]) -> dict[str, float]:
    """Seconds of one run of stage 2: a step, the denoising, the process."""
    command = ["stage2_transformer.py", "--input_dir", folder, "--output_dir", folder, "--num_inference_steps", str(steps), "--force"]
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command, *flags], cwd=ROOT, check=True, capture_output=True)
    process = time.perf_counter() - begun
    (clip,) = json.loads((Path(folder) / "generation_config.json").read_text())["provenance"]["stage2"]["clips"].values()
    return {"step": clip["seconds"]["per_step"], "denoising": clip["seconds"]["total"], "process": process}


def main() -> None:
    """Alternate the runs, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--extras", nargs="+", choices=list(EXTRAS), default=list(EXTRAS))
    args = parser.parse_args()
    variants = {"without": [], **{name: EXTRAS[name] for name in args.extras}}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        text = ["stage1_text_encoder.py", "--model_id", "demo_model", "--prompt", PROMPT, "--output_dir", folder]
        subprocess.run([sys.executable, *text], cwd=ROOT, check=True, capture_output=True)
        for repeat in range(args.repeats + 1):
            for name, flags in variants.items():
                found = run_stage2(folder, args.steps, flags)
                if repeat:
                    runs[name].append(found)
                print(name, found, file=sys.stderr)
    medians = {name: {key: statistics.median(run[key] for run in kept) for key in kept[0]} for name, kept in runs.items()}
    summary = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "steps": args.steps}
    for name, seconds in medians.items():
        ratios = {f"{key}_ratio": round(seconds[key] / medians["without"][key], 3) for key in seconds} if name != "without" else {}
        summary[name] = {**{f"{key}_s": round(value, 3) for key, value in seconds.items()}, **ratios}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
