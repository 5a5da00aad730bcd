"""Memory seen through several tensors, and other ways around the recording: exact or refused, never silently wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw


class Between(nn.Module):
    """Two linear layers with something done to the activations between them."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.change = nn.Linear(6, 6), nn.Linear(6, 3), change
        self.register_buffer("state", torch.zeros(6))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.change(self, self.first(x)))


def through_a_view(_, h):
    v = h.view(len(h), -1)
    v -= v.mean(0)
    return h


def through_part(_, h):
    h[:, :3].sub_(h[:, :3].mean(0))
    return h


def through_a_transpose(_, h):
    a = h.t()
    a.sub_(a.mean(1, keepdim=True))
    return h


def seen_in_an_old_view(_, h):
    v = h[:, :3]
    h.sub_(h.mean(0))
    return torch.cat([v, v], 1)


def one_sample_into_another(_, h):
    h[0].add_(h[-1])
    return h


def through_detach(_, h):
    h.detach().copy_(h.detach().flip(0))
    return h


def data_of_a_buffer(model, h):
    model.state.data.mul_(0.9)
    model.state.data.add_(h.detach().mean(0))
    return h - model.state


def detached_buffer(model, h):
    model.state.detach().copy_(h.detach().mean(0))
    return h - model.state


def new_data_of_a_buffer(model, h):
    model.state.data = h.detach().mean(0)
    return h - model.state


def foreach_copy(model, h):
    torch._foreach_copy_([model.state], [h.detach().mean(0)])
    return h - model.state


@torch.jit.script
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def vmapped(_, h):
    return torch.vmap(lambda c: c - c.mean(), in_dims=1, out_dims=1)(h)


def new_tensor(_, h):
    return h - h.new_tensor(h.detach()).flip(0)


MIXED = [
    *[through_a_view, through_part, through_a_transpose, seen_in_an_old_view, one_sample_into_another, through_detach],
    *[data_of_a_buffer, detached_buffer, new_data_of_a_buffer, foreach_copy, vmapped, new_tensor],
]


@pytest.mark.parametrize("change", [*MIXED, lambda _, h: centred(h)], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixing_around_the_recording_is_refused(change):
    model = Between(change)
    with pytest.raises(sw.SamplewiseError), sw.record(model) as rec:
        rec.backward(model(torch.randn(4, 6).double()).square().sum(1))


def in_place_on_a_view(_, h):
    h.view(len(h), 2, 3).relu_()
    return h


def written_then_viewed(_, h):
    y = torch.zeros_like(h).new_zeros(h.shape)
    y[:, :3] = h[:, 3:]
    y[:, 3:] = h[:, :3]
    return y.view(len(h), 2, 3).flatten(1)


def old_view_of_an_activation(_, h):
    v = h[:, :3]
    h.tanh_()
    return torch.cat([v, v], 1)


@pytest.mark.parametrize("change", [in_place_on_a_view, written_then_viewed, old_view_of_an_activation])
def test_keeping_samples_apart_is_exact(change):
    model, x = Between(change), torch.randn(4, 6).double()
    assert not sw.verify(model, lambda m, x: m(x).square().sum(1), x).failures


def test_an_input_overwritten_after_the_backward_is_noticed():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    with sw.record(model) as rec:
        rec.backward(model(x).square().sum(1))
    rec.norms()
    x.zero_()
    with pytest.raises(sw.SamplewiseError, match="changed in place after the backward"):
        rec.norms()


def test_hooks_of_the_user_on_a_parameter_are_refused():
    model = nn.Linear(4, 3)
    handle = model.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(sw.UnsupportedOpError, match="weight: has a hook"), sw.record(model):
        pass
    handle.remove()
    with sw.record(model) as rec:
        rec.backward(model(torch.randn(2, 4)).sum(1))


def test_labels_in_another_order_than_the_logits_are_refused():
    model, x, y = nn.Linear(4, 5), torch.randn(3, 2, 4), torch.randint(5, (3, 2))
    with sw.record(model):
        turned = model(x).transpose(0, 1).reshape(-1, 5)
        with pytest.raises(sw.SampleAxisError, match="different places"):
            F.cross_entropy(turned, y.reshape(-1), reduction="none")


def test_channel_shuffle_of_samples_is_refused():
    layer = nn.Linear(2, 2)
    x = torch.randn(2, 4, 3, 2, 2)
    with sw.record(layer, batch_dim=1) as rec, pytest.raises(sw.SampleAxisError):
        rec.backward(layer(F.channel_shuffle(layer(x), 2)).sum((0, 2, 3, 4)))
