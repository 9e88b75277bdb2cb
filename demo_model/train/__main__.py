"""The whole training of the demo model, from nothing to a graded folder; rerun it to go on after a kill.

    nice -n 19 python -m demo_model.train [--output demo_model] [--work_dir ~/.cache/wan_demo_training]

In order: VAE; encoding of the clips beside the denoiser's training; export; grading of the held-out captions.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from demo_model.train import common

logger = logging.getLogger(__name__)


def _run(module: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_model"), help="folder to write, also the graded one")
    parser.add_argument("--work_dir", type=Path, default=common.WORK_DIR)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = common.work_dir(args.work_dir)
    place = ("--work_dir", folder)
    if not (folder / "vae_final.pt").exists():
        _run("demo_model.train.vae", *place, "--seed", str(args.seed))
    encoder = subprocess.Popen([sys.executable, "-m", "demo_model.train.data", *map(str, place)])
    try:
        _run("demo_model.train.denoiser", *place, "--seed", str(args.seed))
    finally:
        encoder.terminate()
        encoder.wait()
    _run("demo_model.train.export", *place, "--output", args.output)
    _run("demo_model.grade", "--model_id", args.output, "--json", folder / "grading.json", "--sheet", folder / "held_out.png")


if __name__ == "__main__":
    main()
