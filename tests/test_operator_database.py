"""A sweep over PyTorch's operator database: exact against a batch-of-one loop, or refused.

A seeded part of the cases; `SAMPLEWISE_OPERATORS=all` judges all of them, as `python -m tests.operator_database` does.
"""

import os

import pytest

import operator_database as database
from samplewise import remembered, sample_axis
from samplewise.registry import RULES, Rule
from samplewise.rules.linear import linear

PARTS = 12
# calls of each op, and cases of each call
SAMPLES, PER_SAMPLE = (12, 10**6) if os.environ.get("SAMPLEWISE_OPERATORS") == "all" else (4, 8)


def _bugs(tally):
    return [f"{bug.kind}: {bug.detail}: {bug.case}" for bug in tally.bugs()]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_exact_or_refused(part):
    tallies = [database.tally(op, samples=SAMPLES, per_sample=PER_SAMPLE) for op in database.operators()[part::PARTS]]
    bugs = [bug for tally in tallies for bug in _bugs(tally)]
    assert not bugs, "\n".join(bugs)
    exact = sum(verdict.kind == "exact" for tally in tallies for verdict in tally.verdicts)
    assert exact > 100


def _tally(name, samples=5, per_sample=20):
    (op,) = [op for op in database.operators() if database.name_of(op) == name]
    return database.tally(op, samples=samples, per_sample=per_sample)


def _kinds(name):
    return {verdict.kind for verdict in _tally(name).verdicts}


def test_the_judge_sees_a_wrong_rule(monkeypatch):
    right = RULES["linear"]
    doubled = Rule(lambda grad, *args, **kwargs: linear(2 * grad, *args, **kwargs), right.arguments, right.saves)
    assert "WRONG" not in _kinds("nn.functional.linear")
    monkeypatch.setitem(RULES, "linear", doubled)
    assert "WRONG" in _kinds("nn.functional.linear")


@pytest.fixture
def keep_axis(monkeypatch):
    """Let an op wrongly keep the sample axis, and nothing of that be remembered."""

    def keep(name):
        monkeypatch.setattr(remembered, "_FOLLOWED", {})
        monkeypatch.setitem(sample_axis.SINGLE, name, lambda call, x, axis, out: axis)

    return keep


def test_the_judge_sees_mixed_samples(keep_axis):
    assert not _kinds("cumsum") & set(database.BUGS)
    keep_axis("cumsum")
    assert "MIXED" in _kinds("cumsum")


def test_the_judge_sees_a_wrong_axis(keep_axis):
    keep_axis("transpose")
    assert set(database.BUGS) & _kinds("transpose")
