"""Where the peers are silently wrong (FACTS 1): the same models on samplewise, exact or refused.

Numbers are compared with a batch-of-one loop. Systems: Expanded Weights (EW, torch 2.13), Opacus 1.6, fastDP, bergson 2.5, kronfluence,
dattri, TF Privacy, BackPACK 1.7, ASDL. What concerns the interface of Expanded Weights itself is in test_expanded_weights*.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import samplewise as sw

N = 3
Losses = Callable[[nn.Module, Tensor], Tensor]


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def ids(*shape: int, high: int = 5) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], **parts: object) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.double()

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def squares(model: nn.Module, *batch: Tensor) -> Tensor:
    out = model(*batch)
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def loop(model: nn.Module, batch: tuple[Tensor, ...], losses: Losses, dim: int) -> dict[str, Tensor]:
    rows = []
    for i in range(N):
        model.zero_grad()
        losses(model, *(b.narrow(dim, i, 1) for b in batch)).sum().backward()
        rows.append(
            {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for name, p in model.named_parameters()}
        )
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def exact(model: nn.Module, *batch: Tensor, losses: Losses = squares, dim: int = 0) -> sw.Record:
    """Rows, norms and the coverage of every parameter."""
    wanted = loop(model, batch, losses, dim)
    with sw.record(model, batch_dim=dim, batch_size=N) as rec:
        rec.backward(losses(model, *batch))
    assert set(rec.grads()) == set(wanted)
    for name, rows in rec.grads().items():
        torch.testing.assert_close(rows, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(rec.norms(), torch.cat([rows.flatten(1) for rows in wanted.values()], 1).norm(dim=1))
    assert all(p.grad is None for p in model.parameters())
    return rec


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def attention(**options: object) -> Net:
    return Net(lambda self, b: self.mha(b, b, b)[0], mha=seeded(lambda: nn.MultiheadAttention(4, 2, **options)))


def second(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch).transpose(0, 1)
    return (out * (out.cos() + 1.5)).flatten(1).sum(1)


def tied(losses_of: type[nn.Module] = nn.Embedding) -> Net:
    embedding = losses_of(5, 4)
    return Net(lambda self, i: F.linear(self.embedding(i).tanh(), self.embedding.weight), embedding=embedding)


def running(layer: nn.Module) -> nn.Module:
    layer.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    layer.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    return layer.double().eval()


# One line per row of the table: exact where the peer is wrong or raises
EXACT: dict[str, Callable[[], object]] = {
    "EW: padding_idx": lambda: exact(seeded(lambda: nn.Embedding(5, 2, padding_idx=1)), ids(N, 6)),
    "EW: instance norm by running statistics": lambda: exact(
        nn.Sequential(
            seeded(lambda: nn.Conv1d(2, 4, 3)),
            running(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
            seeded(lambda: nn.Conv1d(4, 2, 1)),
        ),
        x(N, 2, 6),
    ),
    "EW: batch second, T == n": lambda: exact(
        seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))),
        x(N, N, 4),
        losses=second,
        dim=1,
    ),
    "EW: position ids (T, 1), T == n": lambda: exact(
        Net(lambda self, b: b + self.table(torch.arange(len(b))[:, None]), table=nn.Embedding(6, 4)),
        x(N, N, 4),
        losses=second,
        dim=1,
    ),
    "EW: complex": lambda: exact(
        nn.Linear(4, 2, dtype=torch.complex128),
        torch.complex(x(N, 4), x(N, 4).flip(0)),
        losses=lambda m, b: m(b).abs().square().sum(1),
    ),
    "EW: reentrant checkpoint": lambda: exact(
        Net(
            lambda self, b: self.out(checkpoint(self.inner, self.first(b), use_reentrant=True)),
            first=nn.Linear(4, 4),
            inner=nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            out=nn.Linear(5, 2),
        ),
        x(N, 4),
    ),
    "EW: checkpoint": lambda: exact(
        Net(
            lambda self, b: self.out(checkpoint(self.inner, self.first(b), use_reentrant=False)),
            first=nn.Linear(4, 4),
            inner=nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            out=nn.Linear(5, 2),
        ),
        x(N, 4),
    ),
    "EW: attention": lambda: exact(attention(batch_first=True), x(N, 5, 4)),
    "EW: encoder layer": lambda: exact(
        seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)), x(N, N, 4)
    ),
    "EW: arithmetic on a parameter": lambda: exact(
        Net(
            lambda self, b: (
                (b * self.w + self.w.expand(N if len(b) == N else 1, 4) @ self.m.t()[1:].to(torch.float64)) @ self.m
            ),
            w=x(4),
            m=x(4, 5),
        ),
        x(N, 4),
    ),
    "EW: RMS norm, PReLU, bilinear": lambda: exact(
        Net(
            lambda self, b: self.bilinear(self.prelu(self.norm(b)), b),
            norm=nn.RMSNorm(4),
            prelu=nn.PReLU(4),
            bilinear=nn.Bilinear(4, 4, 2),
        ),
        x(N, 4),
    ),
    "EW: transposed convolution": lambda: exact(
        seeded(lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2))),
        x(N, 2, 3, 3),
    ),
    "EW: batch norm, eval": lambda: exact(
        nn.Sequential(seeded(lambda: nn.Linear(4, 4)), running(nn.BatchNorm1d(4)), seeded(lambda: nn.Linear(4, 2))), x(N, 4)
    ),
    "EW: cells": lambda: exact(
        Net(
            lambda self, b: self.lstm(b[:, 1], self.lstm(b[:, 0]))[0] + self.gru(b[:, 2]),
            lstm=nn.LSTMCell(4, 3),
            gru=nn.GRUCell(4, 3),
        ),
        x(N, 3, 4),
    ),
    "EW: parametrizations": lambda: exact(
        Net(
            lambda self, b: self.b(self.a(b)),
            a=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            b=nn.utils.parametrizations.orthogonal(nn.Linear(4, 2)),
        ),
        x(N, 4),
    ),
    "EW: ViT patches, channels last, small batch": lambda: exact(
        Net(
            lambda self, b: self.out(self.patches(b.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)),
            patches=nn.Conv2d(3, 4, 2, stride=2),
            out=nn.Linear(4, 2),
        ),
        x(N, 3, 4, 4),
    ),
    "EW: conv3d, dilation": lambda: exact(seeded(lambda: nn.Conv3d(2, 2, 2, dilation=2)), x(N, 2, 4, 4, 4)),
    "EW: 3-D linear then in-place ReLU": lambda: exact(
        seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))), x(N, 2, 4)
    ),
    "EW: keyword order": lambda: exact(
        Net(lambda self, b: F.linear(bias=self.b, weight=self.w, input=b), w=x(2, 4), b=x(2)), x(N, 4)
    ),
    "EW: float LSTM as first layer": lambda: exact(
        Net(lambda self, b: self.lstm(b)[0], lstm=nn.LSTM(4, 3, batch_first=True)), x(N, 5, 4)
    ),
    **{
        f"Opacus: padding mode {mode}": lambda mode=mode: exact(
            seeded(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)), x(N, 2, 5, 4)
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "Opacus: channels last": lambda: exact(
        seeded(lambda: nn.Conv2d(2, 3, 3, padding=1)).to(memory_format=torch.channels_last),
        x(N, 2, 5, 4).contiguous(memory_format=torch.channels_last),
    ),
    "Opacus: strided input": lambda: exact(seeded(lambda: nn.Conv2d(2, 3, 3)), x(N, 2, 10, 8)[:, :, ::2, ::2]),
    "Opacus: forwards, then backwards in the same order": lambda: exact(
        Net(lambda self, b: self.inner(b) + self.inner(b.flip(1)).tanh(), inner=nn.Linear(4, 2)), x(N, 4)
    ),
    "Opacus: broadcast positions, T == n": lambda: exact(
        Net(lambda self, b: self.out(b + self.table(torch.arange(N))), table=nn.Embedding(N, 4), out=nn.Linear(4, 2)),
        x(N, N, 4),
    ),
    "Opacus: (n * T, d)": lambda: exact(
        Net(lambda self, b: self.inner(b.reshape(-1, 4)).view(len(b), -1), inner=nn.Linear(4, 2)), x(N, 5, 4)
    ),
    "Opacus: in-place after a layer": lambda: exact(
        Net(lambda self, b: self.bn(self.conv(b)).add_(b).relu_(), conv=nn.Conv2d(2, 2, 3, padding=1), bn=nn.GroupNorm(1, 2)),
        x(N, 2, 4, 4),
    ),
    "Opacus: LayerNorm(bias=False)": lambda: exact(
        seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, bias=False))), x(N, 4)
    ),
    "Opacus: several inputs": lambda: exact(
        Net(lambda self, a, b: self.inner(a) * self.inner(b), inner=nn.Linear(4, 2)), x(N, 4), x(N, 4) * 2
    ),
    "Opacus ghost: tied": lambda: exact(tied(), ids(N, 6)),
    "Opacus ghost: 4-D linear": lambda: exact(seeded(lambda: nn.Linear(4, 2)), x(N, 2, 3, 4)),
    "fastDP: groups": lambda: exact(seeded(lambda: nn.Conv2d(4, 6, 3, groups=2)), x(N, 4, 4, 4)),
    "fastDP: tied norm": lambda: exact(tied(), ids(N, 3)),
    "fastDP: reused layer": lambda: exact(
        Net(lambda self, b: self.inner(self.inner(b).tanh()), inner=nn.Linear(4, 4)), x(N, 4)
    ),
    "fastDP: definition order": lambda: exact(
        Net(lambda self, b: self.a(self.b(b)), a=nn.Linear(5, 2), b=nn.Linear(4, 5)), x(N, 4)
    ),
    "fastDP: bare parameters, attention, conv3d": lambda: exact(
        Net(
            lambda self, b: self.mha(*[self.conv(b).flatten(2).transpose(1, 2) * self.scale] * 3)[0],
            conv=nn.Conv3d(2, 4, 2),
            scale=x(4),
            mha=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        x(N, 2, 2, 3, 3),
    ),
    "bergson: conv1d with equal channels": lambda: exact(seeded(lambda: nn.Conv1d(4, 4, 4)), x(N, 4, 7)),
    "bergson: layer norm and embedding": lambda: exact(
        Net(lambda self, i: self.norm(self.table(i)), table=nn.Embedding(5, 4), norm=nn.LayerNorm(4)), ids(N, 3)
    ),
    "bergson: 2-D and 4-D linear": lambda: (
        exact(seeded(lambda: nn.Linear(4, 2)), x(N, 4)),
        exact(seeded(lambda: nn.Linear(4, 2)), x(N, 2, 2, 4)),
    ),
    "kronfluence: grouped convolution": lambda: exact(seeded(lambda: nn.Conv1d(6, 6, 3, groups=3)), x(N, 6, 5)),
    "kronfluence: shared parameters": lambda: exact(
        Net(lambda self, b: F.linear(F.linear(b, self.w).relu(), self.w), w=x(4, 4)), x(N, 5, 4)
    ),
    "TF Privacy: shared weight norms": lambda: exact(tied(), ids(N, 4)),
    "BackPACK: same padding": lambda: exact(seeded(lambda: nn.Conv2d(2, 3, (2, 4), padding="same")), x(N, 2, 5, 5)),
    "BackPACK: (1, T) ids": lambda: exact(
        Net(lambda self, b: self.out(b + self.table(torch.arange(5)[None])), table=nn.Embedding(5, 4), out=nn.Linear(4, 2)),
        x(N, 5, 4),
    ),
    "BackPACK: layer norm, group norm, bare parameters": lambda: exact(
        Net(lambda self, b: self.layer(self.group(b) * self.w), layer=nn.LayerNorm(4), group=nn.GroupNorm(1, 2), w=x(2, 1)),
        x(N, 2, 4),
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_exact(name: str) -> None:
    torch.manual_seed(0)
    EXACT[name]()


def test_group_norm_of_a_channels_last_input_without_gradient() -> None:
    """Plain PyTorch 2.13 itself crashes there on CPU: the truth is that of a contiguous input."""
    model, batch = seeded(lambda: nn.GroupNorm(2, 4)), x(N, 4, 3, 3)
    wanted = loop(model, (batch,), squares, 0)
    with sw.record(model) as rec:
        rec.backward(squares(model, batch.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(rec.grads()["weight"], wanted["weight"])


def refused(error: type[Exception], says: str, model: nn.Module, batch: Tensor, losses: Losses) -> None:
    with pytest.raises(error, match=says), sw.record(model) as rec:
        rec.backward(losses(model, batch))
    assert all(p.grad is None for p in model.parameters())


def test_scale_grad_by_freq() -> None:
    """EW divides by the counts of one sample."""
    refused(sw.UnsupportedOpError, "scale_grad_by_freq", nn.Embedding(5, 2, scale_grad_by_freq=True), ids(N, 6), squares)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training(affine: bool) -> None:
    """EW without affine, and BackPACK: rows that belong to no sample."""
    refused(
        sw.MixedSamplesError,
        "mix the samples",
        seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine))),
        x(N, 4),
        squares,
    )


def test_an_input_edited_after_use() -> None:
    """EW uses the new value."""
    model = seeded(lambda: nn.Linear(4, 2))

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        hidden = batch.clone()
        out = model(hidden).sum(1)
        hidden.zero_()
        return out

    refused(RuntimeError, "modified by an inplace operation", model, x(N, 4), losses)


def test_double_backward() -> None:
    """EW drops the path through the first derivative."""

    def penalty(model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(batch).tanh().sum(), batch, create_graph=True)
        return slope.square().sum(1)

    refused(RuntimeError, "create_graph|once_differentiable", seeded(lambda: nn.Linear(4, 2)), x(N, 4), penalty)


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: F.cross_entropy(out, y, ignore_index=1),
        lambda out, y: F.cross_entropy(out, y, weight=torch.arange(1.0, 6).double()),
    ],
)
def test_weighted_means(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """EW multiplies by n what was divided by something else."""
    model = seeded(lambda: nn.Linear(4, 5))
    with pytest.raises(sw.MixedSamplesError, match="weighted mean"), sw.record(model, loss_reduction="mean"):
        loss(model(x(N, 4)), torch.tensor([1, 2, 0])).backward()


def test_grad_of_an_input_is_no_side_effect() -> None:
    """EW fills grad_sample in `autograd.grad(loss, x)`."""
    model, batch = seeded(lambda: nn.Linear(4, 2)), x(N, 4).requires_grad_()
    with sw.record(model) as rec:
        torch.autograd.grad(model(batch).sum(), batch)
    with pytest.raises(sw.SamplewiseError, match="no backward pass"):
        rec.grads()


def test_a_second_batch_is_not_added() -> None:
    """EW adds its rows to those of other samples."""
    model = seeded(lambda: nn.Linear(4, 2))
    with sw.record(model) as rec:
        rec.backward(squares(model, x(N, 4)))
        with pytest.raises(sw.MixedSamplesError, match="two batches"):
            rec.backward(squares(model, x(N, 4) + 1))


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("lengths", [[5, 3, 1], [2, 5, 3], [1, 1, 4], [3, 3, 3]])
def test_packed_sequences(cell: type[nn.RNNBase], lengths: list[int]) -> None:
    """EW returns rows in the order of lengths."""
    torch.manual_seed(0)
    net = Net(
        lambda self, packed: pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=5)[0],
        rnn=cell(4, 3, batch_first=True),
    )
    wanted, batch = [], x(N, 5, 4)
    pack = lambda rows, sizes: pack_padded_sequence(rows, sizes, batch_first=True, enforce_sorted=False)
    for i in range(N):
        net.zero_grad()
        squares(net, pack(batch[i : i + 1], lengths[i : i + 1])).sum().backward()
        wanted.append({name: p.grad.clone() for name, p in net.named_parameters()})
    net.zero_grad()
    with sw.record(net) as rec:
        rec.backward(squares(net, pack(batch, lengths)))
    for name, rows in rec.grads().items():
        torch.testing.assert_close(rows, torch.stack([row[name] for row in wanted]))


@pytest.mark.parametrize(
    "after", [nn.LSTM(4, 5), nn.GRU(4, 5, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)]
)
def test_a_group_norm_whose_gradient_comes_time_first(after: nn.Module) -> None:
    """The attention block of a U-Net, and convolutions before a recurrent layer: the kernel reads its gradient as contiguous."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        tokens = m.norm(m.conv(x)).transpose(1, 2)
        if isinstance(after, nn.MultiheadAttention):
            return m.after(tokens, tokens, tokens)[0]
        return m.after(tokens)[0] if after.batch_first else m.after(tokens.transpose(0, 1))[0].transpose(0, 1)

    net = Net(forward, conv=nn.Conv1d(2, 4, 3, padding=1), norm=nn.GroupNorm(2, 4), after=after)
    assert exact(net, x(N, 2, 6))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_padding_of_an_embedding_bag_counts_from_the_end(mode: str) -> None:
    """The expansion took a negative `padding_idx` for an id that never comes."""
    net = Net(lambda m, i: F.embedding_bag(i, m.table, mode=mode, padding_idx=-2), table=x(5, 2))
    assert exact(net, torch.tensor([[0, 3, 1], [3, 3, 2], [4, 1, 3]]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_with_repeated_ids(mode: str) -> None:
    """Opacus: wrong for repeated ids, and for mode="max"."""
    model = seeded(lambda: nn.EmbeddingBag(5, 2, mode=mode))
    try:
        exact(model, torch.tensor([[1, 1, 2], [0, 0, 0], [3, 4, 3]]))
    except sw.UnsupportedOpError as error:
        assert "embedding_bag" in str(error)  # noqa: PT017


def test_non_reentrant_checkpoint_leaves_none_in_opacus() -> None:
    exact(Net(lambda self, b: checkpoint(self.inner, b, use_reentrant=False), inner=nn.Linear(4, 2)), x(N, 4))


@pytest.mark.parametrize("parts", [(N,), (2, 1), (1, 1, 1)])
def test_scores_do_not_depend_on_how_samples_are_batched(parts: tuple[int, ...]) -> None:
    """dattri: scores scale with the batch size under a sum loss, and the last partial batch gets another scale."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    found = []
    for piece in x(N, 4).split(parts):
        with sw.record(model, loss_reduction="mean") as rec:
            squares(model, piece).mean().backward()
        found.append(torch.stack([rec.dot(direction), rec.norms()], 1))
    with sw.record(model) as whole:
        whole.backward(squares(model, x(N, 4)))
    torch.testing.assert_close(torch.cat(found), torch.stack([whole.dot(direction), whole.norms()], 1))


def test_rows_are_per_sample_not_per_token() -> None:
    """ASDL gives a row for each token of a sequence."""
    assert exact(seeded(lambda: nn.Linear(4, 2)), x(N, 7, 4)).grads()["weight"].shape == (N, 2, 4)


def test_rows_are_not_given_to_the_wrong_sample() -> None:
    """The sum over samples is right in every such error: it cannot show them, verify can."""
    model = seeded(lambda: nn.Linear(4, 2))
    rec = exact(model, x(N, 4))
    shuffled = rec.grads()["weight"].roll(1, 0)
    torch.testing.assert_close(shuffled.sum(0), rec.grads()["weight"].sum(0))
    assert not torch.allclose(shuffled, rec.grads()["weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """EW raises under any autocast."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))).float()
    batch = x(N, 5, 4).float()

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return squares(model, batch).float()

    wanted = loop(model, (batch,), losses, 0)
    with sw.record(model) as rec:
        rec.backward(losses(model, batch))
    for name, rows in rec.grads().items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted[name], rtol=0.05, atol=0.05)


def test_a_hook_on_a_derived_weight_sees_each_sample_alone():
    torch.manual_seed(0)

    def forward(self, b):
        v = self.w * 2
        v.register_hook(lambda grad: grad / grad.norm())
        return (b @ v).tanh()

    model, b = Net(forward, w=x(4, 2)), x(3, 4)
    with sw.record(model) as rec:
        rec.backward(model(b).square().sum(1))
    rows = [torch.autograd.grad(model(row[None]).square().sum(), model.w)[0] for row in b]
    torch.testing.assert_close(rec.grads()["w"], torch.stack(rows))
    weights = torch.tensor([1.0, -2, 3]).double()
    torch.testing.assert_close(rec.weighted_sum(weights)["w"], sum(c * row for c, row in zip(weights, rows, strict=True)))
    torch.testing.assert_close(rec.norms(), torch.stack(rows).flatten(1).norm(dim=1))
