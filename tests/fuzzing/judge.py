"""Exact against the batch-of-one loop, or refused; never silently wrong."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

import samplewise as sw

from .network import DERIVATIVES, OPS, TRACED

# of float64, and of programs with a shorter type in the middle
TIGHT, LOOSE = 1e-6, 0.1
# what a step may raise where it is no program in plain PyTorch
PLAIN_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class Verdict:
    """`kind` is one of

    - exact: the rows of the loop, and every quantity agrees with them
    - refused: an error of samplewise
    - invalid: no program in plain PyTorch, or one without gradients
    - tie: the loop differs from the batch's own Jacobian although the losses agree, and we give one of the two
    - coarse: further off than float64 allows, in a program that computes in a shorter type; run again without it, it is exact
    - own: each loss depends on its own sample alone, but the program is another one in a batch; the rows are the batch's Jacobian
    - followed: the same, but the losses depend on the data of other samples too, through integers or constants
    - shares: a scalar loss that is a sum over samples, but of other losses than the loop's; the rows are the samples' shares of it
    - crashed: an error that is not one of ours
    - wrong: numbers that are neither
    """

    kind: str
    said: str = ""
    harmful: bool = False

    @property
    def bad(self):
        return self.kind in {"wrong", "crashed", "followed"}


def judge(case):
    verdict, ran = _judge(case)
    if verdict.kind in {"wrong", "coarse"} and any(OPS[name].coarse for name in ran) and not case.precise:
        precise, _ = _judge(case.but(precise=True))
        verdict = precise if precise.bad else Verdict("coarse", verdict.said)
    return Verdict(verdict.kind, verdict.said, any(OPS[name].harmful for name in ran))


def _judge(case):
    """The verdict, and the steps that ran."""
    net, x = case.network()
    try:
        input_grad = _plain(net, case, x)
        for other in _others(x) if case.how == TRACED else ():
            # which may make parameters of their own
            net.losses(other)
        wanted = _loop(net, case, x)
    except PLAIN_ERRORS as error:
        return Verdict("invalid", f"{type(error).__name__} {short(error)}"), net.ran
    if not wanted or not all(rows.isfinite().all() for rows in wanted.values()):
        return Verdict("invalid", "not finite" if wanted else "no parameters"), net.ran
    try:
        found, input_found = _recorded(net, case, x)
    except sw.SamplewiseError as error:
        return Verdict("refused", f"{type(error).__name__} {short(error)}"), net.ran
    except Exception as error:  # noqa: BLE001
        return Verdict("crashed", f"{type(error).__name__} {short(error)}"), net.ran
    verdict = _disagreement(found, wanted) or _compared(net, case, x, found, wanted)
    # with a graph no input has a gradient
    fills = case.wants and case.how not in {DERIVATIVES, TRACED}
    if fills and torch.equal(input_found.isnan(), input_grad.isnan()):
        # where plain PyTorch has no number either (hypot at zero) there is nothing to compare
        input_found, input_grad = input_found.nan_to_num(0.0), input_grad.nan_to_num(0.0)
    if verdict.kind == "exact" and fills and not close(input_found, input_grad, _tolerance(net, case)):
        verdict = Verdict("wrong", "the input's gradient is not that of the plain backward")
    return verdict, net.ran


def _tolerance(net, case):
    return LOOSE if any(OPS[name].coarse for name in net.ran) and not case.precise else TIGHT


def _disagreement(found, wanted):
    if isinstance(found, str):
        return Verdict("wrong", found)
    if set(found) != set(wanted):
        return Verdict("wrong", f"parameters {sorted(found)}, not {sorted(wanted)}")
    if any(rows.dtype != wanted[name].dtype for name, rows in found.items()):
        return Verdict("wrong", "rows of another type than their parameter")
    return None


def _compared(net, case, x, found, wanted):
    tolerance = _tolerance(net, case)
    off = [name for name in wanted if not close(found[name], wanted[name], tolerance)]
    return _other_than_the_loop(net, case, x, found, wanted, off, tolerance) if off else Verdict("exact")


def _other_than_the_loop(net, case, x, found, wanted, off, tolerance):
    losses, own = _jacobian(net, case, x)
    mixes = not close(losses, _alone(net, case, x), tolerance)
    if all(close(found[name], own[name], tolerance) for name in own):
        return Verdict(("own" if _independent(net, case, x) else "followed") if mixes else "tie")
    if case.how in {1, 2} and _are_shares(net, case, x, found, tolerance):
        return Verdict("shares")
    worst = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    return Verdict("wrong", f"{'samples mixed, ' if mixes else ''}off by {worst:.3g} in {', '.join(off)}")


def _independent(net, case, x):
    """Whether each loss of the batch stays as it is when all other samples are replaced."""
    losses = net.losses(x.clone()).detach()
    for i in range(case.n):
        for draw in range(3):
            others = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(draw))
            others.select(case.batch_dim, i).copy_(x.select(case.batch_dim, i))
            if not close(net.losses(others)[i].detach(), losses[i], TIGHT):
                return False
    return True


def _are_shares(net, case, x, found, tolerance):
    """Whether the rows add up to the plain gradient, and none but its own changes with a sample's data, where that can be recorded."""
    if not _adds_up(net, case, x, found, tolerance):
        return False
    tried = 0
    for i in range(case.n):
        moved = x.clone()
        moved.select(case.batch_dim, i).copy_(x.select(case.batch_dim, i).flip(0) * 1.5 - 0.25)
        try:
            rows, _ = _recorded(net, case, moved)
        except sw.SamplewiseError:
            # other data may take another way through the program
            continue
        others = [j for j in range(case.n) if j != i]
        same = all(close(rows[name][others], found[name][others], tolerance * 1e-2) for name in found)
        if not same or not _adds_up(net, case, moved, rows, tolerance):
            return False
        tried += 1
    return tried > 0


