"""Every rule on every option of its op, against a batch-of-one loop; and no option of a rule without a sample."""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samples
import samplewise as sw
from samples import EXACT, OWN, SLOW, Op, ids, p, s, x
from samplewise import testing
from samplewise.factors import Dense
from samplewise.registry import EXPANSIONS, RULES

# Options that are refused: (rule, argument) -> (the call, the error, what its message says)
REFUSED = {
    ("embedding", "scale_grad_by_freq"): (
        F.embedding,
        s(ids(3, 4), p(5, 2), scale_grad_by_freq=True),
        sw.UnsupportedOpError,
        "counts over the batch",
    ),
    ("embedding", "max_norm"): (F.embedding, s(ids(3, 4), p(5, 2), max_norm=1.0), sw.MixedSamplesError, "max_norm"),
    ("batch_norm", "training"): (
        F.batch_norm,
        s(x(3, 4), None, None, p(4), p(4), training=True),
        sw.MixedSamplesError,
        "mix the samples",
    ),
    ("batch_norm", "momentum"): (F.batch_norm, s(x(3, 4), None, None, training=True), sw.MixedSamplesError, "mix the samples"),
}


def cases(table: list[tuple[Op, list[testing.Sample]]]) -> Iterator[object]:
    for op, calls in table:
        for k, call in enumerate(calls):
            yield pytest.param(op, call, id=f"{op.__name__}-{k}")


@pytest.mark.parametrize(("op", "call"), cases(EXACT))
@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:Sparse")
def test_by_rule(op: Op, call: testing.Sample) -> None:
    testing.check_rule(op, [call])


@pytest.mark.parametrize(("op", "call"), cases(SLOW))
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using a target size", "ignore:torch.chain_matmul")
def test_by_the_fallback(op: Op, call: testing.Sample) -> None:
    testing.check_rule(op, [call], fallback="allow")


def single(value: Tensor) -> Tensor:
    """A sample's tensor in single precision, as what it was."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    shorter = value.detach().to(torch.complex64 if value.is_complex() else torch.float32)
    return nn.Parameter(shorter) if isinstance(value, nn.Parameter) else shorter


@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "under autocast"])
@pytest.mark.parametrize(("op", "call"), cases([*EXACT, *SLOW]))
@pytest.mark.filterwarnings("ignore")
def test_results_are_those_of_the_op(op: Op, call: testing.Sample, cast: bool) -> None:
    """The model must not see that it is recorded: types, shapes, memory order and values, also where autocast chooses the type."""
    new = {id(x): single(x) for _, x in testing._named(call) if isinstance(x, Tensor)}
    args, kwargs = testing._swapped((call.args, dict(call.kwargs)), new)
    batched = [new[id(x)] for x in testing._batched(call)]

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        out = op(*args, **kwargs)
        return [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]

    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        try:
            plain = results()
        except RuntimeError as error:
            pytest.skip(f"not for single precision: {error}")
        model = nn.ParameterList([x for x in new.values() if isinstance(x, nn.Parameter)])
        with sw.record(model, batch_size=call.n, batch_dim=call.batch_dim) as rec:
            for x in batched:
                rec.batched(x, call.batch_dim)
            for key in call.constant:
                rec.constant(kwargs[key] if isinstance(key, str) else args[key])
            recorded = results()
    for found, wanted in zip(recorded, plain, strict=True):
        assert (found.dtype, found.shape, found.layout) == (wanted.dtype, wanted.shape, wanted.layout)
        assert found.layout != torch.strided or found.stride() == wanted.stride()
        torch.testing.assert_close(
            found.to_dense(), wanted.to_dense(), rtol=0.03 if cast else 1e-4, atol=0.03 if cast else 1e-5
        )


@pytest.mark.parametrize(("op", "call"), cases(OWN))
def test_parameters_with_rows_for_each_sample(op: Op, call: testing.Sample) -> None:
    """A batch of one is another function here, so the truth is the gradient of each sample's loss in the whole batch."""
    model = nn.ParameterList([x for x in call.args if isinstance(x, nn.Parameter)])
    batched = [x for x in call.args if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and _carries(x, call)]

    def losses() -> Tensor:
        out = op(*call.args, **call.kwargs)
        out = out.movedim([d for d in range(out.ndim) if out.shape[d] == call.n][_axis_of_result(out, call)], 0)
        return (out * (out.cos() + 1.5)).flatten(1).sum(1) if out.ndim > 1 else out * out.cos()

    with sw.record(model, batch_size=call.n, batch_dim=call.batch_dim) as rec:
        for tensor in batched:
            rec.batched(tensor, call.batch_dim)
        rec.backward(losses())
    plain = losses()
    for k, parameter in enumerate(model):
        rows = [torch.autograd.grad(plain[i], parameter, retain_graph=True)[0] for i in range(call.n)]
        torch.testing.assert_close(rec.grads()[str(k)], torch.stack(rows))


def _carries(x: Tensor, call: testing.Sample) -> bool:
    return x.ndim > call.batch_dim and x.shape[call.batch_dim] == call.n


def _axis_of_result(out: Tensor, call: testing.Sample) -> int:
    """Which of the axes of size n has the samples: the first, or the one `batch_dim` names."""
    return call.batch_dim if out.shape.count(call.n) > 1 and call.batch_dim else 0


