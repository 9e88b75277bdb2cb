"""Train the demo VAE from scratch on crops of the synthetic world, then on whole clips.

    nice -n 19 python -m demo_model.train.vae [--steps 1800] [--work_dir ~/.cache/wan_demo_training]

Resumes from its last checkpoint. Budget on two AMX cores, bf16 autocast and channels-last (fp32 contiguous: 2.3 times
slower; bf16 contiguous: 10 times): a step of 8 crops of 5x32x32 takes 0.35 s on one core (one
thread: beside other busy processes, two threads wait for each other and were three times slower)..
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn
from tqdm import tqdm

from demo_model.build import ModelSizes, build_vae
from demo_model.train import common, vae_sequence, world
from demo_model.train.muon import Muon
from demo_model.words import BACKGROUND_COLORS, OBJECT_COLORS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeTraining:
    """Options of the VAE training."""

    steps: int = 1800
    seed: int = 0
    peak_lr: float = 3e-3  # Muon, convolutions
    adam_lr: float = 1e-3  # norms, biases, first and last convolutions
    warmup: int = 60
    first_log_variance: float = -6.0  # with 0 (noise as strong as the signal) it learned nothing in 250 steps
    kl_weight: float = 3e-5  # per latent value against a per-pixel squared error: posterior noise around 0.1 std
    l1_weight: float = 0.1  # sharp edges and exact flat colours
    crop: int = 32
    crop_frames: int = 5
    crop_batch: int = 8
    long_from: float = 0.6  # fraction of the steps after which crops last all 17 frames
    long_batch: int = 3
    whole_from: float = 0.95  # fraction after which whole clips replace crops
    whole_batch: int = 1
    average_decay: float = 0.998
    evaluate_every: int = 200


def to_unit(clip: np.ndarray) -> Tensor:
    """`[F, H, W, 3]` in 0..255 to `[3, F, H, W]` in -1..1."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def random_palette(rng: np.random.Generator, scene: world.Scene) -> dict[str, tuple[float, float, float]]:
    """Colours near the named ones, sometimes any colour: the decoder should not know only twelve colours."""
    named = {"background": BACKGROUND_COLORS[scene.background]}
    named |= {str(i): OBJECT_COLORS[a.color] for i, a in enumerate(scene.actors)}
    palette = {}
    for key, color in named.items():
        value = rng.uniform(0, 255, 3) if rng.random() < 0.15 else np.asarray(color) + rng.normal(0, 4.0, 3)
        red, green, blue = np.clip(value, 0, 255)
        palette[key] = (float(red), float(green), float(blue))
    return palette


def random_crop(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """A crop `[count, size, size, 3]` of a random scene, in four of five cases on an object's path."""
    scene = world.random_scene(rng, frozenset(), doubles=0.2, still=0.1)
    first = int(rng.integers(0, world.FRAMES - count + 1))
    top, left = (int(rng.integers(0, world.HEIGHT - size + 1)) for _ in range(2))
    if rng.random() < 0.8:
        actor = scene.actors[int(rng.integers(len(scene.actors)))]
        dx, dy = world.DIRECTIONS.get(actor.direction, (0, 0))
        middle = actor.travel * (first + count / 2) / (world.FRAMES - 1)
        x = actor.start[0] + dx * middle + rng.uniform(-20, 20)
        y = actor.start[1] + dy * middle + rng.uniform(-20, 20)
        left = int(np.clip(x - size / 2, 0, world.WIDTH - size))
        top = int(np.clip(y - size / 2, 0, world.HEIGHT - size))
    frames = np.arange(first, first + count)
    return world.render(scene, frames, (top, left, size, size), random_palette(rng, scene))[0]


def batch(step: int, options: VaeTraining) -> Tensor:
    """The batch of one step, `[B, 3, F, H, W]` in -1..1: a function of the seed and the step alone."""
    rng = np.random.default_rng([options.seed, step])
    if step >= options.whole_from * options.steps:
        clips = []
        for _ in range(options.whole_batch):
            scene = world.random_scene(rng, frozenset(), doubles=0.2, still=0.1)
            clips.append(world.render(scene, palette=random_palette(rng, scene))[0])
    elif step >= options.long_from * options.steps:
        clips = [random_crop(rng, options.crop, world.FRAMES) for _ in range(options.long_batch)]
    else:
        clips = [random_crop(rng, options.crop, options.crop_frames) for _ in range(options.crop_batch)]
    return torch.stack([to_unit(clip) for clip in clips])


def held_out_clips(count: int, seed: int = 10_000) -> Tensor:
    """Whole clips of the plain palette that training never draws, `[count, 3, 17, 96, 96]` in -1..1."""
    clips = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        clips.append(to_unit(world.render(world.random_scene(rng, frozenset(), doubles=0.2, still=0.1))[0]))
    return torch.stack(clips)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: Tensor) -> float:
    """Mean PSNR in dB, over clips, of decode(posterior mean) against clips in -1..1 (peak 2), in float32."""
    values = []
    for clip in clips.split(1):
        mean, _ = vae_sequence.encode(vae, clip)
        error = (vae_sequence.decode(vae, mean).clamp(-1, 1) - clip).pow(2).mean()
        values.append(10 * torch.log10(4.0 / error))
    return float(torch.stack(values).mean())


