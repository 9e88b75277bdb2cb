"""Loading a 1.3B-shaped transformer from several bf16 shards: ours beside WanTransformer3DModel.from_pretrained. Last line: JSON.

  python -m benchmarks.bench_loading [--repeats 3] [--layers 30] [--folder DIR]

Each load runs in a process of its own; the time is from the call to weights that are resident (every page touched). The peak is
of all resident memory (VmRSS, mapped files included; sampled every 5 ms), above the weights themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


class PeakMemory(threading.Thread):
    """Samples this process's resident memory; ``peak`` is in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = self.read()
        self.running = True

    @staticmethod
    def read() -> int:
        """VmRSS in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no VmRSS in /proc/self/status")

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.read())
            time.sleep(0.005)


def make_checkpoint(folder: Path, layers: int) -> None:
    """A transformer of the published 1.3B shape with random bf16 weights, in shards of 500 MB."""
    import torch
    from diffusers import WanTransformer3DModel

    from wan_common.published import WAN_1_3B

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = WanTransformer3DModel.from_config({**WAN_1_3B.transformer, "num_layers": layers})
    model.save_pretrained(folder, max_shard_size="500MB")


def load_ours(folder: Path) -> dict[str, float]:
    """Child process: stream the weights as stage 2 does."""
    from wan_common.mesh import MeshShape, make_mesh, prepare_jax

    prepare_jax()
    import jax

    from wan_common.denoiser import build_denoiser, read_config

    jax.devices()
    memory = PeakMemory()
    memory.start()
    begun = time.perf_counter()
    config = read_config(folder, "WanTransformer3DModel")
    denoiser = build_denoiser(config, make_mesh(MeshShape()), height=480, width=832, frames=81, text_length=512)
    params = denoiser.load(folder)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begun
    memory.running = False
    resident = sum(p.nbytes for p in params.values())
    largest = max(p.nbytes // (p.shape[0] if "*" in name else 1) for name, p in params.items())
    return {"seconds": seconds, "resident": resident, "largest": largest, "above": memory.peak - memory.base - resident}


def load_theirs(folder: Path) -> dict[str, float]:
    """Child process: diffusers' own way."""
    import torch
    from diffusers import WanTransformer3DModel

    begun = time.perf_counter()
    model = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    touched = sum(float(p.reshape(-1)[:: max(1, 2048)].float().sum()) for p in model.parameters())  # one value a page
    return {"seconds": time.perf_counter() - begun, "checksum": touched}


def main() -> None:
    """Alternate the two loads, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="the published 1.3B model has 30")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept (default: a temporary folder)")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"ours": load_ours, "theirs": load_theirs}[args.child](args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, args.layers)
        results: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for repeat in range(args.repeats + 1):
            for name, kept in results.items():
                command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
                if repeat:  # the first round fills the page cache
                    kept.append(json.loads(done.stdout.splitlines()[-1]))
    ours = results["ours"]
    seconds = {name: statistics.median(run["seconds"] for run in kept) for name, kept in results.items()}
    above = max(run["above"] for run in ours) / 2**20
    largest = ours[0]["largest"] / 2**20
    summary = {
        "shards": len(list(folder.glob("*.safetensors"))), "resident_mib": round(ours[0]["resident"] / 2**20),
        "ours_s": round(seconds["ours"], 2),
        "diffusers_s": round(seconds["theirs"], 2), "ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "largest_tensor_mib": round(largest), "peak_above_weights_mib": round(above), "allowed_mib": round(largest + 512),
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
