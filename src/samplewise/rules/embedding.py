"""Embedding tables."""

from typing import Any

import torch
from torch import Tensor

from samplewise.factors import Rows
from samplewise.registry import expand, rule


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


@expand(torch.embedding_bag)
def embedding_bag(
    weight: Tensor,
    input: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    # out[n] = sum (mode 0), mean (1) or max (2) over the bag's positions t of weight[input[n,t]]; bags of equal size only
    starts = offsets[:-1] if include_last_offset else offsets
    size = input.numel() // max(1, starts.numel())
    if not starts.equal(torch.arange(starts.numel(), device=starts.device) * size) or starts.numel() * size != input.numel():
        return NotImplemented
    rows = torch.embedding(weight, input, -1, scale_grad_by_freq, sparse).unflatten(0, (starts.numel(), size))
    kept = (input != (-1 if padding_idx is None else padding_idx)).unflatten(0, (starts.numel(), size))[..., None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unflatten(0, (starts.numel(), size))[..., None]
    if mode == 2:
        largest = rows.masked_fill(~kept, -torch.inf).amax(1) if size else rows.sum(1)
        return largest.masked_fill(largest == -torch.inf, 0.0), None, None, None
    total = (rows * kept).sum(1)
    return (total / kept.sum(1).clamp_min(1) if mode == 1 else total), None, None, None
