"""The benchmark on tiny models: which system gives the loop's numbers where, and what is written of made-up figures."""

import json
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import by_hand
import cells
import compare
import growth
import limits
import workloads
from cells import MIB, Place, Question, first_line, memories
from compare import Cell, judged, markdown, relative_error, rounds, spread, timed, write
from peers import CLIPPED, FLOOR, GRADS, GRAPH, INTO, LOOP, NORMS, OURS, PLAIN, SYSTEMS, TRACED, Problem, System, clip, norms_of

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {
    "mlp": lambda: workloads.mlp(4, 16),
    "cnn": lambda: workloads.cnn(4),
    "resnet": lambda: workloads.resnet(3, 8),
    "gpt": lambda: workloads.gpt(4, 6, 64, 2, 50),
    "gpt-tied": lambda: workloads.gpt(4, 6, 64, 2, 50, tied=True),
    "vit": lambda: workloads.vit(3, 64, 2, 8, 16),
    "lstm": lambda: workloads.lstm(4, 6),
}
IN_PLACE = "raises RuntimeError: Output 0 of BackwardHookFunction is a view and is being modified inplace"
# Everything else is exact.
REFUSED = {
    ("Expanded Weights", "vit"): "raises RuntimeError: Expanded Weights encountered but cannot handle function expand",
    ("Opacus hooks", "resnet"): IN_PLACE,
    ("Opacus ghost", "resnet"): IN_PLACE,
    ("Opacus ghost", "gpt-tied"): "raises NotImplementedError: Parameter tying is not supported",
    ("BackPACK", "resnet"): IN_PLACE,
    ("BackPACK", "gpt"): "leaves no",
    ("BackPACK", "gpt-tied"): "leaves no",
    ("BackPACK", "vit"): "leaves no",
}


@cache
def problem(name: str) -> Problem:
    torch.manual_seed(0)
    made = Problem.of(TINY[name]())
    return replace(made, limit=SYSTEMS[LOOP].methods[NORMS](made).median().item())


@cache
def by_the_loop(name: str, quantity: str):
    return SYSTEMS[LOOP].methods[GRADS if quantity == INTO else quantity](problem(name))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in {PLAIN, LOOP, FLOOR}])
def test_numbers(system, name):
    pytest.importorskip(SYSTEMS[system].needs)
    for quantity in SYSTEMS[system].methods:
        cell = judged((system, quantity), problem(name), by_the_loop(name, quantity), 1e-4)
        if (system, name) in REFUSED:
            assert cell.trouble.startswith(REFUSED[system, name])
        else:
            assert cell.trouble == ""


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != PLAIN])
def test_a_second_step_gives_the_same_and_the_model_is_left_alone(system):
    pytest.importorskip(SYSTEMS[system].needs)
    model = problem("mlp").model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for quantity, method in SYSTEMS[system].methods.items():
        ready = SYSTEMS[system].prepare(problem("mlp"), quantity)
        first, second = method(ready), method(ready)
        assert relative_error(second, first) < 1e-6
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert not any(hasattr(p, mark) for p in model.parameters() for mark in ("grad_sample", "grad_batch", "batch_l2"))


def test_a_part_of_the_gradients_is_clipped():
    ready = problem("mlp")
    norms = by_the_loop("mlp", NORMS)
    assert 0 < (norms > ready.limit).sum() < len(norms)
    grads = by_the_loop("mlp", GRADS)
    assert relative_error(norms_of(grads), norms) < 1e-6
    assert relative_error(clip(grads, ready.limit), by_the_loop("mlp", CLIPPED)) < 1e-5
    plain = SYSTEMS[PLAIN].methods[PLAIN](SYSTEMS[PLAIN].prepare(ready, PLAIN))
    assert relative_error(plain, {name: g.sum(0) for name, g in grads.items()}) < 1e-5


def test_buffers_are_the_callers():
    for system in (OURS, FLOOR):
        ready = SYSTEMS[system].prepare(problem("mlp"), INTO)
        found = SYSTEMS[system].methods[INTO](ready)
        assert {name: g.data_ptr() for name, g in found.items()} == {name: b.data_ptr() for name, b in ready.buffers.items()}


