"""The jitted denoising step: stock WanTransformer3DModel with our attention processor, guidance, and the solver's update."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from jax.sharding import Mesh
from torchax.interop import jax_view, torch_view

from custom_splash_attention import HEAD_DIMS
from wan_common.attention import (
    AttentionOptions,
    Prepare,
    attention,
    cross_attention_layout,
    merged_attention,
    self_attention_layout,
    token_axes,
)  # fmt: skip
from wan_common.attention_maps import token_attention
from wan_common.errors import ArtifactError
from wan_common.rope_kernel import LANES, rope_tables
from wan_common.scheduler import State, StepTable, advance
from wan_common.sharding import TRANSFORMER_RULES, compiler_options, constrain, input_sharding
from wan_common.torchax_bridge import (
    DTYPES,
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

logger = logging.getLogger("denoiser")


@dataclasses.dataclass(frozen=True)
class Capture:
    """Which cross-attention maps a step returns (see wan_common.attention_maps); averages are over what is not asked for."""

    per_head: bool = False
    per_block: bool = False
    negative: bool = False  # also the maps of the negative prompt


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The ``config.json`` of a diffusers component.

    Raises:
        ArtifactError: missing, unreadable or of another class.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); choose a Wan 2.1 diffusers folder with --model_id") from error
    if config.get("_class_name") != class_name:
        raise ArtifactError(
            f"{path}: found {config.get('_class_name')}, wanted {class_name}; choose a Wan 2.1 diffusers folder with --model_id"
        )
    return config


def halves_permutation(heads: int, head_dim: int) -> np.ndarray:
    """Row order that turns RoPE's interleaved pairs (x0, x1), (x2, x3) ... of each head into halves (x0, x2 ... | x1, x3 ...)."""
    within = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(heads)[:, None] * head_dim + within[None]).reshape(-1)


