"""Stages beside diffusers, in one run on this machine: seconds, ratios (below 1: ours is faster), peak memory. Last line: JSON.

  python -m benchmarks.bench_stages [--repeats 3] [--skip denoise vae memory] [--max_isa AVX2]

- one denoising step of 4 blocks of the 1.3B shape, 1,280 tokens, batch 2, in fp32 and bf16, beside diffusers eager;
- the published VAE's shape at 128x128, 13 frames, beside diffusers' vae.decode in fp32;
- stage 3's peak memory at 81 frames beside 17 (each in a process of its own).
Weights are random: speed does not depend on them. The bf16 ratio says whether the CPU has bf16 instructions: diffusers has slow products
where it has not, and as fast ones as ours where it has. ``--max_isa`` holds both programs to an older CPU's instructions.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCKS, GRID = 4, (1, 64, 80)  # latent frames, height, width: 1 x 32 x 40 = 1,280 tokens
PICTURE, FRAMES = 128, 13


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of each, run in turn so that a drifting machine slows both; one run of each first, not counted."""
    ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, kept in zip((ours, theirs), seconds, strict=True):
            begun = time.perf_counter()
            run()
            kept.append(time.perf_counter() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def bench_denoise(dtype: str, repeats: int) -> dict[str, float]:
    """One transformer call on a batch of two, ours and diffusers', with the same weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import WanTransformer3DModel

    from wan_common.denoiser import build_denoiser
    from wan_common.mesh import MeshShape, make_mesh
    from wan_common.published import WAN_1_3B

    config = {**WAN_1_3B.transformer, "num_layers": BLOCKS}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch_dtype = getattr(torch, dtype)
        model = WanTransformer3DModel.from_config(config)
        model.save_pretrained(folder)
        model = WanTransformer3DModel.from_pretrained(folder, dtype=torch_dtype).eval()
        denoiser = build_denoiser(
            config, make_mesh(MeshShape(), jax.devices()[:1]), height=GRID[1] * 8, width=GRID[2] * 8, frames=1, text_length=512, dtype=dtype
        )
        params = denoiser.load(Path(folder))
    latents = torch.randn(2, 16, *GRID)
    text = torch.randn(2, 512, config["text_dim"])
    timestep = torch.tensor([500, 500])
    predict = jax.jit(denoiser.predict)
    inputs = (jnp.asarray(latents.numpy(), dtype), jnp.int32(500), jnp.asarray(text.numpy(), dtype))

    def theirs() -> Any:
        with torch.no_grad():
            return model(latents.to(torch_dtype), timestep, text.to(torch_dtype), return_dict=False)[0]

    def ours() -> Any:
        return jax.block_until_ready(predict(params, *inputs))

    reference = theirs().float().numpy()
    error = float(np.linalg.norm(np.asarray(ours(), np.float32) - reference) / np.linalg.norm(reference))
    mine, other = alternate(ours, theirs, repeats)
    return {"ours_s": round(mine, 3), "diffusers_s": round(other, 3), "ratio": round(mine / other, 3), "relative_difference": error}


def published_vae(folder: Path) -> Any:
    """A VAE of the published shape with random weights, saved as stage 3 finds it."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan()
    vae.eval()
    vae.save_pretrained(folder / "vae")
    return vae


def bench_vae(repeats: int) -> dict[str, float]:
    """Decoding FRAMES frames in fp32, ours and diffusers'."""
    import torch

    from wan_common.mesh import MeshShape, make_mesh
    from wan_common.vae import load_vae_decoder

    with tempfile.TemporaryDirectory() as folder:
        vae = published_vae(Path(folder))
        decoder = load_vae_decoder(Path(folder), "float32", make_mesh(MeshShape()))
    latents = torch.randn(1, 16, (FRAMES - 1) // 4 + 1, PICTURE // 8, PICTURE // 8)

    def theirs() -> Any:
        with torch.no_grad():
            return vae.decode(latents).sample

    mine, other = alternate(lambda: list(decoder.decode(latents.numpy())), theirs, repeats)
    return {"ours_s": round(mine, 3), "diffusers_s": round(other, 3), "ratio": round(mine / other, 3)}


def decode_once(folder: str, frames: int) -> None:
    """Child process: stage 3's decoding of ``frames`` frames to an mp4; prints its peak resident MiB."""
    import numpy as np

    from wan_common.latents import Latents
    from wan_common.mesh import MeshShape, make_mesh, prepare_jax
    from wan_common.stages import decode_video
    from wan_common.vae import load_vae_decoder

    prepare_jax()
    decoder = load_vae_decoder(Path(folder), "float32", make_mesh(MeshShape()))
    values = np.random.default_rng(0).standard_normal((1, 16, (frames - 1) // 4 + 1, PICTURE // 8, PICTURE // 8)).astype(np.float32)
    decode_video(decoder, Latents(values, {}, {}, {}, "", "", ""), Path(folder) / f"{frames}.mp4", 16)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)  # getrusage's maximum would include the process that started this one


def bench_memory() -> dict[str, float]:
    """Peak memory of decoding 17 and 81 frames, after a run that fills the compilation cache."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        published_vae(Path(folder))
        for frames in (17, 17, 81):
            child = [sys.executable, __file__, "--decode", folder, str(frames)]
            done = subprocess.run(child, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
            peaks[frames] = float(done.stdout.split()[-1])
    return {"peak_mib_17": round(peaks[17]), "peak_mib_81": round(peaks[81]), "ratio": round(peaks[81] / peaks[17], 3)}


def hold_back(isa: str) -> None:
    """Let neither XLA nor torch's libraries use newer instructions than ``isa``; before any of them is imported."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}".strip()
    os.environ["ONEDNN_MAX_CPU_ISA"] = {"AVX512": "AVX512_CORE"}.get(isa, isa)
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = isa
    os.environ["ATEN_CPU_CAPABILITY"] = isa.lower()


def main() -> None:
    """Run what was not skipped, print a line each and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["denoise", "vae", "memory"])
    parser.add_argument("--max_isa", choices=["AVX2", "AVX512"], help="newest instructions that either program may use")
    parser.add_argument("--decode", nargs=2, metavar=("FOLDER", "FRAMES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        decode_once(args.decode[0], int(args.decode[1]))
        return
    if args.max_isa:
        hold_back(args.max_isa)
    from wan_common.mesh import prepare_jax

    prepare_jax()
    results: dict[str, Any] = {"cores": os.cpu_count(), "max_isa": args.max_isa}
    if "denoise" not in args.skip:
        for dtype in ("float32", "bfloat16"):
            results[f"denoise_step_{dtype}"] = bench_denoise(dtype, args.repeats)
            print(dtype, results[f"denoise_step_{dtype}"], flush=True)
    if "vae" not in args.skip:
        results["vae_decode_float32"] = bench_vae(args.repeats)
        print("vae", results["vae_decode_float32"], flush=True)
    if "memory" not in args.skip:
        results["vae_peak_memory"] = bench_memory()
        print("memory", results["vae_peak_memory"], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
