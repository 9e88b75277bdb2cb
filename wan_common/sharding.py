"""Where every weight and activation lives: weight rules by name, and constraints for inputs and activations.

A rule gives one entry a dimension: ``"tp"`` (tensor parallel), ``"fsdp"`` (sharded at rest, gathered before use) or None.
An axis that does not divide its dimension is dropped, so any mesh works with any model. The published parameter names are
walked by tests/test_sharding.py: each matches exactly one rule.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, PartitionSpec

Rule = tuple[str, tuple[str | None, ...]]

COLUMN = ("tp", "fsdp")  # torch Linear weights are [out, in]: the outputs are split
ROW = ("fsdp", "tp")  # the inputs are split, the partial sums added
REPLICATED: tuple[str | None, ...] = ()

# Patterns match whole names; "*" stands for a block's number (weights of all blocks are stacked on a leading axis).
TRANSFORMER_RULES: tuple[Rule, ...] = (
    (r"blocks\.\*\.attn[12]\.to_[qkv]\.weight", COLUMN),
    (r"blocks\.\*\.attn[12]\.to_[qkv]\.bias", ("tp",)),
    (r"blocks\.\*\.attn[12]\.norm_[qk]\.weight", ("tp",)),
    (r"blocks\.\*\.attn[12]\.to_out\.0\.weight", ROW),
    (r"blocks\.\*\.attn[12]\.to_out\.0\.bias", REPLICATED),
    (r"blocks\.\*\.ffn\.net\.0\.proj\.weight", COLUMN),
    (r"blocks\.\*\.ffn\.net\.0\.proj\.bias", ("tp",)),
    (r"blocks\.\*\.ffn\.net\.2\.weight", ROW),
    (r"blocks\.\*\.ffn\.net\.2\.bias", REPLICATED),
    (r"blocks\.\*\.norm2\.(weight|bias)", REPLICATED),
    (r"blocks\.\*\.scale_shift_table", REPLICATED),
    (r"condition_embedder\.(time_embedder|text_embedder)\.linear_1\.weight", COLUMN),
    (r"condition_embedder\.(time_embedder|text_embedder)\.linear_2\.weight", ROW),
    (r"condition_embedder\.(time_embedder|text_embedder)\.linear_[12]\.bias", REPLICATED),
    (r"condition_embedder\.time_proj\.weight", COLUMN),
    (r"condition_embedder\.time_proj\.bias", REPLICATED),
    (r"patch_embedding\.(weight|bias)", REPLICATED),
    (r"proj_out\.(weight|bias)", REPLICATED),
    (r"scale_shift_table", REPLICATED),
    (r"rope\.freqs_(cos|sin)", REPLICATED),
)
TEXT_ENCODER_RULES: tuple[Rule, ...] = (
    (r"shared\.weight", ("fsdp", "tp")),
    (r"encoder\.block\.\*\.layer\.0\.SelfAttention\.[qkv]\.weight", COLUMN),
    (r"encoder\.block\.\*\.layer\.0\.SelfAttention\.o\.weight", ROW),
    (r"encoder\.block\.\*\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", (None, "tp")),
    (r"encoder\.block\.\*\.layer\.1\.DenseReluDense\.wi(_[01])?\.weight", COLUMN),
    (r"encoder\.block\.\*\.layer\.1\.DenseReluDense\.wo\.weight", ROW),
    (r"encoder\.block\.\*\.layer\.[01]\.layer_norm\.weight", REPLICATED),
    (r"encoder\.final_layer_norm\.weight", REPLICATED),
)
VAE_RULES: tuple[Rule, ...] = ((r"(decoder|post_quant_conv)\..*", REPLICATED),)  # 0.24 GiB: the picture is sharded instead


def match_rule(rules: tuple[Rule, ...], name: str) -> tuple[str | None, ...]:
    """The entries of the one rule whose pattern matches ``name``.

    Raises:
        KeyError: no rule, or more than one, matches.
    """
    matches = [entries for pattern, entries in rules if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise KeyError(f"{name}: {len(matches)} sharding rules match, wanted exactly one")
    return matches[0]


def weight_spec(
    rules: tuple[Rule, ...], name: str, shape: tuple[int, ...], mesh: Mesh, *, fsdp: bool, stacked: bool
) -> PartitionSpec:
    """The PartitionSpec of a weight at rest.

    Args:
        shape: its shape, with the leading blocks axis when ``stacked`` (never sharded: each block is used whole).
        fsdp: also split over dp and sp, to be gathered before use.
    """
    from jax.sharding import PartitionSpec

    entries = match_rule(rules, name)
    axes = {"tp": ("tp",), "fsdp": ("dp", "sp") if fsdp else (), None: ()}
    dims = shape[1:] if stacked else shape
    entries = entries + (None,) * (len(dims) - len(entries))
    resolved = [divisible_axes(axes[entry], size, mesh) for entry, size in zip(entries, dims, strict=True)]
    return PartitionSpec(*([None] if stacked else []), *(found or None for found in resolved))


def divisible_axes(axes: tuple[str, ...], size: int, mesh: Mesh) -> tuple[str, ...]:
    """The longest prefix of ``axes`` (those of size 1 left out) whose product divides ``size``."""
    chosen: tuple[str, ...] = ()
    product = 1
    for axis in axes:
        if mesh.shape[axis] == 1:
            continue
        product *= mesh.shape[axis]
        if size % product:
            break
        chosen += (axis,)
    return chosen


def constrain(x: jax.Array, mesh: Mesh, *entries: tuple[str, ...] | str | None) -> jax.Array:
    """Ask the compiler for ``x`` laid out as ``entries`` say, one a dimension; axes that do not divide are dropped."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if mesh.size == 1:
        return x
    spec = []
    for size, entry in zip(x.shape, entries, strict=True):
        axes = (entry,) if isinstance(entry, str) else (entry or ())
        spec.append(divisible_axes(tuple(axes), size, mesh) or None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def input_sharding(mesh: Mesh, *entries: tuple[str, ...] | str | None) -> jax.sharding.NamedSharding:
    """The NamedSharding of a jit input: one entry a leading dimension, the rest replicated."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*entries))


# MiB of vector memory that one fusion may use, by device kind; the compiler's own default is 16. A matmul of 18,900 x 5,120
# by 5,120 x 13,824 takes 6.3M cycles with 64 where it takes 8.0M with 16 (v6e; 5.1M at peak).
SCOPED_VMEM_MIB = {"TPU v5 lite": 64, "TPU v5": 32, "TPU v6 lite": 64, "TPU7x": 32}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Options for ``jax.jit(compiler_options=...)`` on the chips of ``mesh``; None where there is nothing to ask for."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    # The weights of the next block arrive while this one computes (openxla.org/xla/flags_guidance names the three together;
    # without them every gather of a v6e program waits). Not xla_tpu_overlap_compute_collective_tc: with these it gave NaN on
    # v6e-16 (maxdiffusion issue 429).
    options = {
        "xla_tpu_enable_async_all_to_all": "true", "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true", "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    }  # fmt: skip
    if device.device_kind in SCOPED_VMEM_MIB:
        options["xla_tpu_scoped_vmem_limit_kib"] = str(1024 * SCOPED_VMEM_MIB[device.device_kind])
    return options
