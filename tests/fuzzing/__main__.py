"""`python -m tests.fuzzing --seed 0 --minutes 10`: counts, and every failure as a line for `--replay`."""

import argparse
import sys
import time
import warnings
from collections import Counter

import torch

from .judge import judge
from .network import DERIVATIVES, OPS, TRACED
from .search import draw, replayed, shown, shrunk


def main():
    options = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.replay:
        return replay(options.replay)
    counts, failures = search(options)
    report(counts)
    return 1 if failures else 0


def say(*words):
    sys.stdout.write(" ".join(words).rstrip() + "\n")
    sys.stdout.flush()


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="programs are numbered within a seed")
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--programs", type=int, help="how many (default: as many as fit in --minutes)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--derivatives", action="store_true", help="losses made of derivatives by the input")
    parser.add_argument("--traced", action="store_true", help="quantities by a trace of other data")
    parser.add_argument("--replay", metavar="PROGRAM", help="run one program, as printed with a failure")
    return parser.parse_args()


def replay(line):
    verdict = judge(replayed(line))
    say(verdict.kind, verdict.said)
    return 1 if verdict.bad else 0


def search(options):
    """Counts by verdict and failures; stops after `--programs`, or after `--minutes` where that is not given."""
    counts, failures, index = Counter(), 0, options.first
    end = time.monotonic() + 60 * options.minutes
    while index - options.first < options.programs if options.programs else time.monotonic() < end:
        case = draw(options.seed, index)
        case = case.but(how=DERIVATIVES) if options.derivatives else case
        # an ordinary gradient of the input is refused
        case = case.but(how=TRACED, wants=False) if options.traced else case
        verdict = judge(case)
        half = "harmful" if verdict.harmful else "plain"
        counts[f"{half}: {verdict.kind}"] += 1
        if verdict.kind in {"refused", "crashed", "invalid"}:
            counts[f"  {half}: {verdict.kind}: {verdict.said[:110]}"] += 1
        if verdict.bad:
            failures += 1
            show(options.seed, index, case, verdict)
        index += 1
    counts["programs"] = index - options.first
    return counts, failures


def show(seed, index, case, verdict):
    small = shrunk(case, verdict.kind)
    say(f"--- {verdict.kind}: program {index} of seed {seed}: {verdict.said}\n{shown(small)}")


def report(counts):
    for what, count in sorted(counts.items(), key=lambda item: (item[0].startswith("  "), -item[1])):
        say(f"{count:7} {what}")
    say(f"{len(OPS)} kinds of steps")


if __name__ == "__main__":
    sys.exit(main())
