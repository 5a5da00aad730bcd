"""A default device of the user, on which nothing of our own is made: here `meta`, whose tensors have no values to work with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import samplewise as sw
from samplewise import testing

N = 3


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x).new_zeros(N, 2)
        for i in range(N):
            out[i] = self.layer(x[i])
        return out


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(row[None]) for row in x.unbind()]) + self.layer(torch.stack([x[i] for i in range(N)]))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x[:, None].expand(-1, 5, -1), LENGTHS, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][0]


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 2)
        self.places = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = x.abs().long().clamp_max(4)
        return self.bag(ids) + self.places(POSITIONS.expand(len(x), 4)).sum(1)


LENGTHS, POSITIONS = torch.tensor([5, 2, 4]), torch.arange(4)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


@pytest.mark.parametrize("kind", [Written, Chosen, Packed, Bags])
def test_models(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), double(N, 4)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses(copy.copy(model), x)]
    with torch.device("meta"):
        found = sw.per_sample_grads(model, losses, x)
        norms = sw.per_sample_norms(model, losses, x)
    torch.testing.assert_close(list(found.values()), [torch.stack(grads) for grads in zip(*rows, strict=True)])
    torch.testing.assert_close(norms, torch.stack([torch.cat([grad.flatten() for grad in row]).norm() for row in rows]))


def test_checks_and_projections() -> None:
    model, x = nn.Linear(4, 2).double(), double(N, 4)
    sample = testing.Sample((x, nn.Parameter(double(2, 4))), n=N)
    with torch.device("meta"):
        testing.check_rule(F.linear, [sample])
        sw.verify(model, losses, x)
        with sw.record(model) as rec:
            rec.backward(losses(model, x))
        assert rec.project(sw.GaussianProjection(5)).device.type == "cpu"
