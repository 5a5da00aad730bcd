"""Draws programs, and makes a failing one as small as it can."""

import json
import random

from . import ops_axes, ops_layers, ops_memory, ops_rows, ops_spelled, regions, traps
from .judge import judge
from .network import LOSSES, OPS, Case

__all__ = ["PLAIN_STEPS", "REACHED", "TRAPS", "alone", "draw", "families", "replayed", "shown", "shrunk"]

PLAIN_STEPS = [name for name, op in OPS.items() if not op.harmful]
# what chooses a step's variant and parameters
KINDS = 240
TRAPS = [name for name, op in OPS.items() if op.harmful]
# moves are drawn often, so that all layouts are reached
MOVES = ["swap", "merge", "split", "pool", "lengthen", "to image", "from image", "merge the other way"]


def families():
    """The files that hold the steps."""
    return [module.__name__ for module in (ops_rows, ops_axes, ops_layers, ops_memory, ops_spelled, regions, traps)]


def draw(seed, index, *, harmful=None):
    """Program number `index` of a seed; every second one has a step that may mix samples."""
    rng = random.Random(f"{seed}:{index}")
    harmful = index % 2 == 1 if harmful is None else harmful
    count = rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8])
    steps = [(rng.choice(PLAIN_STEPS if rng.random() < 0.75 else MOVES), rng.randrange(KINDS)) for _ in range(count)]
    # a parameter before, after, or both
    ends = rng.choice([(True, False), (False, True), (True, True)])
    steps = [*[_with_parameter(rng)] * ends[0], *steps, *[_with_parameter(rng)] * ends[1]]
    if harmful:
        steps.insert(rng.randrange(len(steps) + 1), (rng.choice(TRAPS), rng.randrange(KINDS)))
    return Case(
        tuple(steps),
        n=rng.choice([3, 2, 4, 3, 2, 1]),
        t=rng.choice([3, 2, 4, 1]),
        d=rng.choice([3, 2, 4]),
        batch_dim=rng.choice([0, 0, 1, 2]),
        loss=rng.randrange(len(LOSSES)),
        how=rng.choice([0, 0, 0, 1, 2, 3]),
        frozen=rng.random() < 0.2,
        wants=rng.random() < 0.2,
        seed=rng.randrange(1000),
    )


def _with_parameter(rng):
    return rng.choice(
        [("any axis", rng.randrange(KINDS)), ("scale", 0), ("scale", 1), ("scale", 36), ("tied", rng.randrange(KINDS))]
    )


# how each layout is reached from an input
REACHED = {
    "BTD": (0, ()),
    "TBD": (1, ()),
    "TDB": (2, ()),
    "BD": (0, (("pool", 0),)),
    "DB": (0, (("pool", 0), ("swap", 0))),
    "BCT": (0, (("swap", 1),)),
    "BCHW": (0, (("to image", 0),)),
    "MD": (0, (("merge", 0),)),
    "XD": (1, (("merge", 0),)),
}


def alone(name, k, **sizes):
    """One variant of one step between two parameters, in one of its layouts (or the one given)."""
    layouts = [layout for layout in OPS[name].layouts if layout in REACHED]
    batch_dim, moves = REACHED[sizes.pop("layout", layouts[k % len(layouts)])]
    body = (("any axis", 5),) * (1 + k % 3) if OPS[name].region else ()
    return Case(
        (("scale", 0), *moves, (name, k), *body, ("scale", 1)),
        batch_dim=batch_dim,
        **{"n": 3, "t": 3, "d": 3, "seed": 5, **sizes},
    )


def shrunk(case, kind):
    """The smallest case found that still gets this kind of verdict."""
    going = True
    while going:
        going = False
        for smaller in _smaller(case):
            if judge(smaller).kind == kind:
                case, going = smaller, True
                break
    return case


def _smaller(case):
    for i in range(len(case.steps)):
        yield case.but(steps=case.steps[:i] + case.steps[i + 1 :])
    for name, plain in {
        "how": 0,
        "frozen": False,
        "wants": False,
        "loss": 0,
        "batch_dim": 0,
        "n": 2,
        "t": 2,
        "d": 2,
        "seed": 0,
    }.items():
        if getattr(case, name) != plain:
            yield case.but(**{name: plain})


def shown(case):
    """One line that `--replay` takes."""
    return json.dumps(case.fields())


def replayed(line):
    return Case.of(json.loads(line))
