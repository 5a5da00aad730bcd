"""Normalisation layers: scale and shift after statistics that belong to one sample, or to the past (batch norm in evaluation)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplewise.factors import Dense
from samplewise.registry import rule


@rule(torch.layer_norm, saves={"weight": ["input"], "bias": []})
def layer_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> dict[str, object]:
    # out[n,t,d] = weight[d] x[n,t,d] + bias[d], x standardised over d
    last = len(normalized_shape)
    return {
        "weight": lambda: Dense(_over_positions(grad * torch.layer_norm(input, normalized_shape, eps=eps), last)),
        "bias": lambda: Dense(_over_positions(grad, last)),
    }


@rule(torch.rms_norm, saves={"weight": ["input"]})
def rms_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[str, object]:
    # out[n,t,d] = weight[d] x[n,t,d], x divided by its root mean square over d
    normalized = torch.rms_norm(input, normalized_shape, eps=eps)
    return {"weight": Dense(_over_positions(grad * normalized, len(normalized_shape)))}


@rule(torch.group_norm, saves={"weight": ["input"], "bias": []})
def group_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> dict[str, object]:
    # out[n,c,t] = weight[c] x[n,c,t] + bias[c], x standardised over t and the channels of a group
    return _channels(grad, lambda: torch.group_norm(input, num_groups, eps=eps))


@rule(torch.instance_norm, saves={"weight": ["input", "running_mean", "running_var"], "bias": []})
def instance_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> dict[str, object]:
    # out[n,c,t] = weight[c] x[n,c,t] + bias[c], x standardised over t, or by the running statistics
    if use_input_stats:
        # the running statistics are updated in the forward, once: not here
        return _channels(grad, lambda: torch.instance_norm(input, None, None, None, None, True, momentum, eps, cudnn_enabled))
    return _channels(grad, lambda: _by_running(input, running_mean, running_var, eps))


@rule(torch.batch_norm, saves={"weight": ["input", "running_mean", "running_var"], "bias": []})
def batch_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> dict[str, object]:
    # out[n,c,t] = weight[c] x[n,c,t] + bias[c], x standardised by the running statistics; training mode is refused in the forward
    return _channels(grad, lambda: _by_running(input, running_mean, running_var, eps))


def _by_running(input: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.batch_norm(input, mean, var, eps=eps)


def _channels(grad: Tensor, normalized: Callable[[], Tensor]) -> dict[str, object]:
    """Scale and shift per channel, axis 1 of `(n, c, ...)`."""
    return {
        "weight": lambda: Dense(_over_space(grad * normalized())),
        "bias": lambda: Dense(_over_space(grad)),
    }


def _over_space(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def _over_positions(x: Tensor, last: int) -> Tensor:
    """Sum over the axes between the samples and the `last` ones."""
    between = tuple(range(1, x.ndim - last))
    return x.sum(between) if between else x
