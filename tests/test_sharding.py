"""Every published weight has exactly one place: the names of the real models, walked on the meta device."""

from __future__ import annotations

import fnmatch
import math
import re

import jax
import numpy as np
import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jax.sharding import PartitionSpec
from transformers import UMT5Config, UMT5EncoderModel

from wan_common.mesh import MeshShape, make_mesh
from wan_common.sharding import (
    TEXT_ENCODER_RULES,
    TRANSFORMER_RULES,
    VAE_RULES,
    Rule,
    constrain,
    divisible_axes,
    match_rule,
    weight_spec,
)  # fmt: skip
from wan_common.torchax_bridge import meta_module, plan_weights
from wan_common.vae import _DecodeOnly

# Wan-AI/Wan2.1-T2V-*-Diffusers, transformer/config.json; what is not named here is diffusers' default (the 14B).
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096, "freq_dim": 256}
WAN_1_3B = {**WAN_14B, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# The same repositories, text_encoder/config.json: google/umt5-xxl.
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip

# Seed 004's list of names (its "*" is any part); of the VAE what a decoder needs.
SEED_004 = {
    "transformer": """scale_shift_table patch_embedding.weight patch_embedding.bias condition_embedder.time_embedder.linear_*.weight
        condition_embedder.time_embedder.linear_*.bias condition_embedder.time_proj.weight condition_embedder.time_proj.bias
        condition_embedder.text_embedder.linear_*.weight condition_embedder.text_embedder.linear_*.bias blocks.*.scale_shift_table
        blocks.*.attn*.norm_q.weight blocks.*.attn*.norm_k.weight blocks.*.attn*.to_q.weight blocks.*.attn*.to_q.bias
        blocks.*.attn*.to_k.weight blocks.*.attn*.to_k.bias blocks.*.attn*.to_v.weight blocks.*.attn*.to_v.bias
        blocks.*.attn*.to_out.*.weight blocks.*.attn*.to_out.*.bias blocks.*.norm*.weight blocks.*.norm*.bias
        blocks.*.ffn.net.*.proj.weight blocks.*.ffn.net.*.proj.bias blocks.*.ffn.net.*.weight blocks.*.ffn.net.*.bias
        proj_out.weight proj_out.bias""",
    "text": """shared.weight encoder.block.*.layer.*.SelfAttention.q.weight encoder.block.*.layer.*.SelfAttention.k.weight
        encoder.block.*.layer.*.SelfAttention.v.weight encoder.block.*.layer.*.SelfAttention.o.weight
        encoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight encoder.block.*.layer.*.layer_norm.weight
        encoder.block.*.layer.*.DenseReluDense.wi_*.weight encoder.block.*.layer.*.DenseReluDense.wo.weight
        encoder.final_layer_norm.weight""",
    "vae": """post_quant_conv.weight post_quant_conv.bias decoder.conv_in.weight decoder.conv_in.bias
        decoder.mid_block.attentions.*.norm.gamma decoder.mid_block.attentions.*.to_qkv.weight
        decoder.mid_block.attentions.*.to_qkv.bias decoder.mid_block.attentions.*.proj.weight decoder.mid_block.attentions.*.proj.bias
        decoder.mid_block.resnets.*.norm*.gamma decoder.mid_block.resnets.*.conv*.weight decoder.mid_block.resnets.*.conv*.bias
        decoder.up_blocks.*.resnets.*.norm*.gamma decoder.up_blocks.*.resnets.*.conv*.weight decoder.up_blocks.*.resnets.*.conv*.bias
        decoder.up_blocks.*.upsamplers.*.resample.*.weight decoder.up_blocks.*.upsamplers.*.resample.*.bias
        decoder.up_blocks.*.upsamplers.*.time_conv.weight decoder.up_blocks.*.upsamplers.*.time_conv.bias
        decoder.up_blocks.*.resnets.*.conv_shortcut.weight decoder.up_blocks.*.resnets.*.conv_shortcut.bias
        decoder.norm_out.gamma decoder.conv_out.weight decoder.conv_out.bias""",
}


def published(which: str) -> tuple[dict[str, tuple[int, ...]], tuple[Rule, ...], str | None]:
    """Names and shapes of a published model, the rules for it, and where its stacked blocks are."""
    if which in ("14B", "1.3B"):
        config = WAN_14B if which == "14B" else WAN_1_3B
        model, rules, prefix = meta_module(lambda: WanTransformer3DModel(**config)), TRANSFORMER_RULES, "blocks"
    elif which == "umt5":
        model, rules, prefix = meta_module(lambda: UMT5EncoderModel(UMT5Config(**UMT5_XXL))), TEXT_ENCODER_RULES, "encoder.block"
    else:
        model, rules, prefix = _DecodeOnly(meta_module(AutoencoderKLWan)), VAE_RULES, None
    names = {name: tuple(p.shape) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    names.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight, and left out of the plan
    return names, rules, prefix


def starred(name: str, prefix: str | None) -> str:
    return re.sub(rf"^{re.escape(prefix)}\.\d+\.", f"{prefix}.*.", name) if prefix else name


@pytest.mark.parametrize("which", ["14B", "1.3B", "umt5", "vae"])
def test_each_published_name_matches_exactly_one_rule(which: str) -> None:
    names, rules, prefix = published(which)
    used = set()
    for name, shape in names.items():
        entries = match_rule(rules, starred(name, prefix))
        assert len(entries) <= len(shape), name
        used |= {pattern for pattern, _ in rules if re.fullmatch(pattern, starred(name, prefix))}
    assert used == {pattern for pattern, _ in rules}, "a rule that matches nothing"


@pytest.mark.parametrize(("which", "listed"), [("14B", "transformer"), ("1.3B", "transformer"), ("umt5", "text"), ("vae", "vae")])
def test_names_are_those_that_seed_004_lists(which: str, listed: str) -> None:
    names, _, _ = published(which)
    parameters = {name for name in names if "rope" not in name}
    patterns = SEED_004[listed].split()
    for name in parameters:
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), f"{name} is not in the list"
    for pattern in patterns:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in parameters), f"no name like {pattern}"


