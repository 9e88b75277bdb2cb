"""Tiny but complete Wan models in diffusers' folder layout, from a seed, in a second: what the tests run instead of 28 GB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from demo_model.build import (
    ModelSizes,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    write_model,
)  # fmt: skip

# Twelve heads, as in Wan 1.3B: they divide by no mesh of eight devices. RoPE splits 12 into 4 + 4 + 4.
TINY = ModelSizes(
    text_dim=48, text_layers=2, text_heads=4, text_head_dim=12, text_ffn=64, heads=12, head_dim=12, layers=3, ffn=160, freq_dim=32,
    vae_base_dim=4,
)  # fmt: skip
DEFAULTS = {"height": 32, "width": 32, "frames": 5, "fps": 8, "num_inference_steps": 3, "flow_shift": 3.0, "max_sequence_length": 32}
# As unlike 0 and 1 as the published ones (vae/config.json of Wan 2.1 has means of -1.6 to 1.6 and deviations of 1.1 to 4.7).
LATENTS_MEAN = [round(-1.5 + 0.2 * i, 2) for i in range(16)]
LATENTS_STD = [round(0.7 + 0.1 * i, 2) for i in range(16)]


def build_tiny(folder: Path, seed: int = 0, sizes: ModelSizes = TINY, dtype: torch.dtype = torch.float32, **defaults: Any) -> Path:
    """Write a tiny model into ``folder`` and return it.

    Every bias and every norm weight is random too: stock initialisation leaves them at 0 and 1, where a forgotten or
    misplaced one goes unseen. Weights are stored in ``dtype``; ``defaults`` go into generation_defaults.json.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = build_text_encoder(sizes, build_tokenizer().get_vocab_size()), build_transformer(sizes), build_vae(
            sizes, LATENTS_MEAN, LATENTS_STD
        )
        with torch.no_grad():
            for model in models:
                for name, parameter in model.named_parameters():
                    if name.endswith(("bias", "gamma")) or "norm" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
    write_model(folder, *models, dtype=dtype, vae_dtype=torch.float32)
    (folder / "generation_defaults.json").write_text(json.dumps({**DEFAULTS, **defaults}))
    return folder


def copy_model(source: Path, target: Path, *parts: str) -> Path:
    """A model folder of its own whose ``parts`` may be changed; the others are links."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in parts:
            shutil.copytree(path, target / path.name)
        else:
            (target / path.name).symlink_to(path)
    return target


