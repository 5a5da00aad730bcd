"""The factor of convolutions: output gradients and inputs, kept as they are."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from .factors import Dense, Factor, Outer, chunk_size, flat, wide

# Weight gradients of a convolution per sample, over the batched one, on 2 CPU threads: with samples folded into groups 1.1-2.1x from
# 64 output positions on (a loop over samples 2.1-5.2x, unfold 5-14x) but 34x on 4x4, where unfold is 4.4x; depthwise always folded.
_FOLD_POSITIONS = 64


@dataclass(frozen=True)
class Convolution(Factor):
    """grad[n] is the weight gradient of a convolution of `input[n]` with output gradient `grad[n]`."""

    grad: Tensor  # (n, c_out, *space)
    input: Tensor  # (n, c_in, *space), padded beforehand where the padding is not symmetric zeros
    shape: Size  # (c_out, c_in / groups, *kernel)
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def n(self) -> int:
        return self.grad.shape[0]

    def regroup(self, n: int) -> Factor:
        return self if n == self.n else Dense(self.to_dense()).regroup(n)

    def to_dense(self) -> Tensor:
        if not self.n:
            return self.grad.new_zeros(0, *self.shape)
        if math.prod(self.grad.shape[2:]) >= _FOLD_POSITIONS or self.groups == self.input.shape[1]:
            folded = self._weight_grad(self.grad.flatten(0, 1)[None], self.input.flatten(0, 1)[None], self.n)
            return folded.reshape(self.n, *self.shape)
        return self.unfold().to_dense()

    def sq_norms(self) -> Tensor:
        t, o = math.prod(self.grad.shape[2:]), self.shape[0] // self.groups
        i = math.prod(self.shape[1:])
        if t * (o + i) <= o * i:
            return self.unfold().sq_norms()
        return torch.cat([flat(wide(part.to_dense())).square().sum(1) for part in self._chunks()])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scale = weights.to(self.grad.dtype).reshape(-1, *[1] * (self.grad.ndim - 1))
        return self._weight_grad(self.grad * scale, self.input)

    def dot(self, direction: Tensor) -> Tensor:
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[self.grad.ndim - 3]
        direction = direction.to(self.input.dtype)
        mapped = convolution(self.input, direction, None, self.stride, self.padding, self.dilation, self.groups)
        return (wide(mapped) * wide(self.grad)).flatten(1).sum(1)

    def unfold(self) -> Outer:
        """The same as outer products of the output gradient with the patches it saw."""
        kernel = self.shape[2:]
        pads = [p for size in reversed(self.padding) for p in (size, size)]
        patches = torch.nn.functional.pad(self.input, pads)
        for dim, (k, stride, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True)):
            span = dilation * (k - 1) + 1
            windows = patches.unfold(2 + dim, span, stride)[..., ::dilation]
            patches = windows.narrow(2 + dim, 0, self.grad.shape[2 + dim])
        d, n, g = len(kernel), self.n, self.groups
        # (n, c, *space, *kernel) -> (n, g, t, c/g * kernel)
        grouped = patches.unflatten(1, (g, -1)).movedim(2, 2 + d).flatten(2, 1 + d).flatten(3)
        left = self.grad.reshape(n, g, self.shape[0] // g, math.prod(self.grad.shape[2:])).mT
        return Outer(left, grouped, self.shape)

    def _weight_grad(self, grad: Tensor, input: Tensor, folds: int = 1) -> Tensor:
        weight = grad.new_empty(1).expand(self.shape[0] * folds, *self.shape[1:])
        zeros = [0] * (grad.ndim - 2)
        settings = (self.stride, self.padding, self.dilation, False, zeros, self.groups * folds)
        gradient: Tensor = torch.ops.aten.convolution_backward(grad, input, weight, None, *settings, [False, True, False])[1]
        return gradient

    def _chunks(self) -> Iterator["Convolution"]:
        size = chunk_size(math.prod(self.shape) * self.grad.element_size())
        for grad, x in zip(self.grad.split(size), self.input.split(size), strict=True):
            yield Convolution(grad, x, self.shape, self.stride, self.padding, self.dilation, self.groups)