class AttentionProcessor:
    """Attention of WanTransformer3DModel in JAX, in place of diffusers' ``WanAttnProcessor``.

    diffusers rotates interleaved pairs with ``out[..., 0::2] = ...``: a scatter under XLA. Here the rows of ``to_q``,
    ``to_k`` and their norms were permuted at load time (:func:`halves_permutation`), so that a rotation is two halves and a
    concatenation; query and key are permuted alike, so their products do not change.
    """

    def __init__(self, options: AttentionOptions, mesh: Mesh, tokens: int):
        self.options, self.mesh, self.tokens = options, mesh, tokens
        self.capture: Callable[[jax.Array, jax.Array], Any] | None = None  # called with query and key of each cross-attention
        self.captured: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, S, inner_dim] to [B, S, inner_dim]; self-attention when ``encoder_hidden_states`` is None."""
        mesh = self.mesh
        # What tensor parallelism needs whole: the tokens of this sp shard with all their features.
        hidden_states = torch_view(constrain(jax_view(hidden_states), mesh, "dp", "sp", None))
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if self.options.kernel == "splash" and jax_view(query).shape[-1] // attn.heads % LANES == 0:
            return self._merged(attn, query, key, value, rotary_emb)
        q, k, v = (self._heads(jax_view(x), attn.heads) for x in (attn.norm_q(query), attn.norm_k(key), value))
        if encoder_hidden_states is None:
            assert rotary_emb is not None
            cos, sin = (jax_view(x).transpose(0, 2, 1, 3) for x in rotary_emb)
            q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
            layout = self_attention_layout(mesh, q.shape[0], attn.heads)
            k, v = (constrain(x, mesh, layout.batch, layout.heads, None, None)[:, :, : self.tokens] for x in (k, v))
            out = attention(q, k, v, self.options, mesh, layout)
        else:
            # 512 keys: XLA's own softmax; seed 001's window and smoothing are for self-attention.
            layout = cross_attention_layout(mesh, q.shape[0], attn.heads)
            out = attention(q, k, v, AttentionOptions(), mesh, layout)
            if self.capture is not None:
                self.captured = self.capture(q, k)
        out = out.transpose(0, 2, 1, 3).reshape(*hidden_states.shape[:2], -1)
        return attn.to_out[0](torch_view(out))

    def _merged(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:  # fmt: skip
        """The TPU's way: [B, S, heads x head_dim] throughout (attention.merged_attention)."""
        mesh, heads = self.mesh, attn.heads
        q, k, v = jax_view(query), jax_view(key), jax_view(value)
        head_dim = q.shape[-1] // heads
        if mesh.shape["tp"] == 1 and (rotary_emb is not None or self.capture is None):
            weights = [jax_view(norm.weight) for norm in (attn.norm_q, attn.norm_k)]
        else:  # a norm over features that are split, or whose output is wanted
            q, k = (jax_view(norm(torch_view(x))) for norm, x in ((attn.norm_q, q), (attn.norm_k, k)))
            weights = [None, None]
        prepare = tuple(Prepare(w, norm.eps) for w, norm in zip(weights, (attn.norm_q, attn.norm_k), strict=True))
        tables = None
        if rotary_emb is None:
            layout = cross_attention_layout(mesh, q.shape[0], heads)
            if self.capture is not None:
                self.captured = self.capture(self._heads(q, heads), self._heads(k, heads))
        else:
            layout = self_attention_layout(mesh, q.shape[0], heads)
            tables = rope_tables(*(jax_view(x) for x in rotary_emb))
        whole = "tp" if "tp" in layout.heads else None
        q = constrain(q, mesh, layout.batch, token_axes(mesh, layout), whole)
        k, v = (constrain(x, mesh, layout.batch, None if tables is None else token_axes(mesh, layout), whole) for x in (k, v))
        out = merged_attention(
            q, k, v, self.options, mesh, layout, head_dim=head_dim, prepare=prepare, tables=tables,
            kv_length=None if tables is None else self.tokens,
        )  # fmt: skip
        return attn.to_out[0](torch_view(constrain(out, mesh, layout.batch, token_axes(mesh, layout), whole)))

    def take_captured(self) -> Any:
        """What the last cross-attention captured, handed over once."""
        captured, self.captured = self.captured, None
        return captured

    @staticmethod
    def _heads(x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


class OnePassNorm(torch.nn.Module):
    """FP32LayerNorm in fp32 whose mean and variance come from one pass over the row: E[(x - c)^2] - E[x - c]^2.

    torch's two passes cost 0.84M cycles each on v6e for 18,900 tokens of 5,120. c is the row's first feature: with it the
    difference loses no more than (mean - c)^2 / variance of fp32's 24 bits.
    """

    def __init__(self, stock: torch.nn.LayerNorm, dtype: str):
        super().__init__()
        self.weight, self.bias, self.eps, self.dtype = stock.weight, stock.bias, stock.eps, DTYPES[dtype]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., features] in its dtype."""
        # The block hands over hidden_states.float(). Cast back (exactly) behind a barrier, or XLA writes the fp32 copy to
        # memory for all its users: 2.2M cycles.
        y = jax.lax.optimization_barrier(jax_view(x).astype(self.dtype))
        shifted = y.astype(jnp.float32) - y[..., :1].astype(jnp.float32)  # a slice of the fp32 values would be a user, too
        mean = shifted.mean(axis=-1, keepdims=True)
        variance = (shifted * shifted).mean(axis=-1, keepdims=True) - mean * mean
        out = (shifted - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.weight is not None:
            out = out * jax_view(self.weight).astype(jnp.float32) + jax_view(self.bias).astype(jnp.float32)
        return torch_view(out.astype(jax_view(x).dtype))


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE on [B, H, S, D] whose pairs lie in halves; ``cos``/``sin`` are diffusers' [1, 1, S, D] with every value twice."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def pad_tokens(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zero-pad ``axis`` to a multiple, so that every mesh divides the sequence; padded tokens are never keys."""
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


