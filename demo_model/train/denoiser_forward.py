"""A forward pass of `WanTransformer3DModel` for training: the same function, with cheaper padding.

In Wan the text embeddings are zero past the prompt and the padded positions still act as attention keys, all alike.
Instead of 512 keys this pass uses the real ones and a single padded key whose score gets `log(count)` added: the
softmax is the same. It also returns the cross-attention weights, for the grounding loss.
tests/test_demo_model.py compares it with the stock model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor
from torch.nn import functional as F

TEXT_LENGTH = 512  # WanPipeline's max_sequence_length


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, L, d]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on pairs (2i, 2i+1); `x` [B, H, L, d], `cos` and `sin` [L, d / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _self_attention(layer: WanAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    query = _rotate(_heads(layer.norm_q(layer.to_q(x)), layer.heads), cos, sin)
    key = _rotate(_heads(layer.norm_k(layer.to_k(x)), layer.heads), cos, sin)
    value = _heads(layer.to_v(x), layer.heads)
    # Written out: at 180 tokens of 24 channels the fused kernel's backward is slower than softmax between two matmuls.
    scores = (query * query.shape[-1] ** -0.5).to(value.dtype) @ key.to(value.dtype).mT
    out = scores.float().softmax(-1).to(value.dtype) @ value
    return layer.to_out[0](out.transpose(1, 2).flatten(2))


def _cross_attention(layer: WanAttention, x: Tensor, text: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    query = _heads(layer.norm_q(layer.to_q(x)), layer.heads)
    key = _heads(layer.norm_k(layer.to_k(text)), layer.heads)
    value = _heads(layer.to_v(text), layer.heads)
    scores = (query.to(value.dtype) @ key.to(value.dtype).mT) * query.shape[-1] ** -0.5
    weights = (scores.float() + bias).softmax(-1)
    out = weights.to(value.dtype) @ value
    return layer.to_out[0](out.transpose(1, 2).flatten(2)), weights.mean(1)


def block_forward(
    block: WanTransformerBlock, x: Tensor, projected: Tensor, text: Tensor, bias: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """One transformer block: hidden states `[B, tokens, dim]` float32 and cross-attention `[B, tokens, L + 1]`."""
    shift, scale, gate, c_shift, c_scale, c_gate = (block.scale_shift_table + projected).chunk(6, 1)
    x = x + _self_attention(block.attn1, block.norm1(x) * (1 + scale) + shift, cos, sin) * gate
    out, weights = _cross_attention(block.attn2, block.norm2(x), text, bias)
    x = x + out
    x = x + block.ffn(block.norm3(x) * (1 + c_scale) + c_shift) * c_gate
    return x, weights


def forward(
    model: WanTransformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    lengths: Tensor,
    block_function: Callable[..., tuple[Tensor, Tensor]] = block_forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity, attention maps and what the first half of the blocks leaves.

    Args:
        model: The stock model; only its weights and layers are used.
        latents: `[B, 16, F, h, w]`, noisy, normalised.
        timestep: `[B]`, sigma times 1000.
        text: `[B, L, text_dim]` encoder outputs; rows past `lengths` are ignored.
        lengths: `[B]` real tokens of each prompt, end mark included.
        block_function: `block_forward`, or a compiled version of it.

    Returns:
        Velocity `[B, 16, F, h, w]`; the mean over blocks and heads of the cross-attention weights `[B, tokens, L + 1]`,
        whose last column is the padding's total; hidden states `[B, tokens, dim]` after half of the blocks.
    """
    batch, _, frames, height, width = latents.shape
    cos, sin = model.rope(latents)
    cos, sin = cos[0, :, 0, 0::2].float(), sin[0, :, 0, 1::2].float()
    position = torch.arange(text.shape[1] + 1, device=text.device)
    real = position[None, :] < lengths[:, None]
    text = torch.cat([text, text.new_zeros(batch, 1, text.shape[2])], 1) * real[..., None]
    bias = torch.where(real, 0.0, -torch.inf)
    bias[:, -1] = (TEXT_LENGTH - lengths).float().log()
    bias = bias[:, None, None, :]

    x = model.patch_embedding(latents).flatten(2).transpose(1, 2).float()
    embedder = model.condition_embedder
    time = embedder.time_embedder(embedder.timesteps_proj(timestep).float())
    projected = embedder.time_proj(F.silu(time)).float().unflatten(1, (6, -1))
    text = embedder.text_embedder(text)

    attention: Tensor | float = 0.0
    middle = x
    for number, block in enumerate(model.blocks, 1):
        x, weights = block_function(block, x, projected, text, bias, cos, sin)
        attention = attention + weights
        if number == len(model.blocks) // 2:
            middle = x
    shift, scale = (model.scale_shift_table + time.float().unsqueeze(1)).chunk(2, 1)
    x = model.proj_out(model.norm_out(x) * (1 + scale) + shift).float()
    x = x.view(batch, frames, height // 2, width // 2, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    assert isinstance(attention, Tensor)
    return x.reshape(batch, -1, frames, height, width), attention / len(model.blocks), middle
