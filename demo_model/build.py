"""Write a small but complete Wan 2.1 in diffusers' folder layout, from a seed, in seconds.

    python -m demo_model.build --output DIR [--seed 0]

The result holds everything `diffusers.WanPipeline.from_pretrained(DIR)` loads: tokenizer, UMT5 encoder,
`WanTransformer3DModel`, `AutoencoderKLWan` and the UniPC scheduler. Weights are random here; `demo_model/train`
starts from the same architecture and replaces them. Topology is the published one (patch 1x2x2, RMS-normed q and k,
4x temporal and 8x spatial VAE with 16 channels); only widths and depths are small.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from demo_model.words import FRAGMENTS, all_words

logger = logging.getLogger(__name__)

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in google/umt5-xxl
MODEL_MAX_LENGTH = 512  # WanPipeline's max_sequence_length


@dataclass(frozen=True)
class ModelSizes:
    """Widths and depths of the demo model.

    Chosen by count for two CPU cores: one transformer forward is 1.1 GFLOP for 17 frames at 96x96 (180 tokens), the
    VAE decoder 9 GFLOP. Eight heads of 24: tensor parallel over 2, 4 and 8 divides, and RoPE splits 24 into 8 + 8 + 8
    (time, height, width).
    """

    text_dim: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_head_dim: int = 32
    text_ffn: int = 256
    heads: int = 8
    head_dim: int = 24
    layers: int = 4
    ffn: int = 512
    freq_dim: int = 256  # sinusoidal time embedding, as published
    vae_base_dim: int = 8  # published: 96

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_dim


def build_tokenizer() -> Tokenizer:
    """A Unigram tokenizer with T5's special tokens (<pad> 0, </s> 1, <unk> 2).

    World words are one piece each, other text falls back to fragments, single characters and then UTF-8 bytes, so
    <unk> never appears. Lower-cased: "A Red circle" means what "a red circle" does.
    """
    scores: dict[str, float] = {PAD: 0.0, EOS: 0.0, UNK: 0.0}
    for byte in range(256):
        scores[f"<0x{byte:02X}>"] = 0.0  # used by byte fallback only, never by the Viterbi search
    words = all_words()
    for word in words:
        scores["▁" + word] = -4.0
    for word in words:
        scores.setdefault(word, -7.0)  # the same word inside another or after an opening bracket
    for fragment in FRAGMENTS:
        scores.setdefault(fragment, -8.0)
    scores["▁"] = -9.0
    for code in range(0x21, 0x7F):
        if not chr(code).isupper():
            scores.setdefault(chr(code), -9.5)
    tokenizer = Tokenizer(Unigram(list(scores.items()), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", EOS], pair=["$A", EOS, "$B", EOS], special_tokens=[(EOS, 1)])
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    return tokenizer


def build_text_encoder(sizes: ModelSizes, vocab_size: int) -> UMT5EncoderModel:
    """UMT5 encoder with random weights, `[B, L] -> [B, L, text_dim]`."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=sizes.text_dim,
        d_kv=sizes.text_head_dim,
        d_ff=sizes.text_ffn,
        num_layers=sizes.text_layers,
        num_heads=sizes.text_heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def build_transformer(sizes: ModelSizes) -> WanTransformer3DModel:
    """Wan transformer with random weights, every layer contributing (diffusers' own initialisation)."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()


def build_vae(sizes: ModelSizes, latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    """Wan VAE of the published topology with random weights: 4x temporal, 8x spatial, 16 channels."""
    return AutoencoderKLWan(
        base_dim=sizes.vae_base_dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        latents_mean=latents_mean or [0.0] * 16,
        latents_std=latents_std or [1.0] * 16,
    ).eval()


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of the published Wan 2.1 folders (flow_shift 3.0 there, 480p)."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _replace(path: Path, write: Any) -> None:
    """Run `write(temporary_path)` and move the result over `path`: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_weights(path: Path, model: nn.Module, dtype: torch.dtype) -> int:
    """Write `model`'s parameters as safetensors in `dtype`, atomically; returns the bytes written.

    UMT5's tied `encoder.embed_tokens.weight` is left out: `shared.weight` is the one copy, as transformers writes it.
    """
    tensors = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    return path.stat().st_size


def write_model(
    folder: Path,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Write the whole diffusers folder; returns the bytes of its weights.

    Args:
        folder: Destination; files of the same names are replaced one by one, each atomically.
        text_encoder, transformer, vae: The three models, in any floating dtype.
        dtype: Storage dtype of transformer and text encoder.
        vae_dtype: Storage dtype of the VAE (float32 in the published folders).
    """
    tokenizer = build_tokenizer()
    _replace(folder / "tokenizer/tokenizer.json", lambda temporary: tokenizer.save(str(temporary)))
    tokenizer_config = {
        # Not T5TokenizerFast: transformers 5 rebuilds that class from the vocabulary alone and drops byte fallback.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer/tokenizer_config.json", tokenizer_config)
    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    write_json(folder / "tokenizer/special_tokens_map.json", special)

    name = str(dtype).removeprefix("torch.")
    text_config = {k: v for k, v in text_encoder.config.to_dict().items() if k != "_name_or_path"}
    text_config |= {"architectures": ["UMT5EncoderModel"], "dtype": name}
    write_json(folder / "text_encoder/config.json", text_config)
    total = write_weights(folder / "text_encoder/model.safetensors", text_encoder, dtype)
    for part, model, part_dtype in (("transformer", transformer, dtype), ("vae", vae, vae_dtype)):
        config = {k: v for k, v in json.loads(model.to_json_string()).items() if k != "_name_or_path"}
        write_json(folder / part / "config.json", config)
        total += write_weights(folder / part / "diffusion_pytorch_model.safetensors", model, part_dtype)
    scheduler = build_scheduler()
    write_json(folder / "scheduler/scheduler_config.json", json.loads(scheduler.to_json_string()))
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": scheduler.config["_diffusers_version"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index)
    return total


def build(folder: Path, seed: int = 0, sizes: ModelSizes | None = None) -> int:
    """Write an untrained model from `seed` into `folder`; returns the bytes of its weights. Takes a few seconds."""
    sizes = sizes or ModelSizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = build_text_encoder(sizes, build_tokenizer().get_vocab_size())
        transformer = build_transformer(sizes)
        vae = build_vae(sizes)
    total = write_model(folder, text_encoder, transformer, vae)
    logger.info("%s: %.1f MB of untrained weights, seed %d, %s", folder, total / 1e6, seed, asdict(sizes))
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an existing model is replaced")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(args.output, args.seed)


if __name__ == "__main__":
    main()