def _adds_up(net, case, x, rows, tolerance):
    total = _stacked(net, [lambda: net.losses(_input(case, x)).sum()])
    return all(close(rows[name].sum(0), total[name][0], tolerance) for name in rows)


def close(a, b, tolerance):
    if a.shape != b.shape:
        return False
    return bool((a - b).norm() <= tolerance * (b.norm() + 1e-2))


def short(error):
    return re.sub(r"\(.*?\)|'.*?'|\d(?!d\b)", "", str(error)).strip()[:400]


def _trainable(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def _input(case, x):
    return x.clone().requires_grad_(case.wants)


def _plain(net, case, x):
    """That the batch has a backward at all, and the gradient of the input where it wants one."""
    fed = _input(case, x)
    net.losses(fed).sum().backward()
    net.zero_grad()
    return _gradient_of(fed)


def _gradient_of(fed):
    return torch.zeros_like(fed) if fed.grad is None else fed.grad


def _loop(net, case, x):
    return _stacked(net, [lambda piece=piece: net.losses(_input(case, piece)).sum() for piece in x.split(1, case.batch_dim)])


def _jacobian(net, case, x):
    """Losses of the batch, and the gradient of each of them, whichever samples it comes from."""
    losses = net.losses(_input(case, x)).detach()
    return losses, _stacked(net, [lambda i=i: net.losses(_input(case, x))[i] for i in range(case.n)])


def _stacked(net, makers):
    """The parameters' gradients of some losses; a checkpoint of the old kind wants a plain backward."""
    rows = []
    for make in makers:
        net.zero_grad()
        make().backward()
        rows.append([torch.zeros_like(p) if p.grad is None else p.grad for p in _trainable(net).values()])
    net.zero_grad()
    return {name: torch.stack(grads) for name, grads in zip(_trainable(net), zip(*rows, strict=True), strict=True)}


def _alone(net, case, x):
    return torch.cat([net.losses(piece.clone()).detach() for piece in x.split(1, case.batch_dim)])


def _recorded(net, case, x):
    """What samplewise says: rows and the input's gradient; a sentence where its own quantities disagree."""
    if case.how == TRACED:
        return _traced(net, case, x), None
    fed = _input(case, x)
    if case.how == 3:
        rows = sw.per_sample_grads(net, lambda model, batch: model.losses(batch), fed, batch_dim=case.batch_dim)
        return dict(rows), _gradient_of(fed)
    again, reduction = case.how == DERIVATIVES, "mean" if case.how == 2 else "sum"
    with sw.record(net, batch_dim=case.batch_dim, loss_reduction=reduction, create_graph=again) as rec:
        losses = net.losses(fed)
        if case.how in {0, DERIVATIVES}:
            rec.backward(losses)
        else:
            (losses.mean() if case.how == 2 else losses.sum()).backward()
    grad = _gradient_of(fed) * (len(losses) if case.how == 2 else 1)
    rows = {name: part.detach() for name, part in rec.grads().items()}
    return _consistent(net, rec, rows, _tolerance(net, case)) or rows, grad


def _others(x):
    """Batches of the same kind."""
    return [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(draw)) for draw in range(3)]


