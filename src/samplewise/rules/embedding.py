"""Embedding tables."""

import torch
from torch import Tensor

from samplewise.factors import Rows
from samplewise.registry import rule


@rule(torch.embedding, saves={"weight": ["input"]})
def embedding(
    grad: Tensor,
    out: None,
    weight: Tensor,
    input: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, object]:
    # out[n,t] = weight[input[n,t]]; `sparse` asks for another layout of the ordinary gradient, not for other numbers
    if scale_grad_by_freq:
        raise NotImplementedError(
            "embedding: scale_grad_by_freq=True divides by counts over the batch, which mixes its samples"
        )
    n, t, d = grad.shape[0], input[:1].numel(), grad.shape[-1]
    index, value = input.reshape(n, t), grad.reshape(n, t, d)
    if padding_idx >= 0:
        value = value * (index != padding_idx)[..., None]
    return {"weight": Rows(index, value, weight.shape)}
