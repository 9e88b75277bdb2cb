"""Muon for the hidden matrices, AdamW for the rest: fewer steps to the same loss, which is what two cores need.

Update of a matrix: momentum, orthogonalised by five Newton-Schulz iterations (K. Jordan, "Muon: an optimizer for
hidden layers in neural networks", 2024), scaled to AdamW's update size (0.2 sqrt(max(rows, columns)), Liu et al.,
"Muon is scalable for LLM training", 2025). Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a batch `[N, rows, columns]`, approximately (singular values 0.7 to 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).float()


class Muon:
    """Momentum 0.95, Nesterov, decoupled weight decay; the learning rate is set by the caller before each step.

    Convolution kernels `[out, in, ...]` count as matrices `[out, in * ...]`.
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[tuple(parameter.shape)].append(parameter)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.momentum, self.weight_decay, self.lr = momentum, weight_decay, 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its `.grad`."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            direction = gradient.lerp(buffer, self.momentum).flatten(2)
            update = orthogonalize(direction).view_as(buffer)
            scale = 0.2 * max(direction.shape[1:]) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-self.lr * scale)

    def state_dict(self) -> dict[str, Any]:
        """Momentum buffers, in the order of the parameters given."""
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s buffers."""
        for mine, saved in zip(self.buffers, state["buffers"], strict=True):
            mine.copy_(saved)
