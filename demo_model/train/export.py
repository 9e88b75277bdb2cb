"""Write the trained weights as a diffusers folder.

    python -m demo_model.train.export [--output demo_model] [--work_dir ~/.cache/wan_demo_training]

Takes the averaged weights of the last checkpoint, finished or not. Transformer and text encoder are stored in
bfloat16, the VAE in float32 (it is small, and bfloat16 would cost it PSNR). Also fits the linear latent preview.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from demo_model.build import ModelSizes, build_vae, write_json, write_model
from demo_model.train import common
from demo_model.train.denoiser import Denoiser
from demo_model.train.vae import held_out_clips, reconstruction_psnr
from wan_common.latent_rgb import main as fit_preview

logger = logging.getLogger(__name__)


def export(folder: Path, output: Path) -> dict[str, float]:
    """Write the model; returns steps, seconds, bytes and the stored VAE's PSNR in dB on 32 held-out clips."""
    vae_state = common.load_checkpoint(folder / "vae_final.pt")
    state = common.load_checkpoint(folder / "denoiser_checkpoint.pt")
    if vae_state is None or state is None:
        raise SystemExit(f"{folder} holds no finished VAE and denoiser checkpoint; run: python -m demo_model.train --work_dir {folder}")
    mean, std = (state["latents"][key].tolist() for key in ("mean", "std"))
    vae = build_vae(ModelSizes(), mean, std)
    vae.load_state_dict(vae_state["model"])
    model = Denoiser(ModelSizes())
    missing, unexpected = model.load_state_dict(state["average"], strict=False)
    if set(missing) - {"text_encoder.encoder.embed_tokens.weight"} or unexpected:
        raise SystemExit(f"{folder}/denoiser_checkpoint.pt is of another architecture: missing {missing}, unexpected {unexpected}")
    size = write_model(output, model.text_encoder, model.transformer, vae, torch.bfloat16, torch.float32)
    fit_preview(["--model_id", str(output)])
    psnr = reconstruction_psnr(vae.eval(), held_out_clips(32))
    result = {"steps": state["step"], "seconds": round(state["seconds"], 1), "bytes": size, "vae_psnr_db": round(psnr, 2)}
    write_json(output / "training.json", result)
    logger.info("%s: %s", output, result)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_model"))
    parser.add_argument("--work_dir", type=Path, default=common.WORK_DIR)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    export(common.work_dir(args.work_dir), args.output)


if __name__ == "__main__":
    main()
