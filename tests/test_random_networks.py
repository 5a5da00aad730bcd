"""Random small networks: exact against a batch-of-one loop, or refused. Never silently wrong.

The short form of `make fuzz` (`python -m tests.fuzzing --help`). `SAMPLEWISE_NETWORKS=20000 pytest` runs more of them.
"""

import os
import re
import sys
import warnings
from collections import Counter

import pytest
import torch

from fuzzing import __main__ as command
from fuzzing import judge as judging
from fuzzing.judge import judge
from fuzzing.network import OPS, TRACED, Case
from fuzzing.search import PLAIN_STEPS, TRAPS, alone, draw, replayed, shown

PARTS = 4
PROGRAMS = int(os.environ.get("SAMPLEWISE_NETWORKS", "1200"))
VARIANTS = 60

# Programs that were wrong once, and what may come of them.
FOUND = [
    # a forward without a graph, which a checkpoint runs again with one
    (Case((("checkpointed", 149), ("rows beside", 180)), n=2), "refused"),
    # an index that is an empty list
    (
        Case(
            (("experts", 35), ("rows beside", 63), ("any axis", 205), ("hypernet", 58), ("routed", 224), ("round trip", 41)),
            n=2,
            seed=865,
        ),
        "exact",
    ),
    # one number, which a sample gave by itself
    (Case((("scale", 0), ("pool", 69), ("chosen samples", 112), ("swap", 20)), n=2, d=4, seed=168), "exact"),
    # what the fallback put together lay in another memory order than the op's own result
    (Case((("slow", 130), ("overwritten", 78)), n=2, batch_dim=1), "refused"),
    # who is taken depends on how many were taken before
    (Case((("limited", 1), ("scale", 0)), n=4), "refused"),
    (Case((("limited", 39),), t=3), "refused"),
    (Case((("limited", 3),), n=4), "refused"),
    (Case((("limited", 11), ("scale", 0)), n=4), "refused"),
    (Case((("limited", 4),), n=4), "refused"),
    # torch.vmap must not hide that samples were brought together
    (Case((("between samples", 9), ("mapped", 6), ("scale", 36))), "refused"),
    # one sample overwritten by another: a share of the sum is fine, a row per loss is not
    (Case((("overwritten", 5),), n=2), "refused"),
    (Case((("overwritten", 5),), n=2, how=2), "shares refused"),
    # the innermost of two checkpoints of the old kind filled `.grad`
    (Case((("checkpointed", 7), ("checkpointed", 1), ("tied", 30)), n=2), "exact refused"),
    # put in order twice by the same sort, within an expert, which for these data brings them back
    (Case((("scale", 0), ("slow", 236), ("experts", 52), ("paired", 53)), n=2, t=3, d=3, seed=467), "refused"),
    # an op that autocast leaves alone, which we write as products that it does not
    (Case((("autocast", 158), ("paired", 177), ("overloaded product", 200)), n=2, t=1), "exact"),
    # a rule's argument that it does not need, on ragged rows
    (Case((("routed", 123), ("norm", 2)), n=2, d=3), "exact"),
    # rows of the right samples, in an order that the others decided
    (Case((("any axis", 236), ("paired", 213)), n=2, t=3, d=4, batch_dim=2, loss=4, seed=872), "refused"),
    # an alias of lost data, made by a checkpoint without gradients, is no fresh data
    (Case((("algebra", 3), ("without grad", 84), ("checkpointed", 151), ("tied", 123)), n=2), "refused"),
    # streamed: a parameter was done with before its use inside a checkpoint came to light
    (Case((("checkpointed", 225), ("derived weight", 73), ("any axis", 205)), n=2, how=3), "exact"),
    # a parameter without dims does not decide the type of a result, with a row for each sample neither
    (Case((("autocast", 29), ("derived weight", 91), ("residual", 10)), n=2, d=3), "exact"),
    # a row of a buffer that nobody wrote
    (Case((("pool", 231), ("routed", 114), ("detached", 73), ("scale", 36)), n=2, d=4, how=1, seed=452), "exact refused"),
    # a buffer for rows of which there are none
    (Case((("scale", 80), ("routed", 19), ("buffer", 205)), n=2, d=3), "exact"),
    (Case((("tied", 6), ("routed", 221), ("buffer", 177)), n=2, t=4, seed=50), "exact"),
]

# Plain steps that are refused today: after how many variants they come again, which of them, and the reason.
PER_SAMPLE = "transform of torch.func"
GAPS = {
    "mapped": (1, {0}, PER_SAMPLE),
    "expanded weight": (10, {7, 8, 9}, PER_SAMPLE),
    "hypernet": (5, {4}, PER_SAMPLE),
    "convolve": (17, {14}, "conv1d"),
    "looked up": (15, {11, 12}, "take_along_dim|scale_grad_by_freq"),
    # 19 and 20 choose among the positions where those come first, by all samples
    "round trip": (21, {11, 14, 19, 20}, "to_sparse|as_strided|getitem|reshape"),
    "sorted and back": (12, {6, 7}, "gather"),
    # packed sequences whose lengths come from the data
    "recur": (7, {4}, "lost in|cut off by their place"),
    # `buffer[i].copy_(row)` and `buffer.narrow(0, i, 1).copy_(row)`, sample by sample
    "buffer by sample": (12, {2, 4}, "in-place op"),
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("case", "kinds"), FOUND, ids=lambda value: value if isinstance(value, str) else shown(value))
def test_what_was_wrong(case, kinds):
    verdict = judge(case)
    assert verdict.kind in kinds.split(), verdict


