"""The jitted text encoder: stock tokenizer and UMT5EncoderModel, as WanPipeline.encode_prompt uses them."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from wan_common import pytrees  # noqa: F401 - registers the outputs of transformers models
from wan_common.errors import ArtifactError, NumericalError
from wan_common.prompts import Prompt, spread_bytes, token_words
from wan_common.sharding import TEXT_ENCODER_RULES, constrain, input_sharding
from wan_common.torchax_bridge import (
    Params,
    ScannedBlocks,
    Weight,
    abstract_params,
    call_module,
    gather_constraint,
    load_weights,
    meta_module,
    plan_weights,
    products_for,
    split_blocks,
)  # fmt: skip

logger = logging.getLogger("text")
BATCH = 2  # rows a call: the prompt and the negative prompt; more prompts come in pairs, so that one program serves all


@dataclasses.dataclass
class TextEncoder:
    """UMT5 as a pure function. Build with :func:`build_text_encoder`."""

    model: Any
    plan: dict[str, Weight]
    mesh: Mesh
    dtype: str
    blocks: ScannedBlocks

    def encode(self, params: Params, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Embeddings [B, L, d_model] of ``token_ids`` [B, L] int32; rows are zero from ``lengths`` [B] on, as in diffusers."""
        stacked, rest = split_blocks(params, "encoder.block")
        self.blocks.bind(stacked)
        rest = {**rest, "encoder.embed_tokens.weight": rest["shared.weight"]}
        real = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
        with products_for(self.mesh):
            out = call_module(self.model, rest, token_ids, real.astype(jnp.int32))
        return jnp.where(real[..., None], out.last_hidden_state, 0)

    def abstract_inputs(self, length: int) -> tuple[Any, ...]:
        """ShapeDtypeStructs of :meth:`encode`'s arguments."""
        axis = "dp" if BATCH % self.mesh.shape["dp"] == 0 else None
        sharding = input_sharding(self.mesh, axis)
        ids = jax.ShapeDtypeStruct((BATCH, length), np.int32, sharding=sharding)
        return abstract_params(self.plan), ids, jax.ShapeDtypeStruct((BATCH,), np.int32, sharding=sharding)

    def run(self, params: Params, token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Encode any number of rows, in batches of :data:`BATCH` (the last one filled up). Returns [N, L, d_model].

        Raises:
            NumericalError: the encoder's output is not finite; names the row.
        """
        encode = jax.jit(self.encode)
        _, ids_struct, lengths_struct = self.abstract_inputs(token_ids.shape[1])
        results = []
        for start in range(0, len(token_ids), BATCH):
            picked = np.arange(start, start + BATCH).clip(max=len(token_ids) - 1)
            ids = jax.device_put(token_ids[picked].astype(np.int32), ids_struct.sharding)
            counts = jax.device_put(lengths[picked].astype(np.int32), lengths_struct.sharding)
            out = jax.jit(lambda x: x, out_shardings=input_sharding(self.mesh))(encode(params, ids, counts))
            results.append(np.asarray(jax.device_get(out)))
        embeds = np.concatenate(results)[: len(token_ids)]
        for row, values in enumerate(embeds):
            if not np.isfinite(values.astype(np.float32)).all():
                raise NumericalError(f"text encoder: row {row} came out with NaN or infinity; check the weights, or try --dtype float32")
        return embeds


def build_text_encoder(config: UMT5Config, mesh: Mesh, dtype: str = "bfloat16", fsdp: bool = False) -> TextEncoder:
    """The encoder of ``config`` on ``mesh``; no weights are touched."""
    config._attn_implementation = "eager"  # UMT5 adds a position bias a layer: the fused paths do not take one
    model = meta_module(lambda: UMT5EncoderModel(config))
    plan = plan_weights(
        model, "encoder.block", TEXT_ENCODER_RULES, mesh, dtype, fsdp=fsdp, skip=("encoder.embed_tokens.weight",)
    )

    def spread(x: jax.Array) -> jax.Array:
        return constrain(x, mesh, "dp", None, None)

    gather = gather_constraint(plan, "encoder.block", mesh) if fsdp and mesh.shape["dp"] * mesh.shape["sp"] > 1 else None
    scanned = ScannedBlocks(model.encoder.block[0], gather=gather, enter=spread, between=spread)
    model.encoder.block = torch.nn.ModuleList([scanned])
    return TextEncoder(model, plan, mesh, dtype, scanned)


def read_text_config(model_dir: Path) -> UMT5Config:
    """The config of the ``text_encoder`` folder.

    Raises:
        ArtifactError: missing, unreadable or not a UMT5.
    """
    path = model_dir / "text_encoder" / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); choose a Wan 2.1 diffusers folder with --model_id") from error
    if config.get("model_type") != "umt5":
        raise ArtifactError(f"{path}: found model_type {config.get('model_type')}, wanted umt5; choose a Wan 2.1 folder with --model_id")
    return UMT5Config.from_dict(config)


def load_text_weights(encoder: TextEncoder, model_dir: Path) -> Params:
    """Stream the encoder's weights. Checkpoints store the tied embedding under either of its two names."""
    from wan_common.torchax_bridge import Checkpoint

    folder = model_dir / "text_encoder"
    with Checkpoint(folder) as checkpoint:
        if "shared.weight" not in checkpoint.where:
            tied = dataclasses.replace(encoder.plan["shared.weight"], sources=("encoder.embed_tokens.weight",))
            encoder.plan["shared.weight"] = tied
    return load_weights(encoder.plan, folder, "text encoder weights")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenized prompts: ids [N, L] int32, real tokens a row [N] (EOS included), and the words of each row."""

    ids: np.ndarray
    lengths: np.ndarray
    words: list[list[dict[str, Any]]]


def tokenize(model_dir: Path, prompts: list[Prompt], max_sequence_length: int) -> Tokens:
    """Tokenize as WanPipeline does (padded to ``max_sequence_length``, truncated), and find every word's tokens.

    A prompt that is too long is cut, with a warning that shows the text that was lost.

    Raises:
        ArtifactError: the model folder has no usable tokenizer.
    """
    folder = model_dir / "tokenizer"
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; choose a Wan 2.1 diffusers folder with --model_id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}: no usable tokenizer ({error}); download the model again") from error
    texts = [prompt.text for prompt in prompts]
    options = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True, "add_special_tokens": True}
    batch = tokenizer(texts, **options, return_attention_mask=True, return_offsets_mapping=True)
    lengths = np.array([sum(mask) for mask in batch["attention_mask"]])
    words = []
    for row, prompt in enumerate(prompts):
        pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][row])
        offsets = spread_bytes(list(pieces), [(a, b) for a, b in batch["offset_mapping"][row]])
        whole = len(tokenizer(prompt.text)["input_ids"])
        if whole > max_sequence_length:
            kept = max((b for _, b in offsets[: lengths[row] - 1]), default=0)
            logger.warning(
                "the prompt has %d tokens, the encoder takes %d: %r is cut off", whole, max_sequence_length, prompt.text[kept:].strip()
            )
        words.append(token_words(prompt, offsets, int(lengths[row])))
    return Tokens(np.array(batch["input_ids"], np.int32), lengths, words)