class Shell(torch.nn.Module):
    """A module with the parameters of a network whose attributes change while it runs, which no trace allows.

    So the network is a variable of an installed package, of which no trace knows.
    """

    def __init__(self, net):
        super().__init__()
        torch.network_of_the_fuzzer = net
        self.ps = torch.nn.ParameterList(net.parameters())

    def forward(self, x):
        return torch.network_of_the_fuzzer.losses(x)


def _traced(net, case, x):
    """The rows of a trace that was made of other data; a sentence where it gives the same tensors for another batch."""
    names = {id(p): name for name, p in net.named_parameters()}

    def quantities(model, loss_fn, batch):
        with sw.record(model, batch_dim=case.batch_dim) as rec:
            rec.backward(loss_fn(model, batch))
        return rec.grads(), rec.norms()

    shell = Shell(net)
    run = sw.traced(quantities, shell, lambda model, batch: model(batch))
    for other in _others(x):
        run(other)
    assert any(known.sure for known in run._known.values()), "no trace was made"
    grads, norms = run(x.clone())
    rows = {names[id(shell.get_parameter(name))]: part for name, part in grads.items()}
    flat = torch.cat([part.flatten(1) for part in rows.values()], 1)
    agrees = close(norms, flat.norm(dim=1).to(norms.dtype), _tolerance(net, case))
    return rows if agrees else "norms: not what the rows give"


def _consistent(net, rec, rows, tolerance):
    """Every quantity from the rows; None where all agree."""
    flat = torch.cat([part.flatten(1) for part in rows.values()], 1)
    weights = torch.arange(1.0, len(flat) + 1, dtype=flat.dtype)
    total = torch.cat([part.flatten() for part in rec.weighted_sum(weights).values()])
    bound = float(flat.norm(dim=1).median()) + 1e-3
    clipped = torch.cat([part.flatten() for part in rec.clipped_sum(max_grad_norm=bound).values()])
    factor = (bound / flat.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    direction = {name: part[0] for name, part in rows.items()}
    checks: dict[str, tuple[Tensor, Tensor]] = {
        "norms": (rec.norms(), flat.norm(dim=1)),
        "gram": (rec.gram(), flat @ flat.T),
        "weighted_sum": (total, weights @ flat),
        "clipped_sum": (clipped, factor @ flat),
        "dot": (rec.dot(direction), flat @ flat[0]),
    }
    checks |= {
        f"norms of {name}": (norm, rows[name].flatten(1).norm(dim=1)) for name, norm in rec.norms(by="parameter").items()
    }
    for name, (found, wanted) in checks.items():
        # asked of factors in a shorter type, they may come in it
        if not close(found.to(wanted.dtype), wanted, tolerance):
            return f"{name}: not what the rows give, off by {float((found - wanted).abs().max()):.3g}"
    if any(p.grad is not None for p in net.parameters()):
        return "a parameter has a .grad"
    return None
