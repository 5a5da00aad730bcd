"""The judge of the Expanded Weights tests: every sample alone, in float64, with ordinary autograd."""

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from samplewise.expanded_weights import ExpandedWeight, call_for_per_sample_grads

WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}


def wide(value):
    """The value with its tensors in double precision, detached."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(WIDE.get(t.dtype, t.dtype)), value)


def score(output):
    """A loss that is a sum over samples of something not linear in the output."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    return sum((t.abs().square() + (1.3 * t.real).sin()).sum() for t in leaves)


def one_of(value, index, dim, size):
    """Sample `index` of every tensor whose axis `dim` carries the samples."""

    def narrow(t):
        return t.narrow(dim, index, 1) if t.dim() > dim and t.shape[dim] == size else t

    return pytree.tree_map_only(Tensor, narrow, value)


def module_loop(module, args, kwargs=None, *, size, dim=0, loss=score, one=one_of):
    """{parameter: (n, *shape)} of a module, sample by sample."""
    module = copy.deepcopy(module).to(torch.complex128 if any(p.is_complex() for p in module.parameters()) else torch.float64)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    rows = {name: [] for name in names}
    args, kwargs = wide(args), wide(kwargs or {})
    for index in range(size):
        module.zero_grad()
        value = loss(module(*one(args, index, dim, size), **one(kwargs, index, dim, size)))
        if value.requires_grad:
            value.backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    parameters = dict(module.named_parameters())
    return {name: torch.stack(rows[name]) if size else parameters[name].new_zeros(0, *parameters[name].shape) for name in names}


def close(got, expected, what="", *, rtol=None):
    """Equal up to the rounding of the dtype that computed `got`."""
    assert got is not None, f"{what}: missing"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    coarse = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.bfloat16: 5e-2}
    rtol = rtol or coarse.get(got.dtype, 2e-4)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.to(expected.dtype), expected, rtol=rtol, atol=rtol * scale, msg=lambda text: f"{what}: {text}"
    )


def check_module(module, *args, kwargs=None, dim=0, loss=score, size=None, loop=None, rtol=None, given=None, **options):
    """Outputs, input gradients and `grad_sample` of one wrapped call are those of the plain module and of the loop."""
    kwargs = kwargs or {}
    tensors = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
    size = tensors[0].shape[dim] if size is None else size
    expected = loop or module_loop(module, args, kwargs, size=size, dim=dim, loss=loss)
    state = torch.get_rng_state()
    plain = module(*args, **kwargs)
    inputs = [t for t in tensors if t.requires_grad]
    # the plain call below must not leave gradients on the parameters
    wanted = torch.autograd.grad(loss(plain), inputs, allow_unused=True) if inputs else []

    torch.set_rng_state(state)
    output = call_for_per_sample_grads(module, batch_size=given, batch_first=dim == 0, **options)(*args, **kwargs)
    assert pytree.tree_structure(output) == pytree.tree_structure(plain)
    for got, want in zip(pytree.tree_leaves(output), pytree.tree_leaves(plain), strict=True):
        torch.testing.assert_close(got, want)
    value = loss(output)
    mean = options.get("loss_reduction") == "mean"
    (value / size if mean else value).backward()
    for name, p in module.named_parameters():
        assert p.grad is None, f"{name}: .grad is set"
        if p.requires_grad:
            close(p.grad_sample, expected[name], name, rtol=rtol)
        else:
            assert getattr(p, "grad_sample", None) is None, f"{name}: frozen, yet it has a grad_sample"
    for tensor, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, want / size if mean and want is not None else want)


def check_op(op, x, shapes, *, trainable=None, needs_grad=False, loss_reduction="sum", dtype=torch.float64, loss=score):
    """`op(x, *parameters)` with ExpandedWeights gives each parameter its rows, and the input its gradient."""
    size = x.shape[0]
    trainable = trainable or [True] * len(shapes)
    weights = [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape, grad in zip(shapes, trainable, strict=True)]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(needs_grad)
    rows = []
    for index in range(size):
        alone = [w.detach().clone().requires_grad_(w.requires_grad) for w in weights]
        # PyTorch 2.13's group norm backward fails, or crashes on channels_last, where the input needs no gradient
        one = x.detach()[index : index + 1].clone().requires_grad_(x.is_floating_point())
        loss(op(one, *alone)).backward()
        rows.append([None if w.grad is None else w.grad.to_dense() for w in alone])
    plain = op(x, *weights)
    (wanted,) = torch.autograd.grad(loss(plain), x) if needs_grad else (None,)

    expanded = [ExpandedWeight(w, size, loss_reduction) if w.requires_grad else w for w in weights]
    output = op(x, *expanded)
    assert type(output) is Tensor
    torch.testing.assert_close(output, plain.detach(), check_stride=False)
    scale = size if loss_reduction == "mean" else 1
    (loss(output) / scale).backward()
    for place, (w, *each) in enumerate(zip(weights, *rows, strict=True)):
        assert w.grad is None
        if w.requires_grad:
            close(w.grad_sample, torch.stack(each), f"parameter {place}")
        else:
            assert not hasattr(w, "grad_sample")
    if needs_grad:
        torch.testing.assert_close(x.grad, wanted / scale)


def manual(size, one_loss, parameters):
    """Rows of the loop for a loss written out by hand: `one_loss(index)` uses the parameters themselves."""
    rows = [torch.autograd.grad(one_loss(index), parameters, allow_unused=True) for index in range(size)]
    return [
        torch.stack([torch.zeros_like(p) if g is None else g for g in each])
        for p, each in zip(parameters, zip(*rows, strict=True), strict=True)
    ]


def options(**choices):
    """Every combination of the choices, as keyword dictionaries."""
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]


class Called(nn.Module):
    """A module out of a function of its parameters: `Called(lambda m, x: ..., w=(3, 4))`."""

    def __init__(self, function, dtype=torch.float64, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if not isinstance(part, tuple) else nn.Parameter(torch.randn(part, dtype=dtype)))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def batch(*shape):
    """A double-precision input."""
    return torch.randn(shape, dtype=torch.float64)


def trainable(*shape):
    """A double-precision weight."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def expanded(*shape, size=2, loss_reduction="sum"):
    """A weight, expanded."""
    return ExpandedWeight(trainable(*shape), size, loss_reduction)
