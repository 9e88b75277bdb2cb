"""Configs of the published Wan 2.1 text-to-video models, so that planning needs no download.

Source: the config.json files of Wan-AI/Wan2.1-T2V-14B-Diffusers and Wan-AI/Wan2.1-T2V-1.3B-Diffusers on the Hugging Face
hub (folders transformer, text_encoder, vae), and Table 2 of the Wan report (arXiv:2503.20314).
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfigs:
    """What the three stages build from: ``transformer`` and ``vae`` as diffusers' config.json, ``text_encoder`` as UMT5Config's."""

    name: str
    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]


_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
}  # fmt: skip
# google/umt5-xxl
_UMT5_XXL = {
    "model_type": "umt5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
# The latents' mean and std are AutoencoderKLWan's defaults, which are Wan 2.1's.
_VAE = {
    "_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip

WAN_14B = ModelConfigs(
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    {**_TRANSFORMER, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, _UMT5_XXL, _VAE,
)  # fmt: skip
WAN_1_3B = ModelConfigs(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    {**_TRANSFORMER, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, _UMT5_XXL, _VAE,
)  # fmt: skip
PUBLISHED = {
    model.name: model for model in (WAN_14B, WAN_1_3B)
}
SHORT_NAMES = {"14B": WAN_14B.name, "1.3B": WAN_1_3B.name}
