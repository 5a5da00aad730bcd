"""Rows that belong to samples without a pattern: bags, graphs, unpadded sequences, experts; against each sample alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw
from samplewise.axes import NOBODY, Axis


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(rec: sw.Record, model: nn.Module, losses: list[Tensor]) -> None:
    """The recording's rows are those of losses computed for each sample alone."""
    parameters = dict(model.named_parameters())
    for i, loss in enumerate(losses):
        wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for (name, row), b in zip(rec.grads().items(), wanted, strict=True):
            torch.testing.assert_close(row[i], b, msg=lambda text, name=name, i=i: f"{name} of sample {i}: {text}")
    assert any(row.abs().max() > 0 for row in rec.grads().values())


# --- bags by offsets --------------------------------------------------------------------------------------------------------------

WORDS, OFFSETS = torch.tensor([1, 4, 1, 0, 2, 2, 5, 3]), torch.tensor([0, 3, 3, 4])
BAGS = [WORDS[0:3], WORDS[3:3], WORDS[3:4], WORDS[4:8]]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2, 1])
@pytest.mark.parametrize("last", [False, True])
def test_bags_by_offsets(mode, padding, last):
    torch.manual_seed(0)
    model = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding, include_last_offset=last).double()
    offsets = torch.cat([OFFSETS, torch.tensor([8])]) if last else OFFSETS
    with sw.record(model, batch_size=4) as rec:
        rec.batched(OFFSETS if not last else offsets, owners=torch.tensor([0, 1, 2, 3, 3])[: len(offsets)])
        out = model(WORDS, offsets)
        rec.backward(out.sin().sum(1))
    ends = torch.tensor([0, 1]) if last else torch.tensor([0])
    alone = [model(bag, ends * len(bag)).sin().sum() for bag in BAGS]
    same(rec, model, alone)
    assert all(row.how == ("rule",) for row in rec.coverage().rows)


def test_bags_of_a_constant_weight_each():
    torch.manual_seed(0)
    model, weights = nn.EmbeddingBag(6, 3, mode="sum").double(), x(8)
    with sw.record(model, batch_size=4) as rec:
        rec.backward(model(WORDS, OFFSETS, per_sample_weights=weights).sin().sum(1))
    pieces = weights.split([3, 0, 1, 4])
    one = torch.tensor([0])
    same(rec, model, [model(b, one, per_sample_weights=w).sin().sum() for b, w in zip(BAGS, pieces, strict=True)])


