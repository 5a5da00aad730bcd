"""The linear layer."""

import torch.nn.functional as F
from torch import Tensor

from samplewise.factors import Dense, positions
from samplewise.outer import Outer
from samplewise.registry import rule


@rule(F.linear, saves={"weight": ["input"], "bias": []})
def linear(grad: Tensor, out: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, object]:
    # out[n,t,o] = sum_i input[n,t,i] weight[o,i] + bias[o]
    g = positions(grad if weight.ndim == 2 else grad[..., None])
    return {
        "weight": lambda: Outer(g, positions(input), weight.shape),
        "bias": lambda: Dense(g.sum((1, 2)) if weight.ndim == 2 else g.sum((1, 2, 3))),
    }
