"""The plain program that seed 001 measured: stock modules, blocks unrolled, its mesh and its attention table.

Only for calibrating predictions against a time that was measured on hardware; nothing else runs this.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax
from diffusers import WanTransformer3DModel
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.interop import jax_view, torch_view

from wan_common.mesh import MeshShape
from wan_common.torchax_bridge import DTYPES, meta_module

MEASURED_SECONDS = 4.59  # a step of 14B, 720p, 81 frames on v6e-8 (seed 001's benchmark table)
MESH = MeshShape(dp=2, tp=4)  # seed 001
BLOCKS = (3328, 2816, 256)  # seed 001: bqsize, bkvsize, bkvcomputesize
LONG_KEYS = 20000  # seed 001: self-attention above this many keys is split by heads, else queries by tokens
# Seed 001's published stage 2 with its defaults (--use_fsdp): every weight is split along its larger side of the matmul and
# gathered when it is used; everything else is replicated.
_RULES = (
    ("to_q.weight", (None, "tp")), ("to_k.weight", (None, "tp")), ("to_v.weight", (None, "tp")), ("to_out.0.weight", ("tp",)),
    ("net.0.proj.weight", (None, "tp")), ("net.2.weight", ("tp",)), ("time_embedder.linear_1.weight", (None, "tp")),
    ("time_embedder.linear_2.weight", ("tp",)), ("time_proj.weight", ("tp",)), ("text_embedder.linear_1.weight", (None, "tp")),
    ("text_embedder.linear_2.weight", ("tp",)), ("proj_out.weight", (None, "tp")),
)  # fmt: skip


def _attention(mesh: Mesh, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[B, H, S, D]: a kernel on both, by heads on long keys, by queries on short ones; the output is split by tokens, as there."""
    from custom_splash_attention import BlockSizes, splash_attention

    split, whole = PartitionSpec("dp", None, "tp", None), PartitionSpec("dp", None, None, None)
    if key.shape[2] > LONG_KEYS:
        spec = PartitionSpec("dp", "tp", None, None)
        blocks = BlockSizes(BLOCKS[0], BLOCKS[1], BLOCKS[2], BLOCKS[2])
        out = jax.shard_map(
            lambda q, k, v: splash_attention(q, k, v, block_sizes=blocks), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec,
            check_vma=False,
        )(query, key, value)  # fmt: skip
    else:
        out = jax.shard_map(
            lambda q, k, v: splash_attention(q, k, v), mesh=mesh, in_specs=(split, whole, whole), out_specs=split, check_vma=False
        )(query, key, value)
    return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, split))


class _ComplexRope:
    """Attention of a block, with the rotation of the model that was measured.

    Seed 001 ran diffusers-tpu, whose RoPE multiplies complex numbers. Today's diffusers writes into ``out[..., 0::2]``: a
    scatter under torchax, whose partitioning alone adds 40M cycles to a block (docs/LOG.md).
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q, k, v = (jax_view(x) for x in (query, key, value))
        if rotary_emb is not None:
            cos, sin = (jax_view(x).transpose(0, 2, 1, 3) for x in rotary_emb)
            turn = jax.lax.complex(cos[..., 0::2].astype(jnp.float32), sin[..., 1::2].astype(jnp.float32))
            q, k = _rotate(q, turn), _rotate(k, turn)
        out = torch_view(_attention(self.mesh, q, k, v)).transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[0](out)


def _rotate(x: jax.Array, turn: jax.Array) -> jax.Array:
    """[B, H, S, D], pairs (2i, 2i + 1) as complex numbers times ``turn`` [1, 1, S, D / 2]."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turn
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(x.dtype)


def plain_program(
    config: dict[str, Any], mesh: Mesh, height: int, width: int, frames: int, text_length: int
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted stock forward on a batch of two (guidance), and its abstract arguments; bf16."""
    model = meta_module(lambda: WanTransformer3DModel.from_config(config))
    env = torchax.tensor.Environment()
    for block in model.blocks:
        block.attn1.set_processor(_ComplexRope(mesh))
        block.attn2.set_processor(_ComplexRope(mesh))

    def forward(params: dict[str, jax.Array], latents: jax.Array, timestep: jax.Array, embeds: jax.Array) -> jax.Array:
        with env, torch.no_grad():
            arguments = torch_view((latents, timestep, embeds))
            out = torch.func.functional_call(model, torch_view(params), arguments, {"return_dict": False})
            return jax_view(out)[0]

    def struct(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    params = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        spec = next((spec for suffix, spec in _RULES if name.endswith(suffix)), ())
        kept = any(part in WanTransformer3DModel._keep_in_fp32_modules for part in name.split("."))
        params[name] = struct(tuple(tensor.shape), np.dtype(np.float32) if kept else DTYPES["bfloat16"], *spec)
    latents = (2, model.config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    inputs = (
        struct(latents, jnp.bfloat16, "dp"),
        struct((2,), jnp.int32),
        struct((2, text_length, model.config.text_dim), jnp.bfloat16, "dp"),
    )
    return jax.jit(forward), (params, *inputs)
