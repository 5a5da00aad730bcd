"""The linear layer."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from samplewise.factors import Dense, positions
from samplewise.outer import Outer
from samplewise.registry import rule


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor]]:
    """The op as one product: with weights that need no gradient, torch would run a product for each row of the batch."""
    if input.ndim <= 2 or input.is_contiguous() or weight.ndim != 2:
        return F.linear(input, weight, bias), ()
    out = F.linear(input.reshape(math.prod(input.shape[:-1]), input.shape[-1]), weight, bias)
    return out.reshape(*input.shape[:-1], len(weight)), ()


@rule(F.linear, saves={"weight": ["input"], "bias": []}, run=_linear)
def linear(grad: Tensor, out: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, object]:
    # out[n,t,o] = sum_i input[n,t,i] weight[o,i] + bias[o]
    g = positions(grad if weight.ndim == 2 else grad[..., None])
    return {
        "weight": lambda: Outer(g, positions(input), weight.shape),
        "bias": lambda: Dense(g.sum((1, 2)) if weight.ndim == 2 else g.sum((1, 2, 3))),
    }