def channels_last(model: nn.Module) -> None:
    """Put convolution weights in channels-last memory; other parameters have no such layout."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _initialise(vae: AutoencoderKLWan, log_variance: float) -> None:
    """Start as a linear autoencoder that keeps its signal: unit-gain convolutions, silent residual branches.

    With PyTorch's default (a third of the variance per convolution, so almost nothing passes the whole depth) the
    reconstruction was still 13.8 dB after 200 steps.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, WanResample) and module.mode == "upsample3d":
            module.time_conv.weight.mul_(0.1)  # both new frames begin as copies of the old one
            for half in module.time_conv.weight.chunk(2):
                half[:, :, -1, 0, 0] += torch.eye(module.dim)
    vae.decoder.conv_out.weight.mul_(0.3)
    vae.quant_conv.bias[16:] = log_variance
    vae.quant_conv.weight[16:] *= 0.1


def train(options: VaeTraining, folder: Path) -> AutoencoderKLWan:
    """Train (or go on training) to `options.steps`; returns the averaged model in float32 on the CPU."""
    where = common.device()
    torch.manual_seed(options.seed)
    vae = build_vae(ModelSizes())
    _initialise(vae, options.first_log_variance)
    vae.to(where)
    channels_last(vae)
    ends = ("encoder.conv_in.", "decoder.conv_out.")
    hidden = [p for n, p in vae.named_parameters() if n.endswith("weight") and p.ndim >= 4 and not n.startswith(ends)]
    known = {id(p) for p in hidden}
    muon = Muon(hidden, weight_decay=1e-4)
    rest = [p for p in vae.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = common.WeightAverage(vae, options.average_decay)
    path = folder / "vae_checkpoint.pt"
    step, seconds = 0, 0.0
    if state := common.load_checkpoint(path):
        vae.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.load_state_dict(state["muon"])
        average.values = {k: v.to(where) for k, v in state["average"].items()}
        step, seconds = state["step"], state["seconds"]
        logger.info("%s: going on from step %d", path, step)
    log = common.Log(folder / "vae_log.jsonl", seconds)
    test = held_out_clips(2)
    averaged = build_vae(ModelSizes())

    def checkpoint() -> None:
        state = {"model": vae.state_dict(), "adam": adam.state_dict(), "muon": muon.state_dict()}
        common.save_checkpoint(path, {**state, "average": average.state(), "step": step, "seconds": log.seconds})

    saved, losses = time.monotonic(), []
    progress = tqdm(total=options.steps, initial=step, desc="vae", mininterval=10)
    while step < options.steps:
        rate = common.learning_rate(step, options.steps, 1.0, options.warmup)
        muon.lr, adam.param_groups[0]["lr"] = rate * options.peak_lr, rate * options.adam_lr
        clip = batch(step, options).contiguous(memory_format=torch.channels_last_3d).to(where)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        with torch.autocast(where.type, torch.bfloat16):
            mean, log_variance = vae_sequence.encode(vae, clip)
            mean, log_variance = mean.float(), log_variance.float()
            noise = torch.randn(mean.shape, generator=generator).to(where)
            output = vae_sequence.decode(vae, mean + noise * (0.5 * log_variance).exp()).float()
        error = output - clip
        divergence = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()
        loss = error.pow(2).mean() + options.l1_weight * error.abs().mean() + options.kl_weight * divergence
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step()
        adam.step()
        average.update(vae, step)
        losses.append((float(error.detach().pow(2).mean()), float(divergence.detach())))
        step += 1
        progress.update()
        if step % options.evaluate_every == 0 or step == options.steps:
            averaged.load_state_dict(average.state())
            psnr = reconstruction_psnr(averaged, test)
            squared, kl = np.mean(losses[-options.evaluate_every :], axis=0)
            log.write(step=step, train_mse=round(float(squared), 6), kl=round(float(kl), 3), test_psnr=round(psnr, 2))
            progress.set_postfix(psnr=f"{psnr:.2f} dB")
        if time.monotonic() - saved > common.CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.monotonic()
    checkpoint()
    averaged.load_state_dict(average.state())
    return averaged.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=VaeTraining.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=common.WORK_DIR)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    folder = common.work_dir(args.work_dir)
    vae = train(VaeTraining(steps=args.steps, seed=args.seed), folder)
    psnr = reconstruction_psnr(vae, held_out_clips(32))
    logger.info("reconstruction of 32 held-out clips: %.2f dB PSNR", psnr)
    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    common.save_checkpoint(folder / "vae_final.pt", {"model": state, "psnr": psnr})


if __name__ == "__main__":
    main()