@pytest.mark.parametrize("name", PLAIN_STEPS)
def test_every_plain_step_is_exact(name):
    """Alone between two parameters; a gap is refused with its reason."""
    period, variants, reason = GAPS.get(name, (1, set(), ""))
    for k in range(VARIANTS):
        case = alone(name, k)
        verdict = judge(case)
        gap = k % period in variants and verdict.kind == "refused"
        assert verdict.kind == "exact" or (gap and re.search(reason, verdict.said)), f"{verdict}: {shown(case)}"


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_exact_or_refused(name):
    kinds = Counter()
    for k in range(VARIANTS):
        case = alone(name, k, n=2 + k % 2, how=k // 3 % 3)
        verdict = judge(case)
        kinds[verdict.kind] += 1
        assert not verdict.bad, f"{verdict}: {shown(case)}"
    assert kinds["refused"] > 0


def counted(cases):
    """How many of each kind, of programs of which none may be wrong."""
    counts, bad = Counter(), []
    for case in cases:
        verdict = judge(case)
        counts[verdict.kind, verdict.harmful] += 1
        bad += [f"{verdict.kind}, {verdict.said}: {shown(case)}"] * verdict.bad
    assert not bad, "\n".join(bad)
    return counts


def share(part, of):
    return range(part * of // PARTS, (part + 1) * of // PARTS)


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_are_exact_or_refused(part):
    counts = counted(draw(2, index) for index in share(part, PROGRAMS))
    # being exact by refusing everything would be no success
    exact, refused = counts["exact", False], counts["refused", False]
    assert refused <= 0.1 * (exact + refused)
    assert counts["refused", True] > 0


@pytest.mark.parametrize("part", range(PARTS))
def test_traced_programs_are_exact_or_refused(part):
    """A trace that was made of other data gives what the loop gives."""
    counts = counted(draw(1, index).but(how=TRACED, wants=False) for index in share(part, PROGRAMS // 3))
    exact, refused = counts["exact", False], counts["refused", False]
    # what reads a value of the batch
    assert refused <= 0.35 * (exact + refused)


def test_every_step_is_drawn():
    drawn = {name for index in range(3000) for name, _ in draw(0, index).steps}
    assert drawn == set(OPS)


def test_a_program_is_the_same_from_its_seed_and_from_its_line():
    case = draw(7, 11)
    assert case == draw(7, 11) == replayed(shown(case))
    (first, x), (second, y) = case.network(), case.network()
    assert torch.equal(x, y)
    assert torch.equal(first.losses(x), second.losses(y))


def test_the_command_counts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzzing", "--seed", "3", "--programs", "20"])
    assert command.main() == 0
    first = capsys.readouterr().out
    assert re.search(r"^ +20 programs$", first, re.MULTILINE)
    assert command.main() == 0
    assert capsys.readouterr().out == first


def test_the_command_prints_what_failed(monkeypatch, capsys):
    """Every failure is a line that `--replay` takes, and the exit status says that there was one."""
    monkeypatch.setattr(command, "judge", lambda case: judging.Verdict("wrong"))
    monkeypatch.setattr(command, "shrunk", lambda case, kind: case)
    monkeypatch.setattr(sys, "argv", ["fuzzing", "--programs", "2"])
    assert command.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [replayed(line) for line in lines] == [draw(0, 0), draw(0, 1)]
    monkeypatch.setattr(sys, "argv", ["fuzzing", "--replay", lines[0]])
    assert command.main() == 1


# --- the judge itself ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_the_judge_sees_a_wrong_number(how, monkeypatch):
    """A recording whose rows are half as long again is not exact."""
    case = Case((("linear", 1), ("activation", 0)), how=how)
    recorded = judging._recorded
    assert judge(case).kind == "exact"

    def longer(*args):
        rows, grad = recorded(*args)
        return {name: 1.5 * part for name, part in rows.items()}, grad

    monkeypatch.setattr(judging, "_recorded", longer)
    assert judge(case).kind == "wrong"


@pytest.mark.parametrize("how", [0, 1])
def test_the_judge_sees_swapped_rows(how, monkeypatch):
    """Rows that add up to the right total, but of the wrong samples."""
    recorded = judging._recorded

    def swapped(*args):
        rows, grad = recorded(*args)
        return {name: part.flip(0) for name, part in rows.items()}, grad

    monkeypatch.setattr(judging, "_recorded", swapped)
    assert judge(Case((("linear", 1), ("activation", 0)), how=how)).kind == "wrong"


@pytest.mark.parametrize("name", ["statistics", "between samples", "order of samples"])
def test_the_judge_sees_rows_that_mix_samples(name, monkeypatch):
    """Rows for a program that mixes its samples are wrong, even if they add up to the gradient of the batch."""
    case = Case(((name, 0), ("linear", 1)))
    assert judge(case).kind == "refused"
    monkeypatch.setattr(judging, "_recorded", lambda net, case, x: (_equal_shares(net, x), torch.zeros_like(x)))
    assert judge(case).kind == "wrong"


def test_the_judge_sees_the_other_samples_in_a_jacobian(monkeypatch):
    """The Jacobian of a batch whose losses depend on one another is no answer."""
    case = Case((("statistics", 6), ("linear", 1)))
    monkeypatch.setattr(judging, "_recorded", lambda net, case, x: (judging._jacobian(net, case, x)[1], torch.zeros_like(x)))
    assert judge(case).kind == "followed"


def _equal_shares(net, x):
    net.zero_grad()
    losses = net.losses(x.clone())
    losses.sum().backward()
    rows = {name: p.grad.expand(len(losses), *p.shape) / len(losses) for name, p in net.named_parameters()}
    net.zero_grad()
    return {name: part.clone() for name, part in rows.items()}
