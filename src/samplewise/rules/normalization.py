"""Normalisation layers: scale and shift after statistics that belong to one sample, or to the past (batch norm in evaluation)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.buffers import scratch
from samplewise.factors import HALF, Dense
from samplewise.products import has_own_kernels, own_kernels
from samplewise.registry import PASSED_ON, RULES, operation, rule

_WIDE = frozenset({torch.float32, torch.float64})
_AFFINE = ("weight", "bias")
_GROUP_NORM_BACKWARD = torch.ops.aten.native_group_norm_backward.default
_SCALE_AND_SHIFT = [False, True, True]


def _by_its_op(function: Callable[..., Tensor], op: Callable[..., Tensor]) -> None:
    """Say that a function of `torch.nn.functional` is an op, with a flag that it adds."""

    def passed_on(
        input: Tensor, sizes: object, /, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return op, (input, sizes, weight, bias, eps, torch.backends.cudnn.enabled)

    PASSED_ON[function] = passed_on


_by_its_op(F.layer_norm, torch.layer_norm)
_by_its_op(F.group_norm, torch.group_norm)


def _in_two(op: Callable[..., Tensor], *, channels: bool) -> Callable[..., Tensor]:
    """A norm, and then its scale and shift as ops of their own."""

    def apart(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _, *names = RULES[operation(op).name].arguments
        given = dict(zip(names, args, strict=False)) | kwargs
        ones = [1] * (input.ndim - 2) if channels else []
        scale, shift = (None if (x := given.get(name)) is None else x.reshape(*x.shape, *ones) for name in _AFFINE)
        out = op(input, **{name: None if name in _AFFINE else value for name, value in given.items()})
        out = out if scale is None else out * scale
        return out if shift is None else out + shift

    return apart


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The op, with the mean and the reciprocal deviation that it found."""
    # in half precision our own kernel takes them
    if not _keeps_statistics(input, weight, bias, half=has_own_kernels(input)):
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable), ()
    out, *statistics = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
    return out, [x.detach() if x.requires_grad else x for x in statistics]


@rule(
    torch.layer_norm,
    saves={"weight": ["input", "statistics"], "bias": []},
    run=_layer_norm,
    apart=_in_two(torch.layer_norm, channels=False),
)
def layer_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    statistics: Sequence[Tensor] = (),
) -> dict[str, object]:
    # out[n,t,d] = weight[d] x[n,t,d] + bias[d], x standardised over d
    last = len(normalized_shape)
    # of what the rule does not need there is but a stand-in
    kernels = own_kernels(grad, input) if statistics and not statistics[0].is_meta else None
    if kernels is not None:
        n, t, d = len(grad), statistics[0][:1].numel(), math.prod(normalized_shape)
        g, x = (y.contiguous().view(n, t, d).mT for y in (grad, input))
        scale, shift = kernels.norm_sums(g, x, *statistics, by_position=True)
        return {"weight": Dense(scale.view(n, *normalized_shape)), "bias": Dense(shift.view(n, *normalized_shape))}

    def standardised() -> Tensor:
        if not statistics or input.dtype in HALF:
            return _over_positions(grad * torch.layer_norm(input, normalized_shape, eps=eps), last)
        # sum_t rstd[n,t] grad[n,t,d] (input[n,t,d] - mean[n,t]), each pass in the same memory
        mean, rstd = statistics
        centred = torch.sub(input, mean, out=scratch("standardised", input.shape, input)).mul_(grad)
        n, t, d = len(grad), rstd[:1].numel(), math.prod(normalized_shape)
        return torch.bmm(rstd.reshape(n, 1, t), centred.view(n, t, d)).reshape(n, *normalized_shape)

    return {"weight": lambda: Dense(standardised()), "bias": lambda: Dense(_over_positions(grad, last))}


@rule(torch.rms_norm, saves={"weight": ["input"]}, apart=_in_two(torch.rms_norm, channels=False))
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


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The op, with the mean and the reciprocal deviation that it found."""
    # on CUDA its own backward in half precision is the op's, as plain training has it
    half = input.device.type == "cuda" and input.dtype in HALF
    if not _keeps_statistics(input, weight, bias, half=half) or not input.is_contiguous():
        return torch.group_norm(input, num_groups, weight, bias, eps, cudnn_enabled), ()
    n, c, *space = input.shape
    out, *statistics = torch.native_group_norm(input, weight, bias, n, c, math.prod(space), num_groups, eps)
    return out, [x.detach() if x.requires_grad else x for x in statistics]


@rule(
    torch.group_norm,
    saves={"weight": ["input", "statistics"], "bias": []},
    run=_group_norm,
    apart=_in_two(torch.group_norm, channels=True),
)
def group_norm(
    grad: Tensor,
    out: None,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    statistics: Sequence[Tensor] = (),
) -> dict[str, object]:
    # out[n,c,t] = weight[c] x[n,c,t] + bias[c], x standardised over t and the channels of a group
    if not statistics or statistics[0].is_meta:
        return _channels(grad, lambda: torch.group_norm(input, num_groups, eps=eps))
    # the op's own backward, for one image with the channels of all samples, as a row: four axes may look like channels last
    (n, c), t = grad.shape[:2], math.prod(grad.shape[2:])
    kernels = own_kernels(grad, input)
    if kernels is not None:
        g, x = (y.contiguous().view(n, c, t) for y in (grad, input))
        scale, shift = kernels.norm_sums(g, x, *statistics, by_position=False)
        return {"weight": Dense(scale), "bias": Dense(shift)}
    # of the scale it takes the shape alone here
    (mean, rstd), scaled = statistics, statistics[0].new_empty(n * c)
    # a reshape may be a view in another memory order, which autograd would not hand to the kernel
    g, x = (y.reshape(1, n * c, t).contiguous() for y in (grad, input))
    _, scale, shift = _GROUP_NORM_BACKWARD(g, x, mean, rstd, scaled, 1, n * c, t, n * num_groups, _SCALE_AND_SHIFT)
    return {"weight": Dense(scale.view(n, c)), "bias": Dense(shift.view(n, c))}


def _keeps_statistics(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, half: bool = False) -> bool:
    """Whether the op may be run so that it gives its statistics: as ever on a CPU or GPU, and not to be differentiated again."""
    if torch.is_autocast_enabled(input.device.type) or not (half or input.dtype in _WIDE) or not input.numel():
        return False
    return all(x is None or (x.dtype == input.dtype and not x.requires_grad) for x in (weight, bias))


@rule(
    torch.instance_norm,
    saves={"weight": ["input", "running_mean", "running_var"], "bias": []},
    apart=_in_two(torch.instance_norm, channels=True),
)
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


@rule(
    torch.batch_norm,
    saves={"weight": ["input", "running_mean", "running_var"], "bias": []},
    apart=_in_two(torch.batch_norm, channels=True),
)
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
