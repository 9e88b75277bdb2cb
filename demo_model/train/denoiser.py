"""Train the demo text encoder and transformer together, from scratch, by flow matching on cached latents.

    nice -n 19 python -m demo_model.train.denoiser [--steps 4000] [--work_dir ~/.cache/wan_demo_training]

Resumes from its last checkpoint. A step of 24 clips takes 0.6 CPU seconds (bf16, compiled block; 1.8 uncompiled).
x_t = (1 - sigma) x0 + sigma noise, the model predicts noise - x0 at timestep 1000 sigma, sigmas are shifted
towards noise. One prompt in ten is the empty one, for classifier-free guidance. Three small losses help: the attention of an
object's words should lie on the object (`grounding_weight`); after half of the blocks every token should know where it is
(`position_weight`) and whether an object will be there (`subject_weight`: in pure noise only the caption's direction tells).
Wan has no absolute positions: its rotary embedding compares tokens, and in pure noise all look alike, so that "moving right"
cannot become "left at first" before the noise has shown an object somewhere. The borders can be found in the noise itself
(a token that looks for its right neighbour finds another one there); asked for, that takes 150 steps to learn, and
was not found in 2,600 without (docs/LOG.md).
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import UMT5EncoderModel

from demo_model.build import ModelSizes, build_text_encoder, build_tokenizer, build_transformer
from demo_model.train import captions, common, data, denoiser_forward
from demo_model.train.muon import Muon

logger = logging.getLogger(__name__)

GRID = (5, 6, 6)  # tokens of a clip: time, rows, columns
MAX_TOKENS = 24  # the longest caption has 23; one fixed length, so that one compilation serves


@dataclass(frozen=True)
class DenoiserTraining:
    """Options of the joint training."""

    steps: int = 4000
    clips: int = 6000
    first_clips: int = 1000  # the pool grows with the steps, so that training can start before all is encoded
    clips_per_step: float = 6.0
    batch: int = 24
    seed: int = 0
    peak_lr: float = 4e-3  # Muon, hidden matrices
    adam_lr: float = 1e-3  # embeddings, norms, biases, first and last layers
    warmup: int = 100
    shift: float = 5.0  # the sampler's 3 left shape and direction, decided at sigmas above 0.8, untrained for longest
    prompt_dropout: float = 0.1
    grounding_weight: float = 0.015
    grounding_below: float = 0.95  # sigmas above show no object to ground on
    position_weight: float = 0.05
    subject_weight: float = 0.1
    average_decay: float = 0.999
    report_every: int = 50


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: token ids and noisy latents to velocity and attention maps."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.text_encoder: UMT5EncoderModel = build_text_encoder(sizes, build_tokenizer().get_vocab_size())
        self.transformer: WanTransformer3DModel = build_transformer(sizes)
        _initialise(self.transformer)
        _initialise_text(self.text_encoder)
        self.where = nn.Linear(sizes.dim, sum(GRID) + 1)  # for the position and subject losses only; not exported
        self.block_function = denoiser_forward.block_forward

    def forward(self, ids: Tensor, lengths: Tensor, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `denoiser_forward.forward`; `ids` is `[B, L]` int64. Last come each token's logits `[B, 180, 17 + 1]`: of its
        time, row and column, and of the share of it that objects cover."""
        mask = (torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]).long()
        text = self.text_encoder(ids, mask).last_hidden_state
        velocity, attention, middle = denoiser_forward.forward(
            self.transformer, latents, timestep, text, lengths, self.block_function
        )
        return velocity, attention, self.where(F.layer_norm(middle, middle.shape[-1:])).float()


