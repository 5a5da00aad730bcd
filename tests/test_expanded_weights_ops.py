"""Each op of `samplewise.expanded_weights` under ExpandedWeight itself, against the loop: one line per case."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expanded_weights_loop import batch, check_module, check_op, close, manual, score
from samplewise.expanded_weights import ExpandedWeight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def conv(function, **kwargs):
    return lambda x, w, b=None: function(x, w, b, **kwargs)


# name, op, shape of one sample of the input, shapes of the parameters
OPS = [
    ("linear", F.linear, (4,), [(3, 4), (3,)]),
    ("linear, no bias", F.linear, (4,), [(3, 4)]),
    ("linear, 3-D", F.linear, (5, 4), [(3, 4), (3,)]),
    ("linear, 4-D", F.linear, (2, 5, 4), [(3, 4), (3,)]),
    ("linear, bias by keyword", lambda x, w, b: F.linear(x, w, bias=b), (4,), [(3, 4), (3,)]),
    ("linear, all by keyword", lambda x, w, b: F.linear(bias=b, weight=w, input=x), (4,), [(3, 4), (3,)]),
    ("linear, one output", F.linear, (4,), [(1, 4), (1,)]),
    ("linear, weight used twice", lambda x, w: F.linear(F.linear(x, w).sin(), w), (4,), [(4, 4)]),
    ("conv1d", F.conv1d, (2, 7), [(3, 2, 3), (3,)]),
    ("conv1d, no bias", F.conv1d, (2, 7), [(3, 2, 3)]),
    ("conv1d, options", conv(F.conv1d, stride=2, padding=1, dilation=2), (2, 9), [(3, 2, 3), (3,)]),
    ("conv1d, tuples", conv(F.conv1d, stride=(2,), padding=(1,), dilation=(2,)), (2, 9), [(3, 2, 3), (3,)]),
    ("conv1d, groups", conv(F.conv1d, groups=2), (4, 7), [(6, 2, 3), (6,)]),
    ("conv1d, depthwise", conv(F.conv1d, groups=4, padding=1), (4, 7), [(8, 1, 3), (8,)]),
    ("conv1d, same", conv(F.conv1d, padding="same"), (2, 7), [(3, 2, 4), (3,)]),
    ("conv1d, valid", conv(F.conv1d, padding="valid", stride=2), (2, 7), [(3, 2, 4), (3,)]),
    ("conv1d, pointwise", F.conv1d, (2, 7), [(3, 2, 1), (3,)]),
    ("conv2d", F.conv2d, (2, 5, 6), [(3, 2, 2, 3), (3,)]),
    (
        "conv2d, options",
        conv(F.conv2d, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 7, 8),
        [(3, 2, 2, 3), (3,)],
    ),
    ("conv2d, positional", lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 1), (2, 7, 8), [(3, 2, 2, 3), (3,)]),
    ("conv2d, unused border", conv(F.conv2d, stride=3), (2, 7, 8), [(3, 2, 2, 2), (3,)]),
    ("conv2d, groups", conv(F.conv2d, groups=2, padding=1), (4, 5, 6), [(6, 2, 2, 3), (6,)]),
    ("conv2d, depthwise", conv(F.conv2d, groups=4), (4, 5, 6), [(4, 1, 3, 3), (4,)]),
    ("conv2d, same", conv(F.conv2d, padding="same", dilation=(2, 1)), (2, 7, 8), [(3, 2, 2, 4), (3,)]),
    ("conv2d, same, groups", conv(F.conv2d, padding="same", groups=2), (4, 5, 6), [(6, 2, 4, 3), (6,)]),
    ("conv2d, pointwise", conv(F.conv2d, stride=2), (2, 5, 6), [(3, 2, 1, 1), (3,)]),
    ("conv2d, whole image", F.conv2d, (2, 5, 6), [(3, 2, 5, 6), (3,)]),
    ("conv3d", F.conv3d, (2, 4, 5, 6), [(3, 2, 2, 1, 3), (3,)]),
    (
        "conv3d, options",
        conv(F.conv3d, stride=(2, 1, 2), padding=(1, 0, 1), dilation=(1, 2, 1)),
        (2, 5, 5, 6),
        [(3, 2, 2, 2, 3), (3,)],
    ),
    ("conv3d, groups", conv(F.conv3d, groups=2, padding=1), (4, 4, 4, 4), [(4, 2, 2, 2, 2), (4,)]),
    ("conv3d, same", conv(F.conv3d, padding="same", dilation=2), (2, 4, 5, 6), [(3, 2, 2, 3, 2), (3,)]),
    ("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), (4,), [(4,), (4,)]),
    ("layer_norm, 3-D, eps", lambda x, w, b: F.layer_norm(x, (4,), w, b, eps=0.1), (5, 4), [(4,), (4,)]),
    ("layer_norm, two axes", lambda x, w, b: F.layer_norm(x, (5, 4), w, b, 0.1), (5, 4), [(5, 4), (5, 4)]),
    ("layer_norm, weight only", lambda x, w: F.layer_norm(x, (4,), weight=w), (5, 4), [(4,)]),
    ("layer_norm, bias only", lambda x, b: F.layer_norm(x, [4], bias=b), (5, 4), [(4,)]),
    ("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (4, 3), [(4,), (4,)]),
    ("group_norm, 2-D", lambda x, w, b: F.group_norm(x, 2, w, b, 0.1), (4,), [(4,), (4,)]),
    (
        "group_norm, 4-D, eps",
        lambda x, w, b: F.group_norm(x, num_groups=2, weight=w, bias=b, eps=0.1),
        (4, 3, 2),
        [(4,), (4,)],
    ),
    ("group_norm, one group", lambda x, w, b: F.group_norm(x, 1, w, b), (4, 3), [(4,), (4,)]),
    ("group_norm, weight only", lambda x, w: F.group_norm(x, 2, w), (4, 3), [(4,)]),
    ("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (4, 3), [(4,), (4,)]),
    (
        "instance_norm, 4-D, eps",
        lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.1, 0.2),
        (4, 3, 2),
        [(4,), (4,)],
    ),
    ("instance_norm, 5-D", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2, 3, 2, 2), [(2,), (2,)]),
    ("instance_norm, weight only", lambda x, w: F.instance_norm(x, weight=w), (4, 3), [(4,)]),
]


def each(cases):
    """One test per case, called by its name."""
    names = "op, shape, shapes" if len(cases[0]) == 4 else "op, shape"
    return pytest.mark.parametrize(names, [pytest.param(*case, id=name) for name, *case in cases])


@pytest.mark.parametrize(
    ("size", "needs_grad", "loss_reduction"), [(1, False, "mean"), (1, True, "sum"), (3, False, "sum"), (3, True, "mean")]
)
@each(OPS)
def test_op(op, shape, shapes, size, needs_grad, loss_reduction):
    check_op(op, batch(size, *shape), shapes, needs_grad=needs_grad, loss_reduction=loss_reduction)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("trainable", [[True, False], [False, True]])
@each([case for case in OPS if len(case[3]) == 2])
def test_one_of_two_is_frozen(op, shape, shapes, trainable, needs_grad):
    check_op(op, batch(3, *shape), shapes, trainable=trainable, needs_grad=needs_grad)


FLOAT32 = ["linear", "linear, 3-D", "conv2d", "layer_norm", "group_norm", "instance_norm"]


@each([case for case in OPS if case[0] in FLOAT32])
def test_float32(op, shape, shapes):
    check_op(op, torch.randn(3, *shape), shapes, dtype=torch.float32, needs_grad=True)


def test_group_norm_with_a_bias_alone():
    """Plain PyTorch 2.13 fails in this backward; a weight of ones is the same."""
    x, bias = batch(3, 4, 5), torch.randn(4, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(4, dtype=torch.float64)
    (rows,) = manual(3, lambda i: score(F.group_norm(x[i : i + 1], 2, ones, bias)), [bias])
    score(F.group_norm(x, 2, None, ExpandedWeight(bias, 3, "sum"))).backward()
    close(bias.grad_sample, rows)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "channels_last": lambda x: (
        x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
        if x.dim() in {4, 5}
        else x.mT.contiguous().mT
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs_grad", [True, False])
@each([case for case in OPS if len(case[2]) > 1 and len(case[3]) == 2])
def test_awkward_memory(op, shape, shapes, layout, needs_grad):
    check_op(op, LAYOUTS[layout](batch(3, *shape)), shapes, needs_grad=needs_grad)


LARGE = ["conv2d, options", "conv3d, options", "conv2d, same", "conv1d, groups"]


@pytest.mark.parametrize("size", [31, 32, 40])
@each([case for case in OPS if case[0] in LARGE])
def test_larger_batches(op, shape, shapes, size):
    check_op(op, batch(size, *shape), shapes)


# name, op(ids, weight), shape of the ids of one sample
EMBEDDINGS = [
    ("embedding", F.embedding, (5,)),
    ("embedding, several axes", F.embedding, (2, 3)),
    ("embedding, one id", F.embedding, (1,)),
    ("embedding, keywords", lambda ids, w: F.embedding(weight=w, input=ids), (5,)),
    ("embedding, padding_idx", lambda ids, w: F.embedding(ids, w, padding_idx=2), (5,)),
    ("embedding, padding_idx from the end", lambda ids, w: F.embedding(ids, w, padding_idx=-1), (5,)),
    ("embedding, sparse", lambda ids, w: F.embedding(ids, w, sparse=True), (5,)),
]


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [1, 4])
@each(EMBEDDINGS)
def test_embedding(op, shape, size, dtype, loss_reduction):
    check_op(op, torch.randint(6, (size, *shape), dtype=dtype), [(6, 3)], loss_reduction=loss_reduction)


def test_embedding_where_the_loss_sees_the_padding():
    ids = torch.tensor([[2, 0, 2], [1, 2, 5]])
    check_op(lambda i, w: F.embedding(i, w, padding_idx=2).exp(), ids, [(6, 3)])


@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_instance_norm_with_running_statistics(shape, use_input_stats):
    def op(x, w, b):
        return F.instance_norm(x, mean.clone(), var.clone(), w, b, use_input_stats=use_input_stats)

    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    check_op(op, batch(3, *shape), [(4,), (4,)], needs_grad=True)


# module and one sample of its input
MODULES = [
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", groups=2), (2, 6, 5)),
    (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="replicate"), (2, 6, 5)),
    (nn.Conv3d(2, 3, 2, stride=2, padding=1, padding_mode="zeros"), (2, 4, 5, 4)),
    (nn.LayerNorm((5, 4)), (5, 4)),
    (nn.LayerNorm(4, bias=False), (5, 4)),
    (nn.LayerNorm(4, elementwise_affine=False), (5, 4)),
    (nn.GroupNorm(2, 4), (4, 3)),
    (nn.InstanceNorm1d(4, affine=True), (4, 5)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 5, 3)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (4, 5, 3)),
    (nn.InstanceNorm3d(2, affine=True), (2, 2, 3, 2)),
]


@pytest.mark.parametrize("loss_reduction", ["sum", "mean"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("module", "shape"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_module(module, shape, size, loss_reduction):
    before = nn.Sequential(nn.Linear(shape[-1], shape[-1]), module).double()
    for p in before.parameters():
        p.grad_sample = None
    check_module(before, torch.randn(size, *shape, dtype=torch.float64, requires_grad=True), loss_reduction=loss_reduction)


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (2, 4)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm((2, 4)), (2, 4)),
        (nn.Embedding(6, 3), ()),
    ],
    ids=str,
)
def test_batch_second(module, shape, length):
    module = module.double()
    for p in module.parameters():
        p.grad_sample = None
    x = (
        torch.randint(6, (length, 3))
        if isinstance(module, nn.Embedding)
        else torch.randn(length, 3, *shape, dtype=torch.float64)
    )
    check_module(module, x, dim=1)
