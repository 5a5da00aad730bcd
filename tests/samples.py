"""One line per op and option: the calls that every rule is checked on. `EXACT` need a rule; `SLOW` may use the fallback."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplewise.testing import Sample

Op = Callable[..., Any]
GENERATOR = torch.Generator().manual_seed(0)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(x(*shape))


def ids(*shape: int, high: int = 5) -> Tensor:
    return torch.randint(0, high, shape, generator=GENERATOR)


def s(*args: Any, n: int = 3, dim: int = 0, constant: tuple[int | str, ...] = (), **kwargs: Any) -> Sample:
    return Sample(args, kwargs, n, dim, constant)


def module(make: Callable[[], nn.Module]) -> Op:
    """A layer of `torch.nn` as a function of its parameters and inputs."""
    layer = make().double().eval()

    def call(*inputs: Tensor, **parameters: Tensor) -> Any:
        # its buffers go where the inputs are
        return torch.func.functional_call(layer.to(inputs[0].device), parameters, inputs)

    call.__name__ = repr(layer)
    return call


def layer(make: Callable[[], nn.Module], *inputs: Tensor, n: int = 3, dim: int = 0) -> tuple[Op, list[Sample]]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(value.detach()) for name, value in make().double().named_parameters()}
    return module(make), [Sample(inputs, parameters, n, dim)]


def named(name: str, op: Op) -> Op:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    call.__name__ = name
    return call


# n, positions t, inputs i, outputs o; T == n on purpose in many lines
LINEAR = [
    s(x(3, 4), p(2, 4), p(2)),
    s(x(3, 4), p(2, 4)),
    s(x(3, 5, 4), p(2, 4), p(2)),
    s(x(3, 3, 4), p(2, 4), bias=p(2)),
    s(x(3, 2, 3, 4), p(2, 4), p(2)),
    s(x(3, 4), weight=p(3, 4), bias=p(3)),
    s(x(5, 3, 4), p(2, 4), p(2), dim=1),
    s(x(3, 3, 4), p(2, 4), p(2), dim=1),
    s(x(2, 4, 3, 4), p(2, 4), dim=2),
    s(x(3, 4), p(4)),
    s(x(3, 2, 4), p(4), p()),
    s(x(3, 1), p(1, 1), p(1)),
    s(x(3, 4), x(2, 4), p(2)),
    s(x(3, 4), p(2, 4), x(2)),
    s(x(3, 0, 4), p(2, 4), p(2)),
    s(x(1, 4), p(2, 4), p(2), n=1),
    s(x(3, 3), p(3, 3), p(3)),
]

MATMUL = [
    s(x(3, 4), p(4, 2)),
    s(x(3, 5, 4), p(4, 2)),
    s(x(3, 2, 5, 4), p(4, 2)),
    s(x(3, 5, 4), p(1, 4, 2)),
    s(x(3, 2, 5, 4), p(2, 4, 2)),
    s(x(3, 2, 5, 4), p(1, 1, 4, 2)),
    s(x(3, 4), p(4)),
    s(x(3, 5, 4), p(4)),
    s(p(2, 4), x(3, 4, 5)),
    s(p(2, 4), x(3, 2, 4, 5)),
    s(p(2, 2, 4), x(3, 2, 4, 5)),
    s(p(4), x(3, 4, 5)),
    s(p(2, 4), x(4, 3), dim=1),
    s(p(4), x(4, 3), dim=1),
    s(p(3, 4), x(4, 3), dim=1),
    s(x(5, 3, 4), p(5, 4, 2), dim=1),
    s(x(5, 3, 4), p(4, 2), dim=1),
    s(x(3, 3), p(3, 3)),
    s(x(3, 1, 1, 4), p(5, 4, 2)),
    s(p(5, 2, 4), x(3, 1, 4, 2)),
    s(x(3, 1, 5, 1), p(2, 1, 1)),
]

EINSUM = [
    s("ni,oi->no", x(3, 4), p(2, 4)),
    s("oi,ni->no", p(2, 4), x(3, 4)),
    s("nti,io->nto", x(3, 3, 4), p(4, 2)),
    s("...i,oi->...o", x(3, 2, 5, 4), p(2, 4)),
    s("oi,...i->...o", p(2, 4), x(3, 3, 4)),
    s("ni,oi", x(3, 4), p(2, 4)),
    s("...i,...oi->...o", x(3, 5, 4), p(5, 2, 4)),
    s("nhti,hio->nhto", x(3, 2, 5, 4), p(2, 4, 2)),
    s("nhti,hoi->ntho", x(3, 2, 5, 4), p(2, 3, 4)),
    s("nti,hio->nhto", x(3, 5, 4), p(2, 4, 2)),
    s("tni,io->tno", x(5, 3, 4), p(4, 2), dim=1),
    s("in,io->on", x(4, 3), p(4, 2), dim=1),
    s("ni,oij,nj->no", x(3, 4), p(2, 4, 5), x(3, 5)),
    s("ni,io,op->np", x(3, 4), p(4, 2), p(2, 5)),
    s("ni,i->n", x(3, 4), p(4)),
    s("ni,i->ni", x(3, 4), p(4)),
    s("n,i->ni", x(3), p(4)),
    s("ni,j->nij", x(3, 4), p(2)),
    s("nij,ij->n", x(3, 4, 2), p(4, 2)),
    s("nij,ji->n", x(3, 4, 2), p(2, 4)),
    s("ni,->ni", x(3, 4), p()),
    s("ni,oi->n", x(3, 4), p(2, 4)),
    s("ni,ab->nab", x(3, 4), p(2, 3)),
    s("nti,ti->nt", x(3, 5, 4), p(5, 4)),
    s("nti,to->nio", x(3, 5, 4), p(5, 2)),
    s("nab,bc,ad->ncd", x(3, 4, 5), p(5, 2), p(4, 2)),
    s("ni,io->on", x(3, 4), p(4, 2)),
    s("nii,io->no", x(3, 4, 4), p(4, 2)),
    s("ni,i,i->n", x(3, 4), p(4), p(4)),
    s("ni , o i -> n o", x(3, 4), p(2, 4)),
    s("nti,oi->nto", x(3, 5, 1), p(2, 4)),
    s("nti,tio->nto", x(3, 1, 4), p(5, 4, 2)),
    s("nti,tio->nto", x(3, 5, 4), p(1, 4, 2)),
    s("ni,oi->no", [x(3, 4), p(2, 4)]),
    s("ni,nj,ijo->no", x(3, 4), x(3, 2), p(4, 2, 3)),
    s("nid,njd,hd->nhij", x(3, 4, 2), x(3, 5, 2), p(3, 2)),
    s("nghi,gio->ngho", x(3, 2, 3, 4), p(2, 4, 5)),
    s("nhgi,gio->nhgo", x(3, 2, 3, 4), p(3, 4, 5)),
    s("nabc,cba->n", x(3, 2, 4, 5), p(5, 4, 2)),
    s("nabc,bdca->nd", x(3, 2, 4, 5), p(4, 3, 5, 2)),
]

W = p(4, 4)
TWICE = [s("ni,ij,jk->nk", x(3, 4), W, W), s("ij,ni,nj->n", W, x(3, 4), x(3, 4))]

PRODUCTS: list[tuple[Op, list[Sample]]] = [
    (F.linear, LINEAR),
    (torch.matmul, MATMUL),
    (named("@", lambda a, b: a @ b), MATMUL[:4]),
    (Tensor.matmul, MATMUL[1:9]),
    (Tensor.__rmatmul__, [s(p(4, 2), x(3, 4)), s(x(3, 4, 5), p(2, 4))]),
    (torch.linalg.matmul, MATMUL[:3]),
    (torch.mm, [s(x(3, 4), p(4, 2)), s(p(2, 4), x(4, 3), dim=1), s(x(3, 4), mat2=p(4, 2)), s(x(3, 0), p(0, 2))]),
    (torch.mv, [s(x(3, 4), p(4)), s(x(3, 4), vec=p(4))]),
    (torch.bmm, [s(x(5, 3, 4), mat2=p(5, 4, 2), dim=1), s(x(5, 3, 4), p(5, 4, 2), dim=1), s(p(5, 2, 4), x(5, 4, 3), dim=2)]),
    (
        torch.addmm,
        [
            s(p(2), x(3, 4), p(4, 2)),
            s(p(2), x(3, 4), p(4, 2), beta=0.5, alpha=2),
            s(p(1), x(3, 4), p(4, 2), alpha=-1),
            s(x(2), x(3, 4), p(4, 2), beta=0.5),
            s(p(2), x(3, 4), x(4, 2), beta=3),
            s(p(1, 2), x(3, 4), p(4, 2), beta=0.5, alpha=2),
            s(x(3, 2), x(3, 4), p(4, 2), alpha=-3),
            s(p(1, 2), x(3, 4), x(4, 2), beta=2.0),
            s(p(2, 1), p(2, 4), x(4, 3), dim=1, beta=2, alpha=0.5),
            s(p(), x(3, 4), p(4, 2)),
        ],
    ),
    (torch.addmv, [s(p(), x(3, 4), p(4), beta=0.5, alpha=2), s(x(3), x(3, 4), p(4), alpha=3)]),
    (
        torch.baddbmm,
        [
            s(p(5, 1, 2), x(5, 3, 4), p(5, 4, 2), dim=1, beta=0.5, alpha=2),
            s(p(2), x(3, 2, 4), x(3, 4, 2), beta=3),
            s(p(1, 1, 1), x(5, 3, 4), p(5, 4, 2), dim=1),
        ],
    ),
    (torch.addbmm, [s(p(1, 2), x(5, 3, 4), p(5, 4, 2), dim=1, beta=0.5, alpha=2), s(p(2), x(5, 3, 4), p(5, 4, 2), dim=1)]),
    (torch.addr, [s(p(1, 4), x(3), p(4), beta=0.5, alpha=2), s(p(4), x(3), p(4))]),
    (torch.einsum, [*EINSUM[:27], *EINSUM[28:], *TWICE]),
    (
        torch.tensordot,
        [
            s(x(3, 4, 5), p(4, 5, 2), dims=2),
            s(x(3, 4, 5), p(5, 2), 1),
            s(x(3, 4, 5), p(2, 4), ([1], [1])),
            s(p(2, 4), x(3, 4, 5), ([-1], [1])),
            s(x(3, 4), p(2), 0),
        ],
    ),
    (torch.inner, [s(x(3, 4), p(2, 4)), s(p(2, 4), x(3, 4)), s(x(3, 5, 4), p(4))]),
    (torch.outer, [s(x(3), p(4)), s(p(4), x(3))]),
    (torch.ger, [s(x(3), p(4))]),
]

CONVOLUTIONS: list[tuple[Op, list[Sample]]] = [
    (
        F.conv1d,
        [
            s(x(3, 4, 7), p(2, 4, 3), p(2)),
            s(x(3, 4, 7), p(2, 4, 3)),
            s(x(3, 4, 7), p(2, 4, 3), p(2), stride=2, padding=1),
            s(x(3, 4, 8), p(2, 4, 3), dilation=2),
            s(x(3, 4, 7), p(6, 2, 3), p(6), groups=2),
            s(x(3, 4, 7), p(4, 1, 3), groups=4),
            s(x(3, 4, 7), p(8, 1, 3), groups=4, padding=1, stride=3, dilation=2),
            s(x(3, 4, 7), p(2, 4, 3), padding="same"),
            s(x(3, 4, 7), p(2, 4, 2), padding="same"),
            s(x(3, 4, 9), p(2, 4, 4), p(2), padding="same", dilation=3),
            s(x(3, 4, 7), p(2, 4, 3), padding="valid", stride=2),
            s(x(3, 4, 7), p(2, 4, 1)),
            s(x(3, 4, 7), p(2, 4, 7)),
            s(x(3, 3, 3), p(3, 3, 3), p(3), (1,), (1,), (1,), 1),
            s(x(3, 4, 7), x(2, 4, 3), p(2)),
            s(x(3, 4, 7), p(2, 4, 3), x(2)),
        ],
    ),
    (
        F.conv2d,
        [
            s(x(3, 2, 5, 6), p(4, 2, 3, 2), p(4)),
            s(x(3, 2, 5, 6), p(4, 2, 3, 2), None, (2, 1), (1, 0), (1, 2)),
            s(x(3, 4, 5, 5), p(4, 2, 3, 3), p(4), groups=2, padding=1),
            s(x(3, 4, 5, 5), p(4, 1, 3, 3), groups=4, padding="same"),
            s(x(3, 4, 5, 5), p(4, 1, 2, 4), groups=4, padding="same", dilation=(2, 1)),
            s(x(3, 2, 5, 5), p(4, 2, 2, 2), p(4), padding="same"),
            s(x(3, 2, 6, 6), p(4, 2, 2, 2), stride=2),
            s(x(3, 2, 7, 7), p(4, 2, 2, 2), stride=3, padding=(0, 1)),
            s(x(3, 2, 5, 5), p(4, 2, 1, 1), p(4)),
            s(x(3, 3, 3, 3), p(3, 3, 1, 3), p(3)),
            s(x(3, 8, 4, 4), p(16, 8, 3, 3), padding=1),
            s(x(3, 2, 12, 12), p(2, 2, 1, 2)),
            s(x(1, 2, 5, 5), p(4, 2, 3, 3), p(4), n=1),
            s(x(3, 1, 4, 4), p(2, 1, 3, 3)),
            s(x(3, 2, 5, 5), p(4, 2, 3, 3), bias=p(4), stride=[2], padding=[1], dilation=[1]),
        ],
    ),
    (
        F.conv3d,
        [
            s(x(3, 2, 3, 4, 5), p(4, 2, 2, 2, 2), p(4)),
            s(x(3, 2, 4, 4, 5), p(4, 1, 2, 2, 2), p(4), groups=2, stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2)),
            s(x(3, 2, 3, 3, 3), p(4, 2, 2, 3, 1), padding="same"),
            s(x(3, 2, 5, 5, 5), p(2, 2, 2, 2, 2), dilation=3),
            s(x(3, 2, 3, 3, 3), p(2, 1, 3, 3, 3), groups=2, padding="same"),
        ],
    ),
    (
        F.conv_transpose1d,
        [
            s(x(3, 4, 5), p(4, 2, 3), p(2), 2),
            s(x(3, 4, 5), p(4, 2, 3), p(2), stride=3, padding=2, output_padding=2),
            s(x(3, 4, 5), p(4, 2, 3), None, 1, 0, 2, 1, 3),
            s(x(3, 4, 5), p(4, 1, 3), p(4), groups=4, stride=2, dilation=2),
            s(x(3, 4, 5), p(4, 3, 2), p(6), groups=2, padding=1),
            s(x(3, 3, 3), p(3, 3, 1), p(3)),
            s(x(3, 4, 80), p(4, 2, 3), stride=2),
            s(x(3, 4, 5), x(4, 2, 3), p(2)),
        ],
    ),
    (
        F.conv_transpose2d,
        [
            s(x(3, 2, 3, 3), p(2, 4, 2, 2), p(4), stride=2),
            s(x(3, 2, 3, 3), p(2, 2, 2, 2), groups=2),
            s(x(3, 2, 3, 4), p(2, 4, 3, 2), p(4), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(1, 2)),
            s(x(3, 4, 9, 9), p(4, 1, 3, 3), groups=2, padding=1),
            s(x(1, 2, 3, 3), p(2, 4, 2, 2), n=1),
        ],
    ),
    (
        F.conv_transpose3d,
        [
            s(x(3, 2, 2, 2, 2), p(2, 2, 2, 2, 2)),
            s(
                x(3, 2, 2, 3, 2),
                p(2, 1, 2, 1, 2),
                p(2),
                stride=(1, 2, 2),
                output_padding=(0, 1, 1),
                groups=2,
                padding=(0, 0, 1),
                dilation=2,
            ),
        ],
    ),
    *[
        layer(lambda mode=mode, size=size, pad=pad: nn.Conv1d(2, 4, size, padding=pad, padding_mode=mode), x(3, 2, 6))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for size, pad in ((3, 1), (4, 2), (4, "same"), (2, "same"))
    ],
    *[
        layer(
            lambda mode=mode, pad=pad: nn.Conv2d(2, 4, (3, 2), stride=1, padding=pad, padding_mode=mode, groups=2),
            x(3, 2, 5, 4),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for pad in ((2, 1), "same")
    ],
    *[
        layer(lambda mode=mode: nn.Conv3d(2, 2, 3, padding=1, padding_mode=mode), x(3, 2, 3, 4, 3))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ],
]

BAG = ids(3, 4)
TABLES: list[tuple[Op, list[Sample]]] = [
    (
        named("index", lambda w, i: w[i]),
        [
            s(p(5, 2), ids(3, 4)),
            s(p(5), ids(3)),
            s(p(5, 2, 3), ids(3, 4)),
            s(p(5, 2), ids(3, 4) - 5),
            s(p(3, 3), ids(3, 3, high=3)),
        ],
    ),
    (named("index_select", lambda w, i: w.index_select(0, i)), [s(p(5, 2), ids(3)), s(p(5, 2, 2), ids(3))]),
    (named("index of a derived table", lambda w, i: (w * 2).t()[i]), [s(p(2, 5), ids(3, 4))]),
    (
        F.embedding,
        [
            s(ids(3, 4), p(5, 2)),
            s(ids(3), p(5, 2)),
            s(ids(3, 2, 3), p(5, 2)),
            s(ids(3, 3), p(5, 2), padding_idx=1),
            s(ids(3, 9), p(5, 2), padding_idx=-2),
            s(torch.ones(3, 4, dtype=torch.int64), p(5, 2), padding_idx=0),
            s(torch.ones(3, 6, dtype=torch.int64), p(3, 2)),
            s(ids(3, 4), p(5, 2), sparse=True),
            s(ids(3, 4).int(), p(5, 2)),
            s(ids(4, 3), p(5, 2), dim=1),
            s(ids(3, 3), p(5, 2), dim=1, padding_idx=0),
            s(ids(3, 0), p(5, 2)),
            s(ids(3, 4), p(5, 0)),
        ],
    ),
    layer(lambda: nn.Embedding(5, 2, padding_idx=3), ids(3, 4)),
]

POSITIVE = x(4).abs() + 0.5
NORMS: list[tuple[Op, list[Sample]]] = [
    (
        F.layer_norm,
        [
            s(x(3, 4), (4,), p(4), p(4)),
            s(x(3, 5, 4), (4,), p(4), p(4)),
            s(x(3, 5, 4), (5, 4), p(5, 4), p(5, 4)),
            s(x(3, 4), (4,), p(4)),
            s(x(3, 4), (4,), None, p(4)),
            s(x(3, 3), [3], weight=p(3), bias=p(3), eps=0.1),
            s(x(5, 3, 4), (4,), p(4), p(4), dim=1),
            s(x(3, 4), (4,), p(4), x(4)),
            s(x(3, 4), (4,), x(4), p(4)),
            s(x(3, 2, 3, 4), (4,), p(4), p(4)),
        ],
    ),
    (torch.layer_norm, [s(x(3, 4), (4,), p(4), p(4), cudnn_enable=False), s(x(3, 4), (4,), p(4), p(4), 0.3)]),
    (
        F.rms_norm,
        [
            s(x(3, 4), (4,), p(4)),
            s(x(3, 5, 4), (5, 4), p(5, 4), eps=0.1),
            s(x(5, 3, 4), (4,), p(4), dim=1),
            s(x(3, 5, 4), [4], weight=p(4), eps=1e-3),
        ],
    ),
    (
        F.group_norm,
        [
            s(x(3, 4), 2, p(4), p(4)),
            s(x(3, 4, 5), 2, p(4), p(4)),
            s(x(3, 4, 3, 3), 4, p(4), p(4), 0.1),
            s(x(3, 4, 5), 1, p(4)),
            s(x(3, 4, 2, 3), 2, weight=p(4), bias=x(4), eps=0.2),
            s(x(3, 3, 3), 3, p(3), p(3)),
            s(x(3, 4, 2, 2, 2), 2, p(4), p(4)),
            s(x(3, 4, 2, 2), 2, x(4), p(4)),
            # one channel and one pixel lie in memory as in both orders
            s(x(3, 1, 3, 2).to(memory_format=torch.channels_last), 1, p(1), p(1)),
            s(x(3, 6, 1, 1).to(memory_format=torch.channels_last), 2, p(6), p(6)),
            s(x(3, 4, 3, 2).to(memory_format=torch.channels_last), 2, p(4), p(4)),
        ],
    ),
    (torch.group_norm, [s(x(3, 4, 5), 2, p(4), p(4), 0.3, False), s(x(3, 4, 5), 2, p(4), p(4), cudnn_enabled=False)]),
    (
        F.instance_norm,
        [
            s(x(3, 4, 5), None, None, p(4), p(4)),
            s(x(3, 4, 5, 2), weight=p(4), bias=p(4), eps=0.1),
            s(x(3, 4, 5), weight=p(4)),
            s(x(3, 4, 5), bias=p(4)),
            s(x(3, 4, 5), x(4), POSITIVE, p(4), p(4), use_input_stats=False),
            s(x(3, 4, 2, 2), x(4), POSITIVE, p(4), x(4), False, 0.3, 0.1),
            s(x(3, 3, 5), x(3), POSITIVE[:3], x(3), p(3), False, constant=(1, 2, 3)),
        ],
    ),
    (
        torch.instance_norm,
        [
            s(x(3, 4, 5), p(4), p(4), None, None, True, 0.4, 0.2, False),
            s(x(3, 4, 5), p(4), p(4), x(4), POSITIVE, False, 0.4, 0.2, False),
            s(
                x(3, 4, 5),
                weight=p(4),
                bias=p(4),
                running_mean=x(4),
                running_var=POSITIVE,
                use_input_stats=False,
                momentum=0.5,
                eps=0.1,
                cudnn_enabled=False,
            ),
        ],
    ),
    layer(lambda: nn.InstanceNorm2d(4, affine=True), x(3, 4, 3, 2)),
    layer(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), x(3, 4, 5)),
    layer(lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True), x(3, 2, 3, 2, 2)),
    (
        F.batch_norm,
        [
            s(x(3, 4), x(4), POSITIVE, p(4), p(4)),
            s(x(3, 4, 5), x(4), POSITIVE, p(4), p(4), False, 0.3, 0.2),
            s(x(3, 4, 2, 3), x(4), POSITIVE, p(4)),
            s(x(3, 4), x(4), POSITIVE, None, p(4)),
            s(x(3, 4), x(4), POSITIVE, weight=p(4), bias=x(4), eps=0.1),
            s(x(3, 3), x(3), POSITIVE[:3], p(3), p(3), constant=(1, 2)),
        ],
    ),
    (
        torch.batch_norm,
        [
            s(x(3, 4), p(4), p(4), x(4), POSITIVE, False, 0.3, 0.2, False),
            s(
                x(3, 4),
                weight=p(4),
                bias=p(4),
                running_mean=x(4),
                running_var=POSITIVE,
                training=False,
                momentum=0.5,
                eps=0.1,
                cudnn_enabled=False,
            ),
        ],
    ),
    layer(lambda: nn.BatchNorm1d(4), x(3, 4)),
    layer(lambda: nn.BatchNorm2d(4), x(3, 4, 3, 2)),
    layer(lambda: nn.BatchNorm3d(2), x(3, 2, 2, 2, 2)),
    layer(lambda: nn.LayerNorm(4, bias=False), x(3, 2, 4)),
    layer(lambda: nn.RMSNorm(4), x(3, 2, 4)),
]

FITS = [
    s(x(3, 4), p(4)),
    s(x(3, 4), p(1, 4)),
    s(x(3, 3), p(3)),
    s(x(3, 5, 4), p(5, 4)),
    s(x(3, 5, 4), p(5, 1)),
    s(x(3, 4), p()),
    s(x(3, 3), p(1, 3)),
    s(x(3, 4), p(1, 1)),
    s(x(3, 3, 3), p(3, 3)),
    s(x(3, 3, 3), p(3, 1)),
    s(x(4, 3), p(4, 1), dim=1),
    s(x(3, 3, 4), p(3, 1, 4), dim=1),
    s(x(5, 3, 4), p(5, 1, 1), dim=1),
    s(x(3), p(1)),
    s(x(3), p()),
]
ALIGNED = [
    *FITS,
    s(x(3, 1, 4), p(5, 1)),
    s(x(3, 4), p(2, 1, 4)),
    s(p(4), x(3, 4)),
    s(p(5, 4), x(3, 5, 4)),
    s(x(3, 1), p(4)),
    s(p(2, 1, 1), x(3, 4)),
]
# Parameters that have the sample axis themselves: row i is touched by sample i alone
OWN: list[tuple[Op, list[Sample]]] = [
    *[
        (
            op,
            [
                s(x(3, 4), p(3, 4)),
                s(x(3, 4), p(3, 1)),
                s(x(3, 3), p(3, 3)),
                s(x(3, 4), p(2, 3, 4)),
                s(x(4, 3), p(3), dim=1),
                s(x(3, 3, 4), p(3, 4), dim=1),
                s(x(3), p(3)),
                s(p(3, 1), x(3, 4)),
            ],
        )
        for op in (torch.add, torch.mul, torch.sub, torch.atan2)
    ],
    (torch.matmul, [s(x(3, 5, 4), p(3, 4, 2)), s(p(3, 2, 4), x(3, 4, 5)), s(p(3, 4), x(4, 3), dim=1)]),
    (torch.bmm, [s(x(3, 2, 4), p(3, 4, 2))]),
    (torch.addmm, [s(p(3, 2), x(3, 4), p(4, 2), beta=0.5, alpha=2)]),
    (named("addmm, its factors between", lambda b, a, w: torch.addmm(2, b, 3, a, w)), [s(p(2), x(3, 4), p(4, 2))]),
    (torch.addmv, [s(p(3), x(3, 4), p(4), beta=0.5, alpha=2)]),
    (torch.addr, [s(p(3, 4), x(3), p(4), beta=0.5)]),
    (torch.einsum, [s("ni,nio->no", x(3, 4), p(3, 4, 2)), s("ni,nj,ijo->no", x(3, 4), p(3, 2), p(4, 2, 3))]),
    (torch.lerp, [s(x(3, 4), p(3, 4), x(4)), s(x(3, 4), x(4), p(3, 1))]),
    (torch.where, [s(x(3, 4) > 0, x(3, 4), p(3, 4))]),
    (named("cat", lambda a, c: torch.cat([a, c], 1)), [s(x(3, 4), p(3, 2)), s(x(3, 3), p(3, 3))]),
    (named("stack", lambda a, c: torch.stack([a, c], -1)), [s(x(3, 4), p(3, 4))]),
    (named("expanded", lambda a, c: c.expand_as(a) * a), [s(x(3, 4), p(3, 1))]),
    (named("tiled", lambda a, c: c.repeat(3, 1) * a), [s(x(3, 4), p(1, 4))]),
    (named("indexed", lambda a, c: c[torch.arange(3, device=a.device)] * a), [s(x(3, 4), p(5, 4))]),
    (named("sliced", lambda a, c: c[:3] * a), [s(x(3, 4), p(5, 4))]),
    (named("gathered", lambda a, c: F.embedding(torch.tensor([1, 0, 1], device=a.device), c) * a), [s(x(3, 4), p(5, 4))]),
]
ABOVE = [
    s(x(3, 4).abs() + 1, nn.Parameter(p(4).abs().detach() + 0.5)),
    s(nn.Parameter(p(5, 1).abs().detach() + 0.5), x(3, 5, 4).abs() + 1),
    s(x(3, 3).abs() + 1, nn.Parameter(p(3).abs().detach())),
]
ELEMENTWISE: list[tuple[Op, list[Sample]]] = [
    (torch.add, [*ALIGNED, s(x(3, 4), p(4), alpha=2)]),
    (torch.sub, [*ALIGNED[:9], s(p(4), x(3, 4), alpha=-0.5)]),
    (torch.mul, ALIGNED),
    (torch.div, ALIGNED[:9]),
    (torch.rsub, [s(x(3, 4), p(4), alpha=3), s(p(5, 1), x(3, 5, 4))]),
    (named("rdiv", lambda a, b: b / a), ALIGNED[:9]),
    (named("rsub operator", lambda a, b: 1 - b - a), ALIGNED[:4]),
    (torch.pow, ABOVE),
    (named("**", lambda a, b: (a * a + 1) ** b), ALIGNED[:9]),
    (torch.maximum, ALIGNED[:10]),
    (torch.minimum, ALIGNED[:3]),
    (torch.max, ALIGNED[:3]),
    (torch.fmin, ALIGNED[:3]),
    (torch.atan2, ALIGNED[:6]),
    (torch.hypot, ALIGNED[:3]),
    (torch.logaddexp, ALIGNED[:6]),
    (torch.xlogy, ABOVE),
    (torch.copysign, ALIGNED[:2]),
    (torch.ldexp, ALIGNED[:2]),
    (
        torch.lerp,
        [
            s(x(3, 4), x(3, 4), p(4)),
            s(p(4), x(3, 4), 0.3),
            s(x(3, 4), p(1, 4), x(4)),
            s(x(3, 4), p(1, 4), weight=p(1, 1)),
            s(p(4), p(1, 4), x(3, 4)),
        ],
    ),
    (torch.addcmul, [s(x(3, 4), p(4), x(3, 4)), s(p(4), x(3, 4), x(3, 1), value=2), s(p(4), p(1), x(3, 4))]),
    (torch.addcdiv, [s(p(4), x(3, 4), x(3, 4) ** 2 + 1, value=-2), s(x(3, 4), x(3, 4), nn.Parameter(POSITIVE))]),
    (
        torch.where,
        [
            s(x(3, 4) > 0, p(4), x(3, 4)),
            s(x(3, 4) > 0, x(3, 4), p(1, 4)),
            s(x(3, 4) > 0, p(4), 0.0),
            s(x(3, 1) > 0, p(4), p(2, 1, 4)),
            s(x(3, 3) > 0, p(3), p(1, 3)),
        ],
    ),
    (torch.clamp, [s(x(3, 4), p(4), p(4)), s(x(3, 4), min=p(1, 4)), s(x(3, 4), max=p())]),
    (torch.masked_fill, [s(x(3, 4), x(3, 4) > 0, p()), s(x(3, 4), x(4) > 0, p())]),
    (named("scaled", lambda a, b: b.exp() * a + b.sum()), ALIGNED[:9]),
    (named("broadcast_tensors", lambda a, b: torch.broadcast_tensors(a, b)[0] * torch.broadcast_tensors(a, b)[1]), ALIGNED[:6]),
    (
        F.prelu,
        [s(x(3, 4), p(4)), s(x(3, 4, 5), p(4)), s(x(3, 4, 2, 2), p(1)), s(x(3, 4), p(1)), s(x(3), p(1)), s(x(3, 3, 3), p(3))],
    ),
    (torch.prelu, [s(x(3, 4, 5), p(4))]),
    (
        F.bilinear,
        [
            s(x(3, 4), x(3, 2), p(5, 4, 2), p(5)),
            s(x(3, 4), x(3, 2), p(5, 4, 2)),
            s(x(3, 6, 4), x(3, 6, 2), p(5, 4, 2), bias=p(5)),
            s(x(3, 4), x(3, 2), p(1, 4, 2), p(1)),
        ],
    ),
]


def _places(a: Tensor) -> Tensor:
    """The places of positions, the same for every sample, `(n, t)`."""
    return torch.arange(a.shape[1], device=a.device).expand(a.shape[:2])


def _written(out: Tensor, bias: Tensor) -> Tensor:
    out[:, 0].add_(bias)
    out.select(1, 1).mul_(bias)
    return out.transpose(0, 1).transpose(0, 1)


def _assigned(input: Tensor, value: Tensor, rows: int | slice = 0) -> Tensor:
    target = input * 2
    target[:, rows] = value
    return target * input


INPLACE: list[tuple[Op, list[Sample]]] = [
    (
        named("relu_", lambda a, w, b: F.linear(a, w, b).relu_()),
        [s(x(3, 4), p(2, 4), p(2)), s(x(3, 5, 4), p(2, 4), p(2)), s(x(3, 2, 5, 4), p(2, 4), p(2))],
    ),
    (named("conv relu_", lambda a, w: F.relu(F.conv1d(a, w), inplace=True)), [s(x(3, 2, 5), p(4, 2, 3))]),
    (named("add_", lambda a, b: (a * 1).add_(b)), FITS),
    (named("mul_", lambda a, b: a.clone().mul_(b)), FITS),
    (
        named("+=", lambda a, w, b: (a @ w).add_(b, alpha=2).tanh_()),
        [s(x(3, 4), p(4, 2), p(2)), s(x(3, 5, 4), p(4, 2), p(5, 2))],
    ),
    (
        named("masked_fill_", lambda a, w: F.linear(a, w).masked_fill_(torch.tensor([True, False], device=a.device), 0.0)),
        [s(x(3, 4), p(2, 4))],
    ),
    (
        named("view written", lambda a, w, b: _written(F.linear(a, w), b)),
        [s(x(3, 5, 4), p(2, 4), p(2)), s(x(3, 3, 4), p(2, 4), p())],
    ),
    (named("lerp_", lambda a, b: (a * 2).lerp_(b, 0.3)), FITS),
    (named("clamp_", lambda a, b: (a * 2).clamp_(min=b)), FITS),
    (named("sub_ div_", lambda a, b: (a * 2).sub_(b).div_(b.square() + 1)), FITS),
    (named("setitem", _assigned), [s(x(3, 5, 4), p(4)), s(x(3, 3, 4), p(1, 4)), s(x(3, 5, 4), p())]),
    (
        named("setitem rows", lambda a, b: _assigned(a, b, slice(1, 3))),
        [s(x(3, 5, 4), p(4)), s(x(3, 5, 4), p(2, 4)), s(x(3, 3, 4), p(2, 1))],
    ),
    (named("copy_", lambda a, b: (a * 2).copy_(b) * a), FITS),
    (named("addcmul_", lambda a, b: (a * 2).addcmul_(b, a)), FITS),
    (named("addmm_", lambda a, w: (a[:, :2] * 2).addmm_(a, w, alpha=2)), [s(x(3, 4), p(4, 2))]),
]


JOINS: list[tuple[Op, list[Sample]]] = [
    (
        named("cls token", lambda a, c: torch.cat([c.expand(a.shape[0], -1, -1), a], 1)),
        [s(x(3, 5, 4), p(1, 1, 4)), s(x(3, 3, 4), p(1, 2, 4)), s(x(3, 5, 4), p(2, 4))],
    ),
    (named("cls repeat", lambda a, c: torch.cat((c.repeat(a.shape[0], 1, 1), a), dim=1)), [s(x(3, 5, 4), p(1, 1, 4))]),
    (
        named("cls middle", lambda a, c: torch.cat([c.expand(-1, a.shape[1], -1), a])),
        [s(x(5, 3, 4), p(1, 1, 4), dim=1), s(x(3, 3, 4), p(1, 1, 4), dim=1)],
    ),
    (named("own rows", lambda a, c: torch.cat([a, c], 1)), [s(x(3, 4), p(3, 2)), s(x(3, 3), p(3, 3))][:0]),
    (named("stack", lambda a, b: torch.stack([a, b.expand_as(a)], 1)), FITS[:5]),
    (named("stack last", lambda a, b: torch.stack((b.expand_as(a), a), dim=-1).sin()), FITS[:5]),
    (named("expand clone", lambda a, b: b.expand_as(a).clone().add_(a)), FITS[:5]),
    (named("expanded twice", lambda a, b: b.expand_as(a) * a + b.expand_as(a)), FITS[:5]),
    (
        named("prompt", lambda a, w: torch.cat([w.unsqueeze(0).expand(a.shape[0], *w.shape), a], 1).cumsum(1)),
        [s(x(3, 5, 4), p(3, 4)), s(x(3, 3, 4), p(3, 4))],
    ),
    (named("padded", lambda a, w: F.pad(a, (1, 1)) * w), [s(x(3, 4), p(6))]),
    (
        named("positions", lambda a, w: a + F.embedding(torch.arange(a.shape[1], device=a.device), w)),
        [s(x(3, 5, 4), p(6, 4)), s(x(3, 3, 4), p(3, 4))],
    ),
    (
        named("positions (1, T)", lambda a, w: a + F.embedding(torch.arange(a.shape[1], device=a.device)[None], w)),
        [s(x(3, 3, 4), p(3, 4))],
    ),
    (named("positions (n, T)", lambda a, w: a + F.embedding(_places(a), w)), [s(x(3, 5, 4), p(6, 4)), s(x(3, 3, 4), p(3, 4))]),
    (
        named("positions twice", lambda a, w: a * F.embedding(_places(a) // 2, w) + F.embedding(_places(a)[:1], w)),
        [s(x(3, 5, 4), p(6, 4))],
    ),
    (named("positions, padding", lambda a, w: a + F.embedding(_places(a), w, padding_idx=1)), [s(x(3, 5, 4), p(6, 4))]),
    (
        named("positions, counted", lambda a, w: a + F.embedding(_places(a[:1])[0] // 2, w, scale_grad_by_freq=True)),
        [s(x(3, 5, 4), p(6, 4))],
    ),
    (
        named("positions (T, 1)", lambda a, w: a + F.embedding(torch.arange(a.shape[0], device=a.device)[:, None], w)),
        [s(x(3, 3, 4), p(3, 4), dim=1), s(x(5, 3, 4), p(6, 4), dim=1)],
    ),
    (
        named("attention", F.scaled_dot_product_attention),
        [s(x(3, 2, 4, 5), p(6, 5), p(6, 5)), s(x(3, 2, 4, 5), p(2, 6, 5), p(1, 1, 6, 5))],
    ),
    (
        named("relative bias", lambda q, b: F.scaled_dot_product_attention(q, q, q, attn_mask=b)),
        [s(x(3, 2, 4, 5), p(2, 4, 4)), s(x(3, 2, 3, 5), p(3, 3))],
    ),
]

DERIVED: list[tuple[Op, list[Sample]]] = [
    (named("transposed", lambda a, w: a @ w.t()), [s(x(3, 4), p(2, 4)), s(x(3, 5, 4), p(2, 4))]),
    (named("sliced", lambda a, w: F.linear(a, w[:2]) + F.linear(a, w[1:3])), [s(x(3, 4), p(4, 4))]),
    (named("chunks", lambda a, w: sum(F.linear(a, part) for part in w.chunk(2))), [s(x(3, 4), p(4, 4))]),
    (named("reshaped", lambda a, w: F.linear(a, w.view(2, 4))), [s(x(3, 4), p(8)), s(x(3, 4), p(2, 2, 2))]),
    (named("cast", lambda a, w: F.linear(a.float(), w.float())), [s(x(3, 4), p(2, 4))][:0]),
    (
        named("lora", lambda a, w, u, v: F.linear(a, w + 0.5 * u @ v)),
        [s(x(3, 4), p(2, 4), p(2, 1), p(1, 4)), s(x(3, 5, 4), x(2, 4), p(2, 1), p(1, 4))],
    ),
    (named("weight norm", lambda a, g, v: F.linear(a, g * v / v.norm(dim=1, keepdim=True))), [s(x(3, 4), p(2, 1), p(2, 4))]),
    (named("softmaxed", lambda a, w: a @ w.softmax(0)), [s(x(3, 4), p(4, 2))]),
    (
        named("tied", lambda i, w: F.linear(F.embedding(i, w), w)),
        [s(ids(3, 4), p(5, 2)), s(ids(3, 3), p(5, 2)), s(ids(3), p(5, 2))],
    ),
    (named("tied transposed", lambda a, w: (a @ w).relu() @ w.t()), [s(x(3, 4), p(4, 2))]),
    (
        named("reused", lambda a, w: F.linear(F.linear(F.linear(a, w).tanh(), w).tanh(), w)),
        [s(x(3, 4), p(4, 4)), s(x(3, 3, 4), p(4, 4))],
    ),
    (named("tied conv", lambda a, w: F.conv1d(F.conv1d(a, w, padding=1).relu(), w)), [s(x(3, 2, 5), p(2, 2, 3))]),
    (named("outer weight", lambda a, u, v: F.linear(a, torch.outer(u, v))), [s(x(3, 4), p(2), p(4))]),
    (named("kron", lambda a, u, v: F.linear(a, torch.kron(u, v))), [s(x(3, 4), p(1, 2), p(2, 2))]),
    (named("expanded conv", lambda a, w: F.conv2d(a, w.expand(4, -1, -1, -1))), [s(x(3, 2, 4, 4), p(1, 2, 3, 3))]),
    (named("stacked", lambda a, u, v: F.linear(a, torch.stack([u, v]), torch.cat([u[:1], v[:1]]))), [s(x(3, 4), p(4), p(4))]),
    (named("masked", lambda a, w: F.linear(a, w * torch.ones(2, 4, device=a.device).tril())), [s(x(3, 4), p(2, 4))]),
    (named("padded weight", lambda a, w: F.conv1d(a, F.pad(w, (1, 1)))), [s(x(3, 2, 6), p(2, 2, 3))]),
    (named("permuted", lambda a, w: torch.einsum("nti,oi->nto", a, w.permute(1, 0))), [s(x(3, 5, 4), p(4, 2))]),
    (named("index rows", lambda a, w: F.linear(a, w[torch.tensor([0, 2, 2], device=a.device)])), [s(x(3, 4), p(4, 4))]),
    (named("regularised", lambda a, w: F.linear(a, w) + w.square().sum()), [s(x(3, 4), p(2, 4))]),
    (
        named(
            "weight standardised",
            lambda a, w: F.conv2d(a, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)),
        ),
        [s(x(3, 2, 4, 4), p(4, 2, 3, 3))],
    ),
    (named("positions sliced", lambda a, w: a + w[:, : a.shape[1]]), [s(x(3, 5, 4), p(1, 7, 4)), s(x(3, 3, 4), p(1, 3, 4))]),
]

RECURRENT: list[tuple[Op, list[Sample]]] = [
    layer(
        lambda cell=cell, k=k: cell(4, 2, **k),
        x(3, 5, 4) if k.get("batch_first") else x(5, 3, 4),
        dim=0 if k.get("batch_first") else 1,
    )
    for cell in (nn.RNN, nn.LSTM, nn.GRU)
    for k in ({"batch_first": True}, {}, {"batch_first": True, "num_layers": 2, "bidirectional": True}, {"bias": False})
] + [layer(lambda cell=cell: cell(4, 2), x(3, 4)) for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)]

EXACT = [*PRODUCTS, *CONVOLUTIONS, *TABLES, *NORMS, *ELEMENTWISE, *INPLACE, *JOINS, *DERIVED, *RECURRENT]

SLOW: list[tuple[Op, list[Sample]]] = [
    (torch.linalg.multi_dot, [s([x(3, 4), p(4, 2), p(2, 5)])]),
    (torch.chain_matmul, [s(x(3, 4), p(4, 2), p(2, 5))]),
    (torch.linalg.vecdot, [s(x(3, 4), p(4)), s(x(3, 5, 4), p(5, 4))]),
    (torch.cdist, [s(x(3, 5, 4), p(6, 4)), s(x(3, 4), p(6, 4)), s(x(3, 3, 4), p(3, 4))]),
    (F.pairwise_distance, [s(x(3, 4), p(4))]),
    (named("gather", lambda w, i: w.expand(i.shape[0], -1).gather(1, i)), [s(p(1, 5), ids(3, 4))]),
    (named("index two", lambda w, i, j: w[i, j]), [s(p(5, 5), ids(3, 4), ids(3, 4))]),
    (named("take", lambda w, i: w.take(i)), [s(p(5), ids(3, 4))]),
    (named("diagonal einsum", lambda a, w: torch.einsum("ni,ii->ni", a, w)), [s(x(3, 4), p(4, 4))]),
    (torch.einsum, [s("nii,io->no", x(3, 4, 4), p(4, 2))]),
    (torch.linalg.solve, [s(nn.Parameter(x(4, 4) + 4 * torch.eye(4)), x(3, 4, 2))]),
]