@pytest.mark.parametrize(("rule", "argument"), REFUSED)
def test_refused_options_say_why(rule: str, argument: str) -> None:
    op, call, error, says = REFUSED[rule, argument]
    parameters = [x for x in [*call.args, *call.kwargs.values()] if isinstance(x, nn.Parameter)]
    model = nn.ParameterList(parameters)
    with pytest.raises(error, match=says), sw.record(model, batch_size=call.n) as rec:
        rec.backward(op(*call.args, **call.kwargs).flatten(1).sum(1))


# --- the meta-test ------------------------------------------------------------------------------------------------------------


def used_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[object]]:
    """What every argument of every rule was, whenever a gradient was asked of the rule."""
    seen: dict[tuple[str, str], list[object]] = {}
    for key, rule in list(RULES.items()):

        def spy(*args: object, _key: str = key, _function: Op = rule.function, **kwargs: object) -> object:
            bound = inspect.signature(_function).bind(*args, **kwargs).arguments
            for name, value in bound.items():
                seen.setdefault((_key, name), []).append(value)
            return _function(*args, **kwargs)

        monkeypatch.setitem(RULES, key, replace(rule, function=functools.wraps(rule.function)(spy)))
    for op, calls in EXACT:
        for call in calls:
            testing._check(op, call, "error")
    return seen


def without_sample(seen: dict[tuple[str, str], list[object]]) -> list[str]:
    missing = []
    for key, rule in RULES.items():
        for name, parameter in list(inspect.signature(rule.function).parameters.items())[2:]:
            values = seen.get((key, name), [])
            other = [v for v in values if isinstance(v, Tensor | list) or v != parameter.default]
            one_sided = isinstance(values[0], bool) and len(set(values)) == 1 if values else True
            plain = parameter.default is inspect.Parameter.empty and one_sided and isinstance((values or [None])[0], bool)
            if (not other or plain) and (key, name) not in REFUSED:
                missing.append(f"{key}: {name}")
    return missing


def test_every_argument_of_every_rule_is_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_sample(used_arguments(monkeypatch)) == []


def test_a_rule_without_samples_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(grad: Tensor, out: None, input: Tensor, weight: Tensor, power: int = 1) -> dict[str, Dense]:
        return {"weight": Dense(grad * input)}

    monkeypatch.setitem(
        RULES, "mylib.scale", replace(RULES["embedding"], function=scale, arguments=("input", "weight", "power"))
    )
    seen = {
        (key, name): [None, "x", True, False] for key, rule in RULES.items() for name in rule.arguments if key != "mylib.scale"
    }
    assert {"mylib.scale: input", "mylib.scale: weight", "mylib.scale: power"} <= set(without_sample(seen))


def test_no_table_is_forgotten() -> None:
    tables = [
        v
        for k, v in vars(samples).items()
        if isinstance(v, list) and v and isinstance(v[0], tuple) and k not in {"EXACT", "SLOW", "OWN"}
    ]
    assert sum(map(len, tables)) == len(EXACT)


def test_frozen_arguments_cost_nothing() -> None:
    weight, bias = p(2, 4), p(2)
    weight.requires_grad_(False)
    model = nn.ParameterDict({"weight": weight, "bias": bias})
    rows = x(3, 4)
    with sw.record(model, batch_size=3) as rec:
        rec.backward(F.linear(rows, model["weight"], model["bias"]).square().sum(1))
    assert list(rec.grads()) == ["bias"]
    assert [row.parameter for row in rec.coverage().rows] == ["bias"]


def test_third_parties_extend_with_rule() -> None:
    library = torch.library.Library("trust", "FRAGMENT")
    library.define("scale(Tensor x, Tensor weight) -> Tensor")
    library.impl("scale", lambda x, weight: x * weight, "CompositeImplicitAutograd")
    before = dict(RULES)

    def scale(grad: Tensor, out: None, x: Tensor, weight: Tensor) -> dict[str, Dense]:
        return {"weight": Dense((grad * x).flatten(1, -2).sum(1) if grad.ndim > 2 else grad * x)}

    try:
        sw.rule(torch.ops.trust.scale)(scale)
        with pytest.raises(ValueError, match="already has a rule"):
            sw.rule(torch.ops.trust.scale)(scale)
        testing.check_rule(torch.ops.trust.scale, [s(x(3, 4), p(4)), s(x(3, 5, 4), p(4))])
    finally:
        RULES.clear()
        RULES.update(before)


def test_third_parties_extend_with_expand() -> None:
    library = torch.library.Library("trust", "FRAGMENT")
    library.define("affine(Tensor x, Tensor weight, Tensor bias) -> Tensor")
    library.impl("affine", lambda x, weight, bias: x * weight + bias, "CompositeImplicitAutograd")
    before = dict(EXPANSIONS)
    try:
        sw.expand(torch.ops.trust.affine)(lambda x, weight, bias: x * weight + bias)
        testing.check_rule(torch.ops.trust.affine, [s(x(3, 4), p(4), p(4)), s(x(3, 3, 4), p(1, 4), p(3, 1))])
    finally:
        EXPANSIONS.clear()
        EXPANSIONS.update(before)
