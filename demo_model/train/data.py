"""Draw the training clips once, encode them with the trained VAE and keep the latents on disk.

    nice -n 19 python -m demo_model.train.data [--clips 6000]

Encoding a clip costs as much as several training steps of it, so it is done once: 23 KB a clip. Shards of 200 clips
are written one by one; a restart goes on with the first missing one.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from demo_model.build import ModelSizes, build_vae
from demo_model.train import common, vae_sequence, world
from demo_model.train.captions import held_out
from demo_model.train.vae import channels_last, to_unit

logger = logging.getLogger(__name__)

SHARD = 200
STATISTICS_SHARDS = 4  # latents_mean and latents_std come from the first 800 clips
DOUBLES, STILL_SHARE = 0.06, 0.04
DATA_SEED = 1


class Encoded:
    """Training clips on disk, read shard by shard as training asks for them.

    The denoiser starts while clips are still being encoded: it asks for a first part and for more as it goes on, and
    waits where the encoder is behind, so which clips a step sees does not depend on timing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "latents"
        self.latents: list[np.ndarray] = []  # normalised, fp16 [SHARD, 16, 5, 12, 12]
        self.masks: list[np.ndarray] = []  # [SHARD, 2, 180]
        self.excluded = _excluded()
        first = np.concatenate([self._read(number)[0] for number in range(STATISTICS_SHARDS)]).astype(np.float64)
        self.mean = first.mean((0, 2, 3, 4)).astype(np.float32)
        self.std = first.std((0, 2, 3, 4)).astype(np.float32)

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.folder / f"shard_{number:04d}.npz"
        if not path.exists():
            logger.info("waiting for %s (python -m demo_model.train.data writes it)", path)
        while not path.exists():
            time.sleep(2)
        with np.load(path, allow_pickle=False) as shard:
            return shard["latents"], shard["masks"]

    def clip(self, index: int) -> tuple[np.ndarray, np.ndarray, world.Scene]:
        """Normalised latents `[16, 5, 12, 12]`, token masks `[2, 180]` and the scene of one clip."""
        while len(self.latents) <= index // SHARD:
            latents, masks = self._read(len(self.latents))
            view = (1, 16, 1, 1, 1)
            self.latents.append(((latents - self.mean.reshape(view)) / self.std.reshape(view)).astype(np.float16))
            self.masks.append(masks)
        shard, row = divmod(index, SHARD)
        return self.latents[shard][row], self.masks[shard][row], training_scene(index, self.excluded)


def _excluded() -> frozenset[world.Combination]:
    return frozenset(item.combination for item in held_out())


def training_scene(index: int, excluded: frozenset[world.Combination]) -> world.Scene:
    """Scene number `index` of the training set."""
    rng = np.random.default_rng([DATA_SEED, index])
    return world.random_scene(rng, excluded, DOUBLES, STILL_SHARE)


def token_masks(coverage: np.ndarray) -> np.ndarray:
    """Coverage `[A, 17, 96, 96]` to transformer tokens `[A, 5 * 6 * 6]`: mean over 16x16 pixels and the latent frame.

    Latent frame 0 is video frame 0; latent frame p >= 1 is video frames 4p-3..4p.
    """
    actors = coverage.shape[0]
    cells = coverage.reshape(actors, world.FRAMES, 6, 16, 6, 16).mean((3, 5))
    later = cells[:, 1:].reshape(actors, 4, 4, 6, 6).mean(2)
    return np.concatenate([cells[:, :1], later], 1).reshape(actors, 180)


@torch.no_grad()
def encode_shard(vae: AutoencoderKLWan, first: int, where: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[SHARD, 16, 5, 12, 12]` fp16 (posterior means, not normalised) and token masks `[SHARD, 2, 180]` fp16."""
    excluded = _excluded()
    latents, masks = [], np.zeros((SHARD, 2, 180), np.float16)
    for start in range(0, SHARD, 2):
        clips = []
        for offset in range(start, start + 2):
            clip, coverage = world.render(training_scene(first + offset, excluded))
            clips.append(to_unit(clip))
            masks[offset, : len(coverage)] = token_masks(coverage)
        batch = torch.stack(clips).contiguous(memory_format=torch.channels_last_3d).to(where)
        with torch.autocast(where.type, torch.bfloat16):
            mean, _ = vae_sequence.encode(vae, batch)
        latents.append(mean.float().cpu().numpy().astype(np.float16))
    return np.concatenate(latents), masks


def prepare(folder: Path, clips: int, backwards: bool = False) -> None:
    """Encode whatever shards are missing in `folder/latents`; a second process may work `backwards` beside the first."""
    state = common.load_checkpoint(folder / "vae_final.pt")
    if state is None:
        raise SystemExit(f"{folder}/vae_final.pt is missing; run: python -m demo_model.train.vae --work_dir {folder}")
    where = common.device()
    vae = build_vae(ModelSizes())
    vae.load_state_dict(state["model"])
    vae.to(where)
    channels_last(vae)
    target = folder / "latents"
    target.mkdir(exist_ok=True)
    numbers = range(clips // SHARD)[:: -1 if backwards else 1]
    for number in tqdm(numbers, desc="encode shards", mininterval=10):
        path = target / f"shard_{number:04d}.npz"
        if path.exists():
            continue
        latents, masks = encode_shard(vae, number * SHARD, where)
        temporary = target / f"writing_{os.getpid()}.npz"
        np.savez(temporary, latents=latents, masks=masks)
        temporary.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--work_dir", type=Path, default=common.WORK_DIR)
    parser.add_argument("--backwards", action="store_true", help="from the last shard on, as a second process")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    prepare(common.work_dir(args.work_dir), args.clips, args.backwards)


if __name__ == "__main__":
    main()
