"""Output classes of transformers and diffusers as JAX pytrees, so that they cross a jit boundary (seed 001).

Importing this module registers them, once.
"""

from __future__ import annotations

from typing import Any

import jax
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput, Transformer2DModelOutput
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

OUTPUTS: tuple[type, ...] = (
    BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Transformer2DModelOutput, AutoencoderKLOutput, DecoderOutput,
)  # fmt: skip


def register_outputs() -> None:
    """Register each of :data:`OUTPUTS`: its fields are the children, their names the structure."""

    def flatten(output: Any) -> tuple[tuple[Any, ...], tuple[type, tuple[str, ...]]]:
        return tuple(output.values()), (type(output), tuple(output.keys()))

    def unflatten(structure: tuple[type, tuple[str, ...]], children: tuple[Any, ...]) -> Any:
        cls, names = structure
        return cls(**dict(zip(names, children, strict=True)))

    for cls in OUTPUTS:
        jax.tree_util.register_pytree_node(cls, flatten, unflatten)


register_outputs()