def test_norms_of_large_gradients_keep_their_digits():
    grads = {"weight": torch.randn(1, 3000, 1000), "bias": torch.randn(1, 7), "scale": torch.randn(1)}
    exact = sum(g.double().square().sum() for g in grads.values()).sqrt()
    assert abs(norms_of(grads).item() / exact.item() - 1) < 1e-6


def test_what_is_recorded_of_bad_results(monkeypatch):
    def fails(_):
        raise ValueError("no such layer in /some/where/file.py\nmore")

    systems = {
        "doubles": System({NORMS: lambda p: 2 * by_the_loop("mlp", NORMS)}),
        "nan": System({NORMS: lambda p: by_the_loop("mlp", NORMS) * float("nan")}),
        "fails": System({NORMS: fails}),
        "away": System({NORMS: fails}, needs="no_such_distribution"),
    }
    for name, system in systems.items():
        monkeypatch.setitem(SYSTEMS, name, system)
    found = {name: judged((name, NORMS), problem("mlp"), by_the_loop("mlp", NORMS), 1e-3).trouble for name in systems}
    assert found == {
        "doubles": "wrong numbers (relative error 1)",
        "nan": "wrong numbers (relative error inf)",
        "fails": "raises ValueError: no such layer in ...",
        "away": "not installed",
    }


def test_relative_error():
    x = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([[2.0]])}
    assert relative_error({"a": torch.tensor([3.0, -3.0]), "b": x["b"]}, x) == pytest.approx(0.2)
    assert relative_error({"a": x["a"]}, x) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_first_line():
    assert first_line("bad file /home/someone/x.py, see https://pytorch.org/docs/x\nand more") == (
        "bad file ..., see https://pytorch.org/docs/x"
    )
    assert first_line("") == ""
    assert len(first_line("x" * 500)) == 160


# --- time -----------------------------------------------------------------------------------------------------------------------


def test_rounds(monkeypatch):
    taken = {(PLAIN, PLAIN): 2.0, ("quick", NORMS): 3.0, ("slow", NORMS): 60.0}
    calls = []
    monkeypatch.setattr(compare, "seconds", lambda run, *_: run())
    runs = {method: lambda method=method: calls.append(method) or taken[method] for method in taken}
    found = rounds(runs, repeats=5, budget=100.0, device="cpu")
    assert {method: len(pairs) for method, pairs in found.items()} == {
        (PLAIN, PLAIN): 5,
        ("quick", NORMS): 5,
        ("slow", NORMS): 3,
    }
    assert found["slow", NORMS] == [(60.0, 30.0)] * 3
    # a round that is not counted, and one more call of the plain step before it
    assert [calls.count(method) for method in taken] == [7, 6, 4]
    assert calls[:5] == [(PLAIN, PLAIN), *taken, (PLAIN, PLAIN)]
    assert {len(pairs) for pairs in rounds(runs, repeats=5, budget=-1.0, device="cpu").values()} == {3}


def test_graphs_are_timed_one_at_a_time(monkeypatch):
    """Each keeps the memory of a step."""
    alive, most = [], []

    class Run:
        def __init__(self, method):
            self.method = method
            alive.append(method)
            most.append(sum(system == GRAPH for system, _ in alive))

        def __call__(self):
            return {PLAIN: 2.0, OURS: 3.0, GRAPH: 1.0}[self.method[0]]

        def __del__(self):
            alive.remove(self.method)

    monkeypatch.setattr(compare, "seconds", lambda run, *_: run())
    monkeypatch.setattr(compare, "prepared", lambda method, _: Run(method))
    found = timed([Cell(system, quantity) for system in (OURS, GRAPH) for quantity in (NORMS, CLIPPED)], None, 3, 9.0, "cpu")
    assert [(c.ms, c.ratio[0], c.rounds) for c in found] == [(2e3, 1, 3), *[(3e3, 1.5, 3)] * 2, *[(1e3, 0.5, 3)] * 2]
    assert max(most) == 1


def test_spread():
    assert spread([4.0]) == (4.0, 4.0, 4.0)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