@torch.no_grad()
def _initialise(model: WanTransformer3DModel) -> None:
    """Start where learning is quick: open gates, zero output, and padded keys that do not drown the words.

    490 padded keys against 10 words would leave the words 2% of the attention. With q = W x + v and the key's bias
    -0.1 v, a padded key (text MLP of zero is zero, so the key is its bias, then normalised) points against every
    query and gets about exp(-3.5) of a word's weight; training goes on from there.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedder = model.condition_embedder
    nn.init.normal_(embedder.time_proj.weight, std=0.02)
    nn.init.normal_(embedder.time_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(embedder.time_embedder.linear_2.weight, std=0.02)
    patch = model.patch_embedding
    nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
    nn.init.zeros_(patch.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.scale_shift_table)
    for block in model.blocks:
        table = torch.zeros_like(block.scale_shift_table)
        table[:, 2] = table[:, 5] = 0.7
        block.scale_shift_table.copy_(table)
        direction = torch.randn_like(block.attn2.to_q.bias)
        block.attn2.to_q.bias.copy_(direction)
        block.attn2.to_k.bias.copy_(-0.1 * direction)


@torch.no_grad()
def _initialise_text(model: UMT5EncoderModel) -> None:
    """The heads of each layer start by looking at the next word, the previous one, the one after the next, and at all alike.

    A colour's noun is its next word. Left to chance, the encoder stayed a bag of words (docs/LOG.md).
    """
    half = model.config.relative_attention_num_buckets // 2  # buckets: 0 itself, 1, 2, ... before; half + 1, half + 2, ... after
    for block in model.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
        nn.init.zeros_(bias)
        for head, bucket in zip(range(bias.shape[1]), (half + 1, 1, half + 2), strict=False):
            bias[bucket, head] = 4.0


def split_parameters(model: Denoiser) -> tuple[list[Tensor], list[Tensor]]:
    """The transformer's hidden matrices for Muon, everything else for AdamW.

    UMT5's attention has no 1/sqrt(d): under Muon its scores grew until each word saw itself alone (docs/LOG.md).
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        (hidden if "transformer.blocks." in name and parameter.ndim == 2 else rest).append(parameter)
    return hidden, rest


@dataclass(frozen=True)
class Batch:
    """One step's inputs."""

    ids: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64
    clean: Tensor  # [B, 16, 5, 12, 12]
    noise: Tensor
    sigma: Tensor  # [B]
    word_rows: Tensor  # [W] int64: which clip a grounded word belongs to
    word_columns: Tensor  # [W] int64: its token position
    word_targets: Tensor  # [W, 180]: the subject's share of each token, sums to 1
    coverage: Tensor  # [B, 180]: the share of each token that objects cover, 0..1


