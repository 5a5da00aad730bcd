"""Embedding tables."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samplewise.outer import Rows
from samplewise.registry import expand, rule
from samplewise.running import listed


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
            "embedding: scale_grad_by_freq=True divides by counts over the batch, which mixes its samples; leave it False"
        )
    n, t, d = grad.shape[0], input[:1].numel(), grad.shape[-1]
    index, value = input.reshape(n, t), grad.reshape(n, t, d)
    if padding_idx >= 0:
        value = value.masked_fill((index == padding_idx)[..., None], 0)
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
    # out[n] = sum (mode 0), mean (1) or max (2) over the bag's positions t of weight[input[n,t]]
    starts = offsets[:-1] if include_last_offset else offsets
    end = int(offsets[-1]) if include_last_offset else input.numel()
    positions, inside = _bags(listed(starts), end, input.device)
    # a bag is its sample's, where the offsets are the samples'
    own = torch.zeros_like(starts)[:, None]
    index = _in_bags(input, positions) + own
    # a negative one counts from the end
    unused = -1 if padding_idx is None else padding_idx % len(weight)
    kept = (inside & (index != unused))[..., None]
    rows = torch.embedding(weight, index, -1, scale_grad_by_freq, sparse)
    if per_sample_weights is not None:
        rows = rows * _in_bags(per_sample_weights, positions)[..., None]
    if mode == 2:
        largest = rows.masked_fill(~kept, -torch.inf).amax(1) if rows.shape[1] else rows.sum(1)
        return largest.masked_fill(largest == -torch.inf, 0.0), None, None, None
    total = torch.where(kept, rows, 0.0).sum(1)
    return (total / kept.sum(1).clamp_min(1) if mode == 1 else total), None, None, None


def _bags(starts: Sequence[int], total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the positions of each bag are, `(bags, longest)`, and which of these are inside."""
    sizes = [end - start for start, end in zip(starts, [*starts[1:], total], strict=False)]
    steps = torch.arange(max(sizes, default=0), device=device)
    inside = steps < torch.tensor(sizes, dtype=torch.long, device=device)[:, None]
    # past its end a bag shows its first entry, which is not counted
    first = torch.tensor(starts, dtype=torch.long, device=device)[:, None].clamp_max(max(0, total - 1))
    return first + steps * inside, inside


def _in_bags(x: Tensor, positions: Tensor) -> Tensor:
    rows = x if positions.flatten().equal(torch.arange(len(x), device=x.device)) else x.index_select(0, positions.flatten())
    return rows.reshape(positions.shape)