def test_sizes_are_those_that_seed_004_printed() -> None:
    """GiB in bf16, fp32 for what diffusers keeps in fp32; the encoder's tied embedding was counted under both names."""
    printed = {"14B": 26.66874897480011, "1.3B": 2.64891254901886, "umt5": 12.537574768066406}
    keep = set(WanTransformer3DModel._keep_in_fp32_modules)
    for which, gib in printed.items():
        names, _, _ = published(which)
        sizes = {name: math.prod(shape) * (4 if keep & set(name.split(".")) else 2) for name, shape in names.items() if "rope" not in name}
        tied = sizes["shared.weight"] if which == "umt5" else 0
        assert (sum(sizes.values()) + tied) / 2**30 == gib


@pytest.mark.parametrize("which", ["14B", "1.3B"])
@pytest.mark.parametrize("shape", [MeshShape(2, 1, 4), MeshShape(1, 8, 1), MeshShape(2, 2, 2)], ids=str)
def test_fsdp_splits_every_large_weight_over_all_devices(which: str, shape: MeshShape) -> None:
    mesh = make_mesh(shape)
    model = meta_module(lambda: WanTransformer3DModel(**{**(WAN_14B if which == "14B" else WAN_1_3B), "num_layers": 2}))
    plan = plan_weights(model, "blocks", TRANSFORMER_RULES, mesh, "bfloat16", fsdp=True, keep_fp32=tuple(model._keep_in_fp32_modules))
    for name, weight in plan.items():
        struct = weight.struct
        share = np.prod(struct.shape) / np.prod(struct.sharding.shard_shape(struct.shape))
        if np.prod(struct.shape) > 2**23:
            assert share == 8, f"{name} {struct.shape} is split {share} ways by {struct.sharding.spec}"


def test_no_rule_and_two_rules_are_errors() -> None:
    with pytest.raises(KeyError, match=r"blocks\.\*\.new\.weight: 0 sharding rules match, wanted exactly one"):
        match_rule(TRANSFORMER_RULES, "blocks.*.new.weight")
    with pytest.raises(KeyError, match="2 sharding rules match"):
        match_rule(((r"a.*", ()), (r".*b", ())), "ab")


def test_axes_that_do_not_divide_are_dropped() -> None:
    mesh = make_mesh(MeshShape(2, 2, 2))
    assert divisible_axes(("dp", "sp"), 12, mesh) == ("dp", "sp")
    assert divisible_axes(("dp", "sp"), 6, mesh) == ("dp",)
    assert divisible_axes(("dp", "sp"), 5, mesh) == ()
    assert divisible_axes(("dp", "tp"), 8, make_mesh(MeshShape(1, 1, 8))) == ("tp",)  # axes of size 1 are left out
    spec = weight_spec(TRANSFORMER_RULES, "blocks.*.attn1.to_q.weight", (40, 6, 7), mesh, fsdp=True, stacked=True)
    assert spec == PartitionSpec(None, ("tp",), None)
    x = jax.jit(lambda x: constrain(x, mesh, "dp", ("sp", "tp"), None))(np.zeros((2, 6, 3), np.float32))
    assert x.sharding.shard_shape(x.shape) == (1, 3, 3)