# --- memory ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_in_a_fresh_process():
    sizes = {"n": 64, "width": 256}
    whole = 4 * sum(p.numel() for p in workloads.mlp(**sizes).model.parameters()) * sizes["n"] / MIB
    (found,) = memories([Question(OURS, GRADS, "mlp", sizes)], Place(threads=1))
    assert whole < found["mib"] < 4 * whole
    assert whole < found["live"] < 1.2 * whole


def test_a_process_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(cells, "__file__", str(tmp_path / "cells.py"))
    found = memories([Question(OURS, GRADS, "mlp"), Question(OURS, NORMS, "mlp")], Place(threads=2))
    assert all("can't open file" in answer["trouble"] and str(tmp_path) not in answer["trouble"] for answer in found)


# --- what is written ------------------------------------------------------------------------------------------------------------


def figures(key: str) -> compare.Figures:
    plain = Cell(PLAIN, PLAIN, ms=12.34, ratio=(1.0, 1.0, 1.0), rounds=9, mib=50.0, live=40.0)
    cells = [
        Cell(OURS, NORMS, error=1e-7, ms=15.0, ratio=(1.234, 1.2, 1.3), rounds=9, mib=60.0, live=30.0),
        Cell(TRACED, NORMS, error=1e-7, ms=12.0, ratio=(0.987, 0.9, 1.1), rounds=9, mib=55.0, live=20.0),
        Cell(LOOP, NORMS, error=0.0, ms=600.0, ratio=(48.6, 40.0, 50.0), rounds=3, mib=25.0, live=10.0),
        Cell("vmap(grad)", NORMS, trouble="wrong numbers (relative error 0.5)", error=0.5),
        Cell("BackPACK", NORMS, trouble="raises NotImplementedError: no | here"),
        Cell("BackPACK", GRADS, trouble="raises NotImplementedError: no | here"),
        Cell("Opacus hooks", NORMS, trouble="not installed"),
    ]
    return {"key": key, "name": f"{key} of two layers", "plain": asdict(plain), "cells": [asdict(cell) for cell in cells]}


@pytest.fixture
def conditions(tmp_path):
    given = compare.options_given(["--workloads", "mlp,cnn", "--out", str(tmp_path / "performance")])
    return compare.conditions_of(given, Place())


def test_the_page(conditions):
    page = markdown([figures("mlp"), figures("cnn")], conditions, "performance.png")
    rows = [[entry.strip() for entry in line.split(" | ")] for line in page.splitlines() if line.startswith("| mlp")]
    times, memory, live, *reasons = rows
    assert times[:4] == ["| mlp of two layers (12.3 ms)", NORMS, "1.23 (1.20-1.30)", "0.99 (0.90-1.10)"]
    assert times[4:6] == ["48.6 (40.0-50.0)", ""]
    assert times[6:] == ["wrong numbers", "not installed", "", "raises", "|"]
    assert memory[:6] == ["| mlp of two layers (50 MiB)", NORMS, "1.20", "1.10", "0.50", ""]
    assert live[:6] == ["| mlp of two layers (40 MiB)", NORMS, "0.75", "0.50", "0.25", ""]
    assert ["| mlp", "BackPACK", f"{NORMS}, {GRADS}", "raises NotImplementedError: no \\| here |"] in reasons
    assert "mlp, 3: loop" in page
    assert "| cnn of two layers (12.3 ms)" in page


def test_nothing_of_this_machine_is_written(conditions, tmp_path):
    write([figures("mlp")], conditions, tmp_path / "performance")
    page, data = (tmp_path / "performance.md").read_text(), (tmp_path / "performance.json").read_text()
    assert json.loads(data)["workloads"] == json.loads(json.dumps([figures("mlp")]))
    assert "--workloads mlp,cnn --repeats 9" in page
    for private in (str(tmp_path), str(Path.home()) + "/", sys.prefix):
        assert private not in page + data