@dataclasses.dataclass
class Denoiser:
    """One denoising step of one clip as a pure function, ready to be jitted or compiled ahead of time.

    Build with :func:`build_denoiser`. ``plan`` says where the weights come from and go.
    """

    model: Any
    plan: dict[str, Weight]
    mesh: Mesh
    guidance: bool
    latent_shape: tuple[int, ...]
    text_shape: tuple[int, int]
    dtype: str
    processor: AttentionProcessor
    blocks: ScannedBlocks
    capture: Capture | None = None

    def predict(self, params: Params, latents: jax.Array, timestep: jax.Array, embeds: jax.Array) -> jax.Array:
        """The transformer's output [B, 16, F, h, w] for ``latents`` [B, 16, F, h, w] in the compute dtype."""
        stacked, rest = split_blocks(params, "blocks")
        self.blocks.bind(stacked)
        timesteps = jnp.broadcast_to(timestep, latents.shape[:1])
        with products_for(self.mesh):
            return call_module(self.model, rest, latents, timesteps, embeds, return_dict=False)[0]

    def step(  # fmt: skip
        self, params: Params, state: State, embeds: jax.Array, timestep: jax.Array, guidance_scale: jax.Array, rows: dict[str, jax.Array],
        groups: jax.Array | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """One step: predict (cond and uncond as one batch of two), guide, advance the solver.

        Args:
            state: the solver's memory (scheduler.State), fp32.
            embeds: [2, L, text_dim] (prompt, negative) with guidance, else [1, L, text_dim].
            timestep: int32 scalar. guidance_scale: fp32 scalar.
            rows: this step's rows of the StepTable, [K] each.
            groups: [batch, L, G] which tokens make up each followed word, with ``capture``; None captures nothing.

        Returns:
            The next state, and ``{"predicted_x0", "finite", "maps"}``: fp32 latents, a bool scalar, and the attention maps
            [1 or 2, G, (blocks,) (heads,) F, h/2, w/2] fp32 (None without ``groups``).
        """
        sample = constrain(state["sample"], self.mesh, None, None, None, None, None)
        batch = 2 if self.guidance else 1
        latents = jnp.broadcast_to(sample, (batch, *sample.shape[1:])).astype(embeds.dtype)
        latents = constrain(latents, self.mesh, "dp", None, None, None, None)
        if groups is not None:
            self._begin_capture(groups)
        output = self.predict(params, latents, timestep, embeds)
        maps = None if groups is None else self._end_capture()
        output = constrain(output, self.mesh, None, None, None, None, None)  # small; the solver works on whole latents
        if self.guidance:
            cond, uncond = output[:1], output[1:]
            scale = guidance_scale.astype(output.dtype)
            output = uncond + scale * (cond - uncond)
        following, x0 = advance(state, output, **rows)
        return following, {"predicted_x0": x0, "finite": jnp.isfinite(following["sample"]).all(), "maps": maps}

    def _begin_capture(self, groups: jax.Array) -> None:
        """Have every cross-attention of the call being traced leave its maps behind."""
        capture, mesh = self.capture, self.mesh
        assert capture is not None, "build the denoiser with capture to get maps"
        both = capture.negative or mesh.shape["dp"] > 1  # the second row has devices of its own: nothing is saved by leaving it out

        def maps(query: jax.Array, key: jax.Array) -> jax.Array:
            layout = cross_attention_layout(mesh, query.shape[0], query.shape[1])
            rows = slice(None) if both else slice(0, 1)
            return token_attention(
                query[rows], key[rows], groups[rows], average_heads=not capture.per_head,
                query_shards=math.prod(mesh.shape[axis] for axis in layout.queries),
                head_shards=math.prod(mesh.shape[axis] for axis in layout.heads),
            )  # fmt: skip

        self.processor.capture = maps
        self.blocks.collect = self.processor.take_captured

    def _end_capture(self) -> jax.Array:
        """The maps that all blocks left, [rows, G, (blocks,) (heads,) F, h/2, w/2]."""
        assert self.capture is not None
        maps, self.blocks.collected = self.blocks.collected, None  # [blocks, B, (heads,) G, S]
        self.processor.capture = self.blocks.collect = None
        maps = maps[:, :2 if self.capture.negative else 1, ..., : self.processor.tokens]
        maps = jnp.moveaxis(maps, -2, 0)  # [G, blocks, B, (heads,) S]
        if not self.capture.per_block:
            maps = maps.mean(axis=1, keepdims=True)
        maps = jnp.moveaxis(maps, 2, 0)  # [B, G, blocks, (heads,) S]
        if not self.capture.per_block:
            maps = maps.squeeze(2)
        maps = constrain(maps, self.mesh, *(None,) * maps.ndim)
        return maps.reshape(*maps.shape[:-1], *self.token_grid)

    @property
    def token_grid(self) -> tuple[int, ...]:
        """(F, h/2, w/2): the tokens of one clip."""
        return tuple(n // p for n, p in zip(self.latent_shape[2:], self.model.config.patch_size, strict=True))

    def jitted(self) -> Any:
        """``jax.jit(self.step)`` with the state donated: the solver's memory is updated in place. Every device has all outputs."""
        options = compiler_options(self.mesh)
        return jax.jit(self.step, donate_argnums=(1,), out_shardings=input_sharding(self.mesh), compiler_options=options)

    def abstract_inputs(self, order: int) -> tuple[Any, ...]:
        """ShapeDtypeStructs, with shardings, of :meth:`step`'s arguments for a solver of ``order``."""
        replicated = input_sharding(self.mesh)
        fp32 = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32, sharding=replicated)
        state = {
            "sample": fp32(self.latent_shape), "last_sample": fp32(self.latent_shape), "model_outputs": fp32((order, *self.latent_shape)),
        }  # fmt: skip
        batch = 2 if self.guidance else 1
        axis = "dp" if batch % self.mesh.shape["dp"] == 0 else None
        embeds = jax.ShapeDtypeStruct((batch, *self.text_shape), jnp.dtype(self.dtype), sharding=input_sharding(self.mesh, axis))
        timestep = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
        rows = {name: fp32((3 + order,)) for name in ("predicted_x0", "corrected", "next_sample")}
        return abstract_params(self.plan), state, embeds, timestep, fp32(()), rows

    def load(self, folder: Path) -> Params:
        """Stream the transformer's weights from ``folder`` into their shards."""
        return load_weights(self.plan, folder, "transformer weights")

    def put_embeds(self, prompt: np.ndarray, negative: np.ndarray | None) -> jax.Array:
        """Place one clip's embeddings [1, L, D] as :meth:`step` wants them (negative is ignored without guidance)."""
        struct = self.abstract_inputs(1)[2]
        rows = [prompt, negative] if self.guidance else [prompt]
        stacked = np.concatenate([np.asarray(row) for row in rows]).astype(struct.dtype)
        return jax.device_put(stacked, struct.sharding)

    def put_state(self, state: State) -> State:
        """Place the solver's memory on the devices (a copy: the step donates it)."""
        return jax.tree.map(lambda x: jax.device_put(jnp.array(x, jnp.float32, copy=True), input_sharding(self.mesh)), state)

    def rows(self, table: StepTable, index: int) -> dict[str, np.ndarray]:
        """Row ``index`` of the table, as :meth:`step` wants it."""
        return {name: getattr(table, name)[index] for name in ("predicted_x0", "corrected", "next_sample")}


def build_denoiser(
    config: dict[str, Any], mesh: Mesh, *, height: int, width: int, frames: int, text_length: int, guidance: bool = True,
    dtype: str = "bfloat16", fsdp: bool = False, options: AttentionOptions | None = None, capture: Capture | None = None,
) -> Denoiser:  # fmt: skip
    """Build the denoising step of a WanTransformer3DModel ``config`` for one clip's shape; no weights are touched.

    Args:
        height, width, frames: of the video, in pixels and frames.
        text_length: L of the embeddings.
        guidance: cond and uncond as one batch of two (guidance_scale > 1).
        capture: which attention maps :meth:`Denoiser.step` may be asked for; asking for none compiles the same program as without.

    Raises:
        ArtifactError: an image-to-video config (added_kv_proj_dim), which this text-to-video pipeline does not run.
    """
    if config.get("added_kv_proj_dim") is not None or config.get("image_dim") is not None:
        raise ArtifactError("transformer: an image-to-video model (added_kv_proj_dim); choose a text-to-video one with --model_id")
    # tokens after patch embedding; VAE factors 4 and 8 are Wan 2.1's
    layers = config.get("num_layers", inspect.signature(WanTransformer3DModel).parameters["num_layers"].default)
    model = meta_module(lambda: WanTransformer3DModel.from_config({**config, "num_layers": 1}))  # the scan needs one block
    cfg = model.config
    latent_shape = (1, cfg.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    tokens = math.prod(n // p for n, p in zip(latent_shape[2:], cfg.patch_size, strict=True))
    permutation = halves_permutation(cfg.num_attention_heads, cfg.attention_head_dim)
    plan = plan_weights(
        model, "blocks", TRANSFORMER_RULES, mesh, dtype, fsdp=fsdp, blocks=layers,
        keep_fp32=tuple(WanTransformer3DModel._keep_in_fp32_modules),
        permute_rows=lambda name: permutation if re.search(r"\.attn1\.(to|norm)_[qk]\.", name) else None,
    )  # fmt: skip
    shards = mesh.shape["sp"] * mesh.shape["tp"]
    options = options or AttentionOptions()
    if options.kernel == "splash" and cfg.attention_head_dim not in HEAD_DIMS:
        logger.info("head_dim %d: XLA's attention runs; the kernel is made for %s", cfg.attention_head_dim, HEAD_DIMS)
        options = dataclasses.replace(options, kernel="xla", block_q=None, block_kv=None, block_kv_compute=None)
    processor = AttentionProcessor(options, mesh, tokens)
    block = model.blocks[0]
    block.attn1.set_processor(processor)
    block.attn2.set_processor(processor)

    for name in ("norm1", "norm2", "norm3"):
        norm = getattr(block, name)
        if isinstance(norm, torch.nn.LayerNorm):  # norm2 is an Identity without cross_attn_norm
            setattr(block, name, OnePassNorm(norm, dtype))

    def spread(x: jax.Array) -> jax.Array:
        # Between the matmuls the tokens are split over sp and tp: norms and modulation are computed once, not tp times.
        return constrain(x, mesh, "dp", ("sp", "tp"), None)

    def whole_features(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch_view(constrain(jax_view(args[0]), mesh, "dp", "sp", None)), *args[1:])

    def spread_output(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return torch_view(spread(jax_view(output)))

    if mesh.size > 1:
        block.ffn.register_forward_pre_hook(whole_features)
        for part in (block.ffn, block.attn1, block.attn2):
            part.register_forward_hook(spread_output)
    scanned = ScannedBlocks(
        block,
        gather=gather_constraint(plan, "blocks", mesh) if fsdp and mesh.shape["dp"] * mesh.shape["sp"] > 1 else None,
        enter=lambda x: spread(pad_tokens(x, 1, shards)), between=spread, leave=lambda x: x[:, :tokens],
    )  # fmt: skip
    model.blocks = torch.nn.ModuleList([scanned])
    _pad_rotary(model.rope, shards)
    return Denoiser(
        model, plan, mesh, guidance, latent_shape, (text_length, cfg.text_dim), dtype, processor, scanned, capture,
    )  # fmt: skip


def _pad_rotary(rope: torch.nn.Module, multiple: int) -> None:
    """Give the rotary tables the same padding as the tokens (a hook on the stock module)."""

    def pad(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, ...]:
        return tuple(torch_view(pad_tokens(jax_view(table), 1, multiple)) for table in output)

    if multiple > 1:
        rope.register_forward_hook(pad)
