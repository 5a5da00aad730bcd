"""Norms and clipped sums written by hand for networks of convolutions, group norms and linear layers.

Bare autograd functions around our own kernels, with our own choice among them: what a recording would take that knew the network
beforehand. It follows no samples, sees no second use of a parameter, and checks nothing.
"""

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peers import Problem
from samplewise.convolutional import Convolution
from samplewise.factors import Factor, squares
from samplewise.outer import Outer
from samplewise.results import clipping_weights
from samplewise.running import unrecorded
from samplewise.streaming import _frees
from samplewise.sums import Store

_CONVOLUTION = torch.ops.aten.convolution_backward.default
_NORM = torch.ops.aten.native_group_norm_backward.default


@dataclass
class Collected:
    """What one backward leaves for the norms and the sums."""

    # None where norms are all that is wanted
    store: Store | None = None
    factors: list[Factor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    # (n, elements) of biases and norms
    small: list[Tensor] = field(default_factory=list)

    def take(self, factor: Factor) -> None:
        """Take a weight's factor; for sums keep it, or the gradients in its place where `clipped_grads` stores them."""
        if self.store is not None and self.store.worth(factor):
            factor = self.store.kept(factor)
        self.squares.append(factor.sq_norms())
        if self.store is not None:
            self.factors.append(factor)

    def norms(self) -> tuple[Tensor, Tensor]:
        """`(n,)`, and the small gradients side by side, `(n, elements)`."""
        with unrecorded():
            small = torch.cat(self.small, 1)
            return torch.stack([squares(small), *self.squares]).sum(0).sqrt(), small


class Step(Protocol):
    """What the layers need of a step."""

    collected: Collected


class Convolved(torch.autograd.Function):
    """A convolution, and in its backward its weight's factor."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, step: Step, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """As the layer does."""
        ctx.step, ctx.layer = step, layer
        ctx.save_for_backward(x)
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.conv2d(x, layer.weight, layer.bias, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Keep what is needed, and go on to the input."""
        (x,), layer, kept = ctx.saved_tensors, ctx.layer, ctx.step.collected
        settings, wanted = (layer.stride, layer.padding, layer.dilation), [True, False, False]
        kept.take(Convolution(grad, x, layer.weight.shape, *settings, layer.groups))
        if layer.bias is not None:
            kept.small.append(grad.flatten(2).sum(2))
        if not ctx.needs_input_grad[3]:
            return None, None, None, None
        rest = (False, [0, 0], layer.groups, wanted)
        return None, None, None, _CONVOLUTION(grad, x, layer.weight, None, *settings, *rest)[0]


class Normed(torch.autograd.Function):
    """A group norm, and in its backward the gradients of its scale and shift."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, step: Step, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """As the layer does."""
        ctx.step, ctx.layer = step, layer
        sizes = (len(x), x.shape[1], x[0, 0].numel(), layer.num_groups)
        out, mean, rstd = torch.native_group_norm(x, layer.weight, layer.bias, *sizes, layer.eps)
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Keep what is needed, and go on to the input."""
        (x, mean, rstd), layer, small = ctx.saved_tensors, ctx.layer, ctx.step.collected.small
        (n, c), t, groups = x.shape[:2], x[0, 0].numel(), layer.num_groups
        rows, one = (y.reshape(1, n * c, t) for y in (grad, x)), grad.new_empty(n * c)
        _, scale, shift = _NORM(*rows, mean, rstd, one, 1, n * c, t, n * groups, [False, True, True])
        small += [scale.view(n, c), shift.view(n, c)]
        passed = _NORM(grad, x, mean, rstd, layer.weight, n, c, t, groups, [True, False, False])[0]
        return None, None, None, passed


class Mapped(torch.autograd.Function):
    """A linear layer without positions, and in its backward its weight's factor."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, step: Step, layer: nn.Linear, x: Tensor) -> Tensor:
        """As the layer does."""
        ctx.step, ctx.layer = step, layer
        ctx.save_for_backward(x)
        return nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Keep what is needed, and go on to the input."""
        (x,), layer, kept = ctx.saved_tensors, ctx.layer, ctx.step.collected
        kept.take(Outer(grad[:, None, None], x[:, None, None], layer.weight.shape))
        kept.small.append(grad)
        return None, None, None, grad @ layer.weight


_LAYERS: dict[type[nn.Module], Any] = {nn.Conv2d: Convolved, nn.GroupNorm: Normed, nn.Linear: Mapped}


class ByHand:
    """A problem's norms and clipped sums, its model's layers in place of a recording."""

    def __init__(self, problem: Problem) -> None:
        self.collected = Collected()
        self._problem = replace(problem, model=with_layers(problem.model, self))

    @staticmethod
    def covers(problem: Problem) -> bool:
        """Whether all layers with parameters are known, of a convolutional network as the workloads have them."""
        layers = [x for x in problem.model.modules() if list(x.parameters(recurse=False))]
        return all(type(x) in _LAYERS for x in layers) and any(isinstance(x, nn.Conv2d) for x in layers)

    def norms(self) -> Tensor:
        """`(n,)`."""
        return self._norms(None)[0]

    def clipped(self) -> list[Tensor]:
        """The sums of the gradients clipped to the problem's limit, the weights' and those of all others in one."""
        norms, small = self._norms(Store())
        with unrecorded():
            weights = clipping_weights(norms, self._problem.limit)
            sums, factors = [weights @ small], sorted(self.collected.factors, key=_frees)
            self.collected = Collected()
            while factors:
                sums.append(factors.pop().weighted_sum(weights))
        return sums

    def _norms(self, store: Store | None) -> tuple[Tensor, Tensor]:
        self.collected = Collected(store)
        self._problem.total().backward()
        return self.collected.norms()


def with_layers(model: nn.Module, step: Step) -> nn.Module:
    """A copy of a model whose layers leave what they find with a step."""
    model, anchor = copy.deepcopy(model).requires_grad_(requires_grad=False), torch.zeros((), requires_grad=True)
    for module in model.modules():
        if type(module) in _LAYERS:
            module.forward = functools.partial(_LAYERS[type(module)].apply, anchor, step, module)
    return model