def test_the_chart(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    compare.bars([figures("mlp"), figures("cnn")], tmp_path / "performance.png")
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_options():
    assert compare.options_given([]).workloads == list(workloads.WORKLOADS)
    assert compare.options_given(["--device", "cuda"]).workloads == list(workloads.CUDA_WORKLOADS)
    with pytest.raises(SystemExit):
        compare.options_given(["--workloads", "mlp,nothing"])


# --- growth ---------------------------------------------------------------------------------------------------------------------


def made_up_growth():
    """Costs that are powers of the sizes."""

    def cost(sizes, factor):
        return factor * sizes["n"] * sizes["length"] ** 2 * sizes["width"] ** 1.5 * sizes["layers"] ** 0.5

    return [
        {"sizes": s, **{measure: {m: cost(s, i + 1) for i, m in enumerate(growth.METHODS)} for measure in growth.MEASURES}}
        for s in growth.points(growth.BASE, growth.SWEEPS)
    ]


def test_slopes_of_made_up_powers(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    results = made_up_growth()
    fitted = growth.slopes(results, growth.BASE)
    for by_method in fitted.values():
        for by_sweep in by_method.values():
            assert by_sweep == pytest.approx({"n": 1, "length": 2, "width": 1.5, "layers": 0.5})
    assert "| norms | 1.00 | 2.00 | 1.50 | 0.50 | 1.00 | 2.00 | 1.50 | 0.50 |" in growth.markdown(fitted, "here", "growth.png")
    growth.plots(results, growth.BASE, fitted, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_growth_measures_each_point_once():
    every = growth.points(growth.BASE, growth.SWEEPS)
    assert len(every) == sum(len(values) for values in growth.SWEEPS.values()) - 3
    assert sum(sizes == growth.BASE for sizes in every) == 1
    assert all(growth.BASE[sweep] in values for sweep, values in growth.SWEEPS.items())


def test_growth_times():
    sizes = {"n": 2, "length": 4, "width": 16, "layers": 1, "vocabulary": 11}
    found = growth.times(sizes, Place(threads=1), repeats=1)
    assert found.keys() == growth.METHODS.keys()
    assert all(taken > 0 for taken in found.values())


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt-tied"])
def test_limits_have_all_parts(name: str, monkeypatch) -> None:
    monkeypatch.setitem(cells.WORKLOADS, name, TINY[name])
    title, ms, ratios = limits.measured(name, Place(threads=1), 1)
    assert ms > 0
    assert all(ratio > 0 for ratio in ratios.values())
    assert limits.line(title, ms, ratios).count("|") == len(limits.COLUMNS) + 2


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_the_step_by_hand_is_right(name: str) -> None:
    given = problem(name)
    norms = SYSTEMS[OURS].methods[NORMS](given)
    given = replace(given, limit=norms.median().item())
    assert by_hand.ByHand.covers(given)
    hand, expected = by_hand.ByHand(given), SYSTEMS[OURS].methods[CLIPPED](given)
    torch.testing.assert_close(hand.norms(), norms)
    for _ in range(2):
        # the small ones are one tensor there
        sums = torch.cat([x.flatten() for x in hand.clipped()]).sort().values
        torch.testing.assert_close(sums, torch.cat([x.flatten() for x in expected.values()]).sort().values)


@pytest.mark.parametrize("name", [name for name in TINY if name not in {"cnn", "resnet"}])
def test_other_networks_have_no_step_by_hand(name: str) -> None:
    assert not by_hand.ByHand.covers(problem(name))


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_problem_has_the_plain_loss_and_a_backward_without_weight_gradients(name: str) -> None:
    given = problem(name)
    frozen = limits.frozen(given)
    total = frozen.total()
    torch.testing.assert_close(total, given.total())
    total.backward()
    assert all(p.grad is None and not p.requires_grad for p in frozen.model.parameters())
    assert all(p.requires_grad for p in given.model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_the_factors_timed_alone_are_those_of_the_plain_step(name: str) -> None:
    given = problem(name)
    kept = limits.factors_of(SYSTEMS[OURS].prepare(given, NORMS))
    assert set(kept) == {name for name, _ in given.model.named_parameters()}
    weights = torch.ones(given.n)
    sums = {name: factor.weighted_sum(weights) for name, factor in kept.items()}
    assert relative_error(sums, SYSTEMS[PLAIN].methods[PLAIN](given)) < 1e-4
