"""Muon for the matrices of the layers: momentum, then the nearest orthogonal matrix, so that each direction moves alike.

As described by Keller Jordan (2024), in float32: torch's own computes in bfloat16, which a CPU without such units does
ten times slower. Matrices of one shape are done together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TURNS = 5                                # of the iteration: singular values end between 0.7 and 1.2
A, B, C = 3.4445, -4.7750, 2.0315        # its polynomial, chosen by the author for a steep start


class Muon(torch.optim.Optimizer):
    """lr is the size of a step in units of an orthogonal matrix; tall matrices get the square root of their ratio more."""

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:     # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._step(group, weights)

    def _step(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        ahead = []
        for weight in weights:
            assert weight.grad is not None
            mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1.0 - group["momentum"])
            ahead.append(weight.grad.lerp(mean, group["momentum"]))
        rows, columns = weights[0].shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        for weight, move in zip(weights, orthogonal(torch.stack(ahead)), strict=True):
            weight.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(move, alpha=scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns], each with its singular values brought near one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(TURNS):
        gram = x @ x.transpose(1, 2)
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