def make_batch(step: int, encoded: data.Encoded, options: DenoiserTraining) -> Batch:
    """The batch of one step: a function of the seed and the step alone."""
    rng = np.random.default_rng([options.seed, 7, step])
    pool = min(options.clips, options.first_clips + int(step * options.clips_per_step))
    clips = [encoded.clip(int(index)) for index in rng.choice(pool, options.batch, replace=False)]
    ids = np.zeros((options.batch, MAX_TOKENS), np.int64)
    lengths = np.ones(options.batch, np.int64)
    ids[:, 0] = 1
    rows, columns, targets = [], [], []
    # Stratified sigmas: the same distribution, less noise in the gradient.
    uniform = (rng.permutation(options.batch) + rng.random(options.batch)) / options.batch
    sigma = options.shift * uniform / (1 + (options.shift - 1) * uniform)
    for row, (_, masks, scene) in enumerate(clips):
        if rng.random() < options.prompt_dropout:
            continue
        tokens, subjects = captions.tokens_of(captions.compose(rng, scene))
        ids[row, : len(tokens)] = tokens
        lengths[row] = len(tokens)
        if sigma[row] > options.grounding_below:
            continue
        masks = masks.astype(np.float32)
        for column, subject in enumerate(subjects):
            if subject == captions.NOTHING:
                continue
            weight = 1 - masks.sum(0).clip(0, 1) if subject == captions.BACKGROUND else masks[subject]
            rows.append(row)
            columns.append(column)
            targets.append(weight / weight.sum())
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    clean = torch.from_numpy(np.stack([latents for latents, _, _ in clips]).astype(np.float32))
    return Batch(
        ids=torch.from_numpy(ids),
        lengths=torch.from_numpy(lengths),
        clean=clean,
        noise=torch.randn(clean.shape, generator=generator),
        sigma=torch.from_numpy(sigma.astype(np.float32)),
        word_rows=torch.tensor(rows, dtype=torch.long),
        word_columns=torch.tensor(columns, dtype=torch.long),
        word_targets=torch.from_numpy(np.stack(targets)) if targets else torch.zeros(0, 180),
        coverage=torch.from_numpy(np.stack([masks.astype(np.float32).sum(0).clip(0, 1) for _, masks, _ in clips])),
    )


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean squared velocity error of each clip `[B]`, the grounding cross-entropy (nats above its minimum), the position
    cross-entropy (nats, summed over time, row and column), the subject cross-entropy (nats a token above its minimum),
    pad share."""
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch.clean + sigma * batch.noise
    velocity, attention, logits = model(batch.ids, batch.lengths, noisy, batch.sigma * 1000)
    error = (velocity - (batch.noise - batch.clean)).pow(2).mean((1, 2, 3, 4))
    pad_share = attention[..., -1].mean()
    # A word's map as the visualizer shows it: its share among the real tokens, at each place.
    shares = attention[..., :-1] / attention[..., :-1].sum(-1, keepdim=True)
    maps = shares[batch.word_rows, :, batch.word_columns]
    logs = (maps + 1e-8).log() - (maps.sum(-1, keepdim=True) + 1e-8).log()
    entropy = -torch.xlogy(batch.word_targets, batch.word_targets).sum(-1)
    grounding = (-(batch.word_targets * logs).sum(-1) - entropy).mean() if len(maps) else error.new_zeros(())
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, device=error.device) for n in GRID), indexing="ij"), -1).flatten(0, 2)
    position = error.new_zeros(())
    *places, covered = logits.split((*GRID, 1), -1)
    for axis, place in enumerate(places):
        position = position + F.cross_entropy(place.flatten(0, 1), grid[:, axis].repeat(len(error)))
    least = -torch.xlogy(batch.coverage, batch.coverage) - torch.xlogy(1 - batch.coverage, 1 - batch.coverage)
    subject = F.binary_cross_entropy_with_logits(covered[..., 0], batch.coverage) - least.mean()
    return error, grounding, position, subject, pad_share


def to_device(batch: Batch, where: torch.device) -> Batch:
    """The same batch on `where`."""
    return Batch(**{name: value.to(where) for name, value in vars(batch).items()})


def train(options: DenoiserTraining, folder: Path, compile_model: bool) -> None:
    """Train (or go on training) to `options.steps`, leaving checkpoints in `folder`."""
    where = common.device()
    encoded = data.Encoded(folder)
    torch.manual_seed(options.seed)
    model = Denoiser(ModelSizes()).to(where)
    hidden, rest = split_parameters(model)
    muon = Muon(hidden, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = common.WeightAverage(model, options.average_decay)
    path = folder / "denoiser_checkpoint.pt"
    step, seconds = 0, 0.0
    if state := common.load_checkpoint(path):
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.load_state_dict(state["muon"])
        average.values = {k: v.to(where) for k, v in state["average"].items()}
        step, seconds = state["step"], state["seconds"]
        logger.info("%s: going on from step %d", path, step)
    log = common.Log(folder / "denoiser_log.jsonl", seconds)
    if compile_model:  # one block, compiled once for all six: the whole model takes six times as long to compile
        model.block_function = torch.compile(denoiser_forward.block_forward, dynamic=False)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.state_dict()}
        statistics = {"mean": torch.from_numpy(encoded.mean), "std": torch.from_numpy(encoded.std)}
        state |= {"average": average.state(), "step": step, "seconds": log.seconds, "latents": statistics}
        common.save_checkpoint(path, state)

    saved = time.monotonic()
    history: list[tuple[float, ...]] = []
    progress = tqdm(total=options.steps, initial=step, desc="denoiser", mininterval=10)
    while step < options.steps:
        rate = common.flat_learning_rate(step, options.steps, 1.0, options.warmup)
        muon.lr, adam.param_groups[0]["lr"] = rate * options.peak_lr, rate * options.adam_lr
        batch = to_device(make_batch(step, encoded, options), where)
        with torch.autocast(where.type, torch.bfloat16):
            error, grounding, position, subject, pad_share = losses(model, batch)
        loss = error.mean() + options.grounding_weight * grounding
        loss = loss + options.position_weight * position + options.subject_weight * subject
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise SystemExit(f"step {step}: gradient norm {float(norm)}; loss {float(loss)}; lower peak_lr and restart")
        muon.step()
        adam.step()
        average.update(model, step)
        high = F.relu(batch.sigma - 0.8).gt(0)
        history.append(
            (
                float(error.mean()),
                float(error[high].mean()),
                float(error[~high].mean()),
                float(grounding),
                float(position),
                float(subject),
                float(pad_share),
                float(norm),
            )
        )
        step += 1
        progress.update()
        if step % options.report_every == 0 or step == options.steps:
            sigmas = ("loss_sigma_above_0.8", "loss_sigma_below_0.8")
            names = ("loss", *sigmas, "grounding", "position", "subject", "pad_share", "gradient")
            means = np.mean(history[-options.report_every :], axis=0)
            values = {name: round(float(v), 4) for name, v in zip(names, means, strict=True)}
            log.write(step=step, **values)
            progress.set_postfix(loss=values["loss"], grounding=values["grounding"], position=values["position"])
        if time.monotonic() - saved > common.CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.monotonic()
    checkpoint()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=DenoiserTraining.steps)
    parser.add_argument("--clips", type=int, default=DenoiserTraining.clips)
    parser.add_argument("--batch", type=int, default=DenoiserTraining.batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=common.WORK_DIR)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None, help="torch.compile a block"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    options = DenoiserTraining(steps=args.steps, clips=args.clips, batch=args.batch, seed=args.seed)
    train(options, common.work_dir(args.work_dir), args.compile)


if __name__ == "__main__":
    main()