def test_two_bags_for_each_sample():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(6, 3, mode="mean").double()
    with sw.record(model, batch_size=2) as rec:
        rec.batched(OFFSETS, owners=torch.tensor([0, 0, 1, 1]))
        rec.backward(model(WORDS, OFFSETS).sin().view(2, -1).sum(1))
    same(rec, model, [model(WORDS[:3], OFFSETS[:2]).sin().sum(), model(WORDS[3:], OFFSETS[:2] // 3).sin().sum()])


# --- owners that the user declares ------------------------------------------------------------------------------------------------


class Unpadded(nn.Module):
    """Sequences one behind the other, with attention inside each and a mean at the end."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(9, 6), nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, ids: Tensor, owners: Tensor, n: int) -> Tensor:
        h = self.embed(ids)
        q, k, v = self.qkv(h).chunk(3, -1)
        parts = [(q[owners == i] @ k[owners == i].T).softmax(-1) @ v[owners == i] for i in range(n)]
        h = h + torch.cat(parts)
        total = torch.zeros(n, 6, dtype=h.dtype).index_add(0, owners, h)
        return self.out(total / torch.bincount(owners, minlength=n)[:, None])


def test_unpadded_sequences():
    torch.manual_seed(0)
    model, owners = Unpadded().double(), torch.tensor([0, 0, 0, 1, 2, 2])
    ids = torch.tensor([1, 5, 2, 8, 8, 1])
    with sw.record(model, batch_size=3) as rec:
        rec.batched(ids, owners=owners)
        rec.backward(model(ids, owners, 3).sin().sum(1))
    same(rec, model, [model(part, torch.zeros_like(part), 1).sin().sum() for part in ids.split([3, 1, 2])])


class Messages(nn.Module):
    """A graph network: edges carry messages between nodes, nodes are pooled into graphs."""

    def __init__(self, scatter: str):
        super().__init__()
        self.scatter, self.message, self.update, self.read = scatter, nn.Linear(8, 5), nn.Linear(9, 4), nn.Linear(4, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graphs: Tensor, n: int) -> Tensor:
        source, target = edges
        messages = self.message(torch.cat([nodes[source], nodes[target]], 1)).tanh()
        if self.scatter == "index_add":
            got = torch.zeros(len(nodes), 5, dtype=nodes.dtype).index_add_(0, target, messages)
        elif self.scatter == "scatter_add":
            got = messages.new_zeros(len(nodes), 5).scatter_add(0, target[:, None].expand_as(messages), messages)
        else:
            got = messages.new_zeros(len(nodes), 5).index_put((target,), messages, accumulate=True)
        h = self.update(torch.cat([nodes, got], 1)).relu()
        return self.read(nodes.new_zeros(n, 4).index_add(0, graphs, h))


@pytest.mark.parametrize("scatter", ["index_add", "scatter_add", "index_put"])
def test_graphs(scatter):
    torch.manual_seed(0)
    model = Messages(scatter).double()
    nodes, graphs = x(7, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    # node 2 hears of nobody
    edges = torch.tensor([[0, 1, 2, 3, 6, 5], [1, 0, 1, 4, 5, 6]])
    with sw.record(model, batch_size=3) as rec:
        rec.batched(nodes, owners=graphs)
        rec.backward(model(nodes, edges, graphs, 3).sin().sum(1))
    parts = [(nodes[:3], edges[:, :3]), (nodes[3:5], edges[:, 3:4] - 3), (nodes[5:], edges[:, 4:] - 5)]
    same(rec, model, [model(a, e, torch.zeros(len(a), dtype=torch.long), 1).sin().sum() for a, e in parts])


def test_a_graph_across_two_samples_is_refused():
    model, nodes = Messages("index_add").double(), x(4, 4)
    edges, graphs = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 0, 1, 1])
    refused = pytest.raises(sw.SampleAxisError, match=r"linear: the sample axis of an operand .* was lost in cat")
    with refused, sw.record(model, batch_size=2) as rec:
        rec.batched(nodes, owners=graphs)
        # (2, edges), and there are two samples
        rec.constant(edges)
        rec.backward(model(nodes, edges, graphs, 2).sin().sum(1))


@pytest.mark.parametrize(
    ("owners", "says"),
    [
        (torch.tensor([0, 1]), "must be 3 int64"),
        (torch.tensor([0, 1, 2]), "below the batch size 2"),
        (torch.ones(3), "got torch.float32"),
    ],
)
def test_bad_owners(owners, says):
    with sw.record(nn.Linear(2, 2), batch_size=2) as rec, pytest.raises(ValueError, match=says):
        rec.batched(torch.randn(3, 2), owners=owners)


def test_owners_need_the_batch_size():
    with sw.record(nn.Linear(2, 2)) as rec, pytest.raises(ValueError, match="Give `batch_size`"):
        rec.batched(torch.randn(3, 2), owners=torch.tensor([0, 0, 1]))


# --- patterns ---------------------------------------------------------------------------------------------------------------------


def test_rows_of_nobody_fit_any_pattern():
    rows = torch.tensor
    assert Axis.of_rows(0, rows([0, NOBODY, 2]), 3) == Axis(0)
    assert Axis.of_rows(0, rows([0, 0, NOBODY, 1]), 2) == Axis(0, 1, 2)
    assert Axis.of_rows(0, rows([NOBODY, 1, 0, NOBODY]), 2) == Axis(0, 2)
    assert Axis.of_rows(0, rows([0, NOBODY, 0]), 2).sample == 0


# --- the same rows by place -------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.router, self.experts = run, nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(0, 1)
        gate, choice = self.router(flat).softmax(-1).max(-1)
        return (gate[:, None] * self.run(self, flat, choice)).view(h.shape)


def by_mask(model, h, choice):
    out = torch.zeros_like(h)
    for e, expert in enumerate(model.experts):
        out[choice == e] = expert(h[choice == e])
    return out


def sorted_by_expert(model, h, choice):
    order = choice.argsort()
    parts = h[order].split(torch.bincount(choice, minlength=3).tolist())
    out = torch.cat([expert(part) for expert, part in zip(model.experts, parts, strict=True)])
    return out[order.argsort()]


def with_a_capacity(model, h, choice):
    out = torch.zeros_like(h)
    for e, expert in enumerate(model.experts):
        taken = (choice == e).nonzero()[:2, 0]
        out = out.index_add(0, taken, expert(h[taken]))
    return out


def halves_by_score(model, h, _):
    order = h[:, 0].argsort()
    low, high = h[order].chunk(2)
    return torch.cat([model.experts[0](low), model.experts[1](high)])[order.argsort()]


@pytest.mark.parametrize("run", [by_mask, sorted_by_expert], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("seed", range(6))
def test_experts(run, n, seed):
    torch.manual_seed(seed)
    model, h = Experts(run).double(), x(n, 6 // n * 2, 4, seed=seed)
    assert not sw.verify(model, lambda m, h: m(h).sin().sum((1, 2)), h).failures


def for_each_expert(run):
    """`run(expert, rows, order, places)` gives new rows and their places."""

    def every(model, h, choice):
        out = torch.zeros_like(h)
        for e, expert in enumerate(model.experts):
            places = (choice == e).nonzero()[:, 0]
            if len(places):
                new, there = run(expert, h[places], h[places][:, 0].argsort(), places)
                out = out.index_add(0, there, new)
        return out

    return every


@pytest.mark.parametrize(
    "run",
    [
        lambda expert, h, order, places: (expert(h[order])[order.argsort()], places),
        lambda expert, h, order, places: (expert(h[order]), places[order]),
        lambda expert, h, order, places: ((expert(h[order]) * h[order])[order.argsort()], places),
        lambda expert, h, order, places: (expert(h[order] * h[order][:, :1]), places[order]),
        lambda expert, h, order, places: (expert(h[order][order.argsort()] * h), places),
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_rows_sorted_within_their_expert(run, seed):
    torch.manual_seed(seed)
    model, h = Experts(for_each_expert(run)).double(), x(3, 4, 4, seed=seed)
    assert not sw.verify(model, lambda m, h: m(h).sin().sum((1, 2)), h).failures


def test_copies_of_sorted_rows():
    """Their places are those of the rows before, and not of the copies."""
    torch.manual_seed(0)
    model, h = nn.Linear(4, 4).double(), x(3, 4)

    def brought_back(m: nn.Module, h: Tensor) -> Tensor:
        order = h[:, 0].argsort()
        back, copies = order.argsort(), m(h)[order].repeat(2, 1)
        return copies[torch.cat([back, back + len(h)])].view(2, len(h), -1).sum((0, 2)).square()

    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(model, brought_back, h)
    weighted = lambda m, h: (m(h)[h[:, 0].argsort()].repeat(1, 2) * 2)[h[:, 0].argsort().argsort()].square().sum(1)
    assert not sw.verify(model, weighted, h).failures


@pytest.mark.parametrize(
    "run",
    [
        lambda expert, h, order, places: (expert(h[order]), places),
        lambda expert, h, order, places: (expert(h[order])[order], places),
        lambda expert, h, order, places: (expert(h), places[order]),
        lambda expert, h, order, places: (expert(h[order] * h), places[order]),
    ],
)
@pytest.mark.parametrize("seed", range(12))
def test_rows_beside_rows_in_another_order_are_refused(run, seed):
    """Also where the orders of this batch happen to agree: other data would have others."""
    torch.manual_seed(seed)
    model, h = Experts(for_each_expert(run)).double(), x(2, 2, 4, seed=seed)
    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(model, lambda m, h: m(h).sin().sum((1, 2)), h)


def split_in_the_middle(model, h, choice):
    order = choice.clamp(max=1).argsort(stable=True)
    low, high = h[order].chunk(2)
    return torch.empty_like(h).index_copy(0, order, torch.cat([model.experts[0](low), model.experts[1](high)]))


def test_a_cut_through_rows_of_one_expert_is_refused():
    # whatever pattern the sorted rows happen to lie in
    signs = torch.tensor([-1.0, 1, 1, 1]).double()
    model, h = Experts(split_in_the_middle).double(), x(2, 2, 4).abs() * signs.view(2, 2, 1)
    model.router = nn.Linear(4, 2).double()
    model.router.weight.data, model.router.bias.data = (
        torch.tensor([[-1.0, 0, 0, 0], [1, 0, 0, 0]]).double(),
        torch.zeros(2).double(),
    )
    with pytest.raises(sw.SampleAxisError, match="was lost in chunk"), sw.record(model) as rec:
        rec.backward(model(h).sin().sum((1, 2)))


@pytest.mark.parametrize("run", [with_a_capacity, halves_by_score], ids=lambda f: f.__name__)
def test_experts_for_whom_samples_compete_are_refused(run):
    torch.manual_seed(0)
    model, h = Experts(run).double(), x(3, 4, 4)
    with (
        pytest.raises(sw.SampleAxisError, match=r"linear: .* was lost in (getitem|chunk), so the gradient of 'experts"),
        sw.record(model) as rec,
    ):
        rec.backward(model(h).sin().sum((1, 2)))


def test_a_loop_over_samples_and_two_views():
    torch.manual_seed(0)
    model, h = nn.Linear(4, 4).double(), x(3, 5, 4)

    def losses(model: nn.Module, h: Tensor) -> Tensor:
        first, second = model(torch.cat([h, h.sin()])).chunk(2)
        alone = torch.stack([F.mse_loss(model(row), row) for row in h])
        return (first * second).sum((1, 2)) + alone

    assert not sw.verify(model, losses, h).failures


def cut_by_place(model, h, use):
    rows = model(h).square().sum(-1).reshape(-1)
    use(rows, rows.argsort()).sum().backward()


@pytest.mark.parametrize("seed", range(8))
def test_sorted_rows_beside_unsorted_ones_have_no_places(seed):
    model, h = nn.Linear(1, 1).double(), x(2, 2, 1, seed=seed)
    for use in (
        lambda r, o: (r[o] + r)[:2],
        lambda r, o: (torch.zeros_like(r) + r[o])[:2],
        lambda r, o: (r + r[o]).view(2, 2)[0],
    ):
        with pytest.raises(sw.SamplewiseError), sw.record(model):
            cut_by_place(model, h, use)


def test_single_entries_of_a_vector_of_samples():
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()

    def losses(m: nn.Module, h: Tensor) -> Tensor:
        v = m(h)[:, 0]
        return torch.stack([v[i] * m.bias[0] for i in range(len(v))]) + torch.stack([e.sin() * m.weight.sum() for e in v])

    assert not sw.verify(model, losses, x(3, 4)).failures


# --- nobody's rows ----------------------------------------------------------------------------------------------------------------


def by_setitem(out, mask, rows, expert):
    out[mask] = expert(rows[mask])
    return out


def at_places(write, places=lambda mask: mask.nonzero()[:, 0]):
    """`write(out, places, new rows)`."""
    return lambda out, mask, rows, expert: write(out, places(mask), expert(rows[places(mask)]))


WRITTEN = {
    "setitem": by_setitem,
    "setitem of a view": lambda out, mask, rows, expert: (by_setitem(out.view(-1, 4), mask, rows, expert), out)[1],
    "new_zeros": lambda out, mask, rows, expert: out + by_setitem(rows.new_zeros(len(rows), 4), mask, rows, expert),
    "index_add": at_places(lambda out, places, new: out.index_add(0, places, new)),
    "index_add_": at_places(lambda out, places, new: out.index_add_(0, places, new)),
    "index_add by argwhere": at_places(lambda out, places, new: out.index_add(0, places, new), lambda m: m.argwhere()[:, 0]),
    "index_copy": at_places(lambda out, places, new: out.index_copy(0, places, new)),
    "index_copy_": at_places(lambda out, places, new: out.index_copy_(0, places, new)),
    "index_fill": at_places(lambda out, places, new: out.index_fill(0, places, 2.0).index_add(0, places, new)),
    "index_fill_": at_places(lambda out, places, new: out.index_add(0, places, new).index_fill_(1, torch.tensor([1]), 2.0)),
    "scatter_add": at_places(lambda out, places, new: out.scatter_add(0, places[:, None].expand_as(new), new)),
    "scatter": at_places(lambda out, places, new: out.scatter(0, places[:, None].expand_as(new), new)),
    "index_put": at_places(lambda out, places, new: out.index_put((places,), new)),
    "index_put_": at_places(lambda out, places, new: out.index_put_((places,), new, accumulate=True)),
    "index_put by mask": lambda out, mask, rows, expert: out.index_put_((mask,), expert(rows[mask])),
    "masked_scatter": lambda out, mask, rows, expert: out.masked_scatter(mask[:, None], expert(rows[mask])),
    "masked_scatter_": lambda out, mask, rows, expert: out.masked_scatter_(mask[:, None], expert(rows[mask])),
}


class TwoExperts(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write, self.experts = write, nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        out, choice = torch.zeros(len(h), 4, dtype=h.dtype), (h[:, 0] > 0).long()
        for e, expert in enumerate(self.experts):
            out = self.write(out, choice == e, h, expert)
        return out


@pytest.mark.parametrize("write", WRITTEN)
@pytest.mark.parametrize("shift", [0.1, -0.5, -1.1])
def test_an_expert_without_rows(write, shift):
    h = x(3, 4).sigmoid() + shift
    assert not sw.verify(TwoExperts(WRITTEN[write]).double(), lambda m, h: m(h).square().sum(1), h).failures


def test_a_buffer_that_nobody_wrote_is_a_constant():
    model, h = nn.Linear(4, 4).double(), x(3, 4).sigmoid()

    def losses(m: nn.Module, h: Tensor) -> Tensor:
        buffer = torch.zeros(len(h), 4, dtype=h.dtype)
        buffer[h[:, 0] > 2] = m(h[h[:, 0] > 2])
        return (m(h) + buffer.exp().T.T[:, :1]).square().sum(1)

    assert not sw.verify(model, losses, h).failures


@pytest.mark.parametrize("labels", [[1, 5, 15], [1, 1, 1], [15, 15, 15], [5, 6, 15]])
def test_adaptive_softmax(labels):
    torch.manual_seed(0)
    model = nn.AdaptiveLogSoftmaxWithLoss(6, 20, [4, 10]).double()
    batch = x(3, 6), torch.tensor(labels)
    assert not sw.verify(model, lambda m, batch: -m(*batch).output, batch).failures


# --- rows in an order of the data, beside constants -----------------------------------------------------------------------------------

EACH, ONE = x(4, 5, seed=9), x(5, seed=9)
LABELS, PLACES = torch.tensor([0, 1, 2, 0]), torch.arange(4)


class Ranked(nn.Module):
    """`use(model, h, v, order)`: rows of features `(4, 5)` and losses `(4,)`, in an order of the data."""

    def __init__(self, use):
        super().__init__()
        self.use, self.linear = use, nn.Linear(4, 5)
        self.rank = nn.Parameter(torch.ones(4))
        self.register_buffer("each", EACH.clone())
        self.register_buffer("grid", x(4, 3, 3, 2, seed=5).clamp(-1, 1))

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        order = h.detach().square().sum(1).argsort()
        return self.use(self, h[order], h.square().sum(1)[order], order)


def overwritten(target, write):
    write(target)
    return target


BY_PLACE = {
    "mul": lambda m, h, v, o: h * m.each,
    "cat": lambda m, h, v, o: torch.cat([h, m.each], 1).square(),
    "stack": lambda m, h, v, o: torch.stack([h, m.each], 1).prod(1),
    "stack behind": lambda m, h, v, o: torch.stack([h, m.each], 2).prod(2),
    "hstack": lambda m, h, v, o: torch.hstack([h, m.each]).square(),
    "dstack": lambda m, h, v, o: torch.dstack([h, m.each]).prod(2),
    "column_stack": lambda m, h, v, o: torch.column_stack([v, m.each[:, 0]]).prod(1),
    "setitem": lambda m, h, v, o: overwritten(v * 1, lambda v: v.__setitem__(slice(-1, None), 0.0)),
    "setitem of one": lambda m, h, v, o: overwritten(v * 1, lambda v: v.__setitem__(0, 0.0)),
    "setitem by a list": lambda m, h, v, o: overwritten(v * 1, lambda v: v.__setitem__([0, 2], 0.0)),
    "setitem by a mask": lambda m, h, v, o: overwritten(v * 1, lambda v: v.__setitem__(PLACES > 1, 0.0)),
    "setitem of rows": lambda m, h, v, o: overwritten(h * 1, lambda h: h.__setitem__((slice(None), 0), m.each[:, 0])),
    "setitem of columns by row": lambda m, h, v, o: overwritten(h * 1, lambda h: h.__setitem__((PLACES, LABELS), 0.0)),
    "setitem into a constant": lambda m, h, v, o: overwritten(
        m.each.clone(), lambda y: y.__setitem__((slice(None), [0]), h[:, :1])
    ).prod(1),
    "setitem into rows": lambda m, h, v, o: (
        overwritten(torch.zeros(4, 5).double(), lambda y: y.__setitem__(PLACES, h)) * m.each
    ),
    "setitem into all rows": lambda m, h, v, o: (
        overwritten(torch.zeros(4, 5).double(), lambda y: y.__setitem__(slice(None), h)) * m.each
    ),
    "a view": lambda m, h, v, o: overwritten(h * 1, lambda h: h[:1].mul_(2)),
    "a row": lambda m, h, v, o: overwritten(h * 1, lambda h: h[0].zero_()),
    "a view, twice": lambda m, h, v, o: overwritten(h * 1, lambda h: h[:1].mul_(2).add_(1)),
    "a view that is set": lambda m, h, v, o: overwritten(h * 1, lambda h: h[:2].__setitem__(0, 1.0)),
    "a view of columns": lambda m, h, v, o: overwritten(h * 1, lambda h: h[:, :1].mul_(m.each[:, :1])),
    "index_copy": lambda m, h, v, o: h.index_copy(0, PLACES[:2], m.each[:2]),
    "index_copy of columns": lambda m, h, v, o: h.index_copy(1, PLACES[:2], m.each[:, :2]),
    "index_copy elsewhere": lambda m, h, v, o: torch.zeros_like(m.each).index_copy(0, PLACES, h) * m.each,
    "index_add": lambda m, h, v, o: h.index_add(1, PLACES, m.each[:, :4]),
    "index_fill": lambda m, h, v, o: h.index_fill(0, PLACES[:1], 0.0),
    "index_put": lambda m, h, v, o: h.index_put((PLACES, LABELS), torch.zeros(()).double()),
    "scatter": lambda m, h, v, o: h.scatter(1, LABELS[:, None], 0.0),
    "scatter of rows": lambda m, h, v, o: h.scatter(1, torch.zeros(4, 1, dtype=torch.long), m.each),
    "scatter some rows": lambda m, h, v, o: h.scatter(1, torch.zeros(2, 1, dtype=torch.long), 0.0),
    "scatter_add": lambda m, h, v, o: h.scatter_add(1, LABELS[:, None], m.each),
    "masked_scatter": lambda m, h, v, o: h.masked_scatter(PLACES[:, None] > 2, m.each),
    "select_scatter": lambda m, h, v, o: h.select_scatter(ONE, 0, 1),
    "select_scatter of columns": lambda m, h, v, o: h.select_scatter(m.each[:, 0], 1, 1),
    "slice_scatter": lambda m, h, v, o: h.slice_scatter(m.each[:1], 0, 0, 1),
    "diagonal_scatter": lambda m, h, v, o: h.diagonal_scatter(ONE[:4]),
    "gather": lambda m, h, v, o: h.gather(1, LABELS[:, None]),
    "gather some rows": lambda m, h, v, o: h.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "gather then": lambda m, h, v, o: h.gather(1, h.argmax(1, keepdim=True)) * m.each,
    "take_along_dim": lambda m, h, v, o: torch.take_along_dim(h, LABELS[:, None], 1),
    "getitem": lambda m, h, v, o: h[PLACES, LABELS],
    "getitem by a mask": lambda m, h, v, o: h[F.one_hot(LABELS, 5).bool()],
    "diagonal": lambda m, h, v, o: h.diagonal(),
    "masked_select": lambda m, h, v, o: h.masked_select(F.one_hot(LABELS, 5).bool()),
    "masked_fill": lambda m, h, v, o: h.masked_fill(PLACES[:, None] > 2, 0.0),
    "where": lambda m, h, v, o: torch.where(PLACES[:, None] > 2, 0.0, h),
    "cross_entropy": lambda m, h, v, o: F.cross_entropy(h, LABELS, reduction="none"),
    "cross_entropy, summed": lambda m, h, v, o: F.cross_entropy(h, LABELS, reduction="sum"),
    "cross_entropy of shares": lambda m, h, v, o: F.cross_entropy(h, m.each.softmax(1), reduction="none"),
    "nll_loss": lambda m, h, v, o: F.nll_loss(h.log_softmax(1), LABELS),
    "multi_margin_loss": lambda m, h, v, o: F.multi_margin_loss(h, LABELS, reduction="none"),
    "mse_loss": lambda m, h, v, o: F.mse_loss(h, m.each),
    "cosine_embedding_loss": lambda m, h, v, o: F.cosine_embedding_loss(
        h, ONE.expand(4, 5), LABELS.sign() * 2 - 1, reduction="none"
    ),
    "cosine_similarity": lambda m, h, v, o: F.cosine_similarity(h, m.each),
    "grid_sample": lambda m, h, v, o: F.grid_sample(h[:, None, None], m.grid, align_corners=False),
    "einsum": lambda m, h, v, o: torch.einsum("n,n->n", v, m.each[:, 0]),
    "einsum with a parameter": lambda m, h, v, o: torch.einsum("n,n->n", v, m.rank),
    "bmm": lambda m, h, v, o: torch.bmm(h[:, None], m.each[:, :, None]),
    "baddbmm": lambda m, h, v, o: torch.baddbmm(m.each[:, None, :1], h[:, None], ONE.expand(4, 5)[:, :, None]),
    "bilinear": lambda m, h, v, o: F.bilinear(h, m.each, torch.ones(2, 5, 5).double()),
    "solve": lambda m, h, v, o: torch.linalg.solve(torch.diag_embed(h.square() + 1), m.each),
    "a parameter": lambda m, h, v, o: h * m.rank[:, None],
    "a parameter, part of it": lambda m, h, v, o: h * m.rank[: len(h), None],
    "a parameter joined": lambda m, h, v, o: torch.cat([h, m.rank[:, None]], 1).square(),
    "another order": lambda m, h, v, o: torch.stack([h, m.linear(EACH[:, :4])], 1).prod(1),
}


@pytest.mark.parametrize("use", BY_PLACE)
@pytest.mark.parametrize("identity", [False, True])
def test_rows_of_an_order_do_not_meet_constants_by_place(use, identity):
    """Also where the data are in order already."""
    torch.manual_seed(0)
    model, h = Ranked(BY_PLACE[use]).double(), x(4, 4)
    if identity:
        h = h[model.linear(h).square().sum(1).argsort()].detach()
    with sw.record(model) as rec:
        for table in (EACH, LABELS, PLACES):
            rec.constant(table)
        with pytest.raises(sw.SamplewiseError):
            model(h).sum().backward()


BY_SAMPLE = {
    "mul": lambda m, h, v, o: (h * ONE).sum(1),
    "cat": lambda m, h, v, o: torch.cat([h, ONE.expand(4, 5)], 1).square().sum(1),
    "stack": lambda m, h, v, o: torch.stack([h, ONE.expand(4, 5)], 1).prod(1).sum(1),
    "hstack": lambda m, h, v, o: torch.hstack([h, torch.ones(4, 2).double()]).square().sum(1),
    "setitem of columns": lambda m, h, v, o: overwritten(h * 1, lambda h: h.__setitem__((slice(None), 0), 2.0)).sum(1),
    "setitem by their own": lambda m, h, v, o: overwritten(h * 1, lambda h: h.__setitem__(h[:, 0] > 0, 2.0)).sum(1),
    "setitem of every row": lambda m, h, v, o: overwritten(
        h * 1, lambda h: h.__setitem__((slice(None), [0, 1]), h[:, 2:4])
    ).sum(1),
    "setitem into zeros": lambda m, h, v, o: overwritten(
        h.new_zeros(4, 6), lambda y: y.__setitem__((slice(None), slice(5)), h)
    ).sum(1),
    "a view of columns": lambda m, h, v, o: overwritten(h * 1, lambda h: h[:, :1].mul_(2)).sum(1),
    "index_copy": lambda m, h, v, o: h.index_copy(1, PLACES[:2], h[:, 2:4]).square().sum(1),
    "index_fill": lambda m, h, v, o: h.index_fill(1, PLACES[:2], 0.0).square().sum(1),
    "scatter": lambda m, h, v, o: h.scatter(1, h.argmax(1, keepdim=True), 0.0).square().sum(1),
    "scatter_": lambda m, h, v, o: (torch.zeros_like(m.each).scatter_(1, h.argmax(1, keepdim=True), 1.0) * h).sum(1),
    "gather": lambda m, h, v, o: h.gather(1, h.argmax(1, keepdim=True))[:, 0],
    "gather of a column": lambda m, h, v, o: h.gather(1, torch.ones(4, 2, dtype=torch.long)).prod(1),
    "topk": lambda m, h, v, o: h.topk(2)[0].prod(1),
    "getitem": lambda m, h, v, o: h[PLACES, h.argmax(1)],
    "getitem of a column": lambda m, h, v, o: h[:, [1, 1]].prod(1),
    "cross_entropy": lambda m, h, v, o: F.cross_entropy(h, h.argmin(1), reduction="none"),
    "cross_entropy of one class": lambda m, h, v, o: F.cross_entropy(h, torch.ones(4, dtype=torch.long), reduction="none"),
    "nll_loss with weights": lambda m, h, v, o: F.nll_loss(h.log_softmax(1), h.argmin(1), ONE.abs(), reduction="none"),
    "linear": lambda m, h, v, o: F.linear(h, m.each).square().sum(1),
    "bmm": lambda m, h, v, o: torch.bmm(h[:, None], h[:, :, None])[:, 0, 0],
    "layer_norm": lambda m, h, v, o: F.layer_norm(h, (5,), ONE).square().sum(1),
    "a parameter of the features": lambda m, h, v, o: (h[:, :4] * m.rank).sum(1),
    "one parameter for all": lambda m, h, v, o: (h[:, :4] * m.rank.expand(4, 4)).sum(1),
    "another layer": lambda m, h, v, o: m.linear(h[:, :4]).square().sum(1),
    "its own rows": lambda m, h, v, o: (h * torch.stack([h.sin(), h.cos()], 1).prod(1)).sum(1),
}


def test_a_trimmed_loss_is_refused():
    model, h = nn.Linear(4, 5).double(), x(4, 4)
    with sw.record(model):
        losses = model(h).square().sum(1)
        losses = losses[losses.detach().argsort()]
        losses[-1:] = 0
        with pytest.raises(sw.MixedSamplesError):
            losses.sum().backward()


class Nested(nn.Module):
    """`use(module, h, out, mask)` on rows that a first mask picked, and what a second one picks of them."""

    def __init__(self, use):
        super().__init__()
        self.use, self.linear, self.inner = use, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        flat, out = h.flatten(0, 1), torch.zeros(h.shape[0] * h.shape[1], 4, dtype=h.dtype)
        picked = flat[:, 0] > -1
        rows = self.linear(flat[picked])
        out[picked] = self.use(self, rows, rows[:, 0] > 0)
        return out.view_as(h)


def at(write):
    return lambda m, h, mask: write(torch.zeros(len(h), 4, dtype=h.dtype), mask.nonzero()[:, 0], m.inner(h[mask]))


WITHIN = {
    "setitem": lambda m, h, mask: overwritten(torch.zeros(len(h), 4).double(), lambda y: y.__setitem__(mask, m.inner(h[mask]))),
    "index_add": at(lambda out, places, new: out.index_add(0, places, new)),
    "index_put": at(lambda out, places, new: out.index_put((places,), new)),
    "scatter": at(lambda out, places, new: out.scatter(0, places[:, None].expand_as(new), new)),
    "masked_scatter": lambda m, h, mask: torch.zeros_like(h).masked_scatter(mask[:, None], m.inner(h[mask])),
}


@pytest.mark.parametrize("use", WITHIN)
@pytest.mark.parametrize("seed", range(3))
def test_rows_picked_among_picked_rows(use, seed):
    torch.manual_seed(seed)
    model, h = Nested(WITHIN[use]).double(), x(3, 4, 4, seed=seed)
    assert not sw.verify(model, lambda m, h: m(h).sin().sum((1, 2)), h).failures


@pytest.mark.parametrize("use", WITHIN)
def test_rows_picked_among_picked_rows_do_not_meet_constants_by_place(use):
    def by_place(m, h, mask):
        return WITHIN[use](m, h, mask) * torch.arange(len(h))[:, None]

    torch.manual_seed(0)
    with pytest.raises(sw.SamplewiseError):
        sw.per_sample_norms(Nested(by_place).double(), lambda m, h: m(h).sin().sum((1, 2)), x(3, 4, 4))


@pytest.mark.parametrize("use", BY_SAMPLE)
@pytest.mark.parametrize("identity", [False, True])
def test_rows_of_an_order_meet_what_is_theirs(use, identity):
    torch.manual_seed(0)
    model, h = Ranked(BY_SAMPLE[use]).double(), x(4, 4)
    if identity:
        h = h[model.linear(h).square().sum(1).argsort()].detach()
    with sw.record(model) as rec:
        for table in (EACH, LABELS, PLACES):
            rec.constant(table)
        model(h).sum().backward()
    order = model.linear(h).square().sum(1).argsort()
    same(rec, model, [model(h)[place] for place in order.argsort()])
