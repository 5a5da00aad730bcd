"""`samplewise`: the command line. Parsing alone lives here, so that `--help` waits for no library."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from samplewise import __version__
from samplewise.errors import SamplewiseError

from .failures import EXTRAS, explain, require
from .options import ScoreOptions

BAD_INPUT = 2
INTERRUPTED = 130

SCORE = """\
Score training samples by loss, gradient norm and, for classifiers, EL2N, in one pass over the data.

Without a target, an embedded example runs: scikit-learn's digits with 5 % of the labels flipped, and a small CNN
trained on the spot. With FILE.py:FUNCTION, that function takes no argument and describes your own training data:

    from samplewise.attribution import ScoreTask

    def per_sample_loss(model, batch):
        inputs, targets = batch
        logits = model(inputs)
        return F.cross_entropy(logits, targets, reduction="none"), logits     # or the losses (n,) alone

    def setup():
        return ScoreTask(model, dataset, per_sample_loss)

The model is scored in evaluation mode. Scores do not depend on the batch size."""

FILES = """\
files, in the directory given by --out:
  scores.parquet   one row per sample in data set order: index, loss, grad_norm (L2, all parameters), grad_norm.GROUP,
                   and for classifiers el2n, target, prediction, probability; each column carries its description
  report.html      histogram, loss against norm, suspects with previews; one file, no network
  run.yaml         options, seed, versions, counts

exit status: 0 done, 2 bad input (one line on stderr says what), 130 interrupted (--resume goes on)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program name; default: those of the process.

    Returns:
        The exit status: 0, 2 on bad input, 130 when interrupted.

    Example:
        >>> main(["score", "--out", "runs/digits"])  # doctest: +SKIP
        0
    """
    options = ScoreOptions(**vars(parser().parse_args(argv)))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # names need not fit the terminal's encoding
    try:
        require(*EXTRAS)
        return int(import_module(".score", __package__).run(options))
    except KeyboardInterrupt:
        return _stop("interrupted: what is scored is kept; the same command with --resume goes on", INTERRUPTED)
    except (SamplewiseError, OSError) as error:
        if options.debug:
            raise
        return _stop(explain(error), BAD_INPUT)


def parser() -> argparse.ArgumentParser:
    """Every option of every command."""
    top = argparse.ArgumentParser(prog="samplewise", description="Exact per-sample gradients for PyTorch models.")
    top.add_argument("--version", action="version", version=f"samplewise {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    score = commands.add_parser(
        "score",
        help="find mislabelled, odd or dominating training samples",
        description=SCORE,
        epilog=FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_score_options(score)
    return top


def _add_score_options(score: argparse.ArgumentParser) -> None:
    add = score.add_argument
    add("target", nargs="?", metavar="FILE.py:FUNCTION", help="what to score (FUNCTION defaults to setup)")
    add("--out", type=Path, metavar="DIR", help="where files go (default: runs/ and the target's name)")
    add("--checkpoint", type=Path, metavar="FILE", help="weights: .safetensors, or .pt holding tensors only")
    add("--batch-size", type=_positive, default=64, metavar="N", help="samples per backward pass (default: 64)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--num-workers", type=_natural, default=0, metavar="N", help="processes that read the data (default: 0)")
    add("--limit", type=_positive, metavar="N", help="score the first N samples only")
    add("--groups", type=_groups, metavar="DEPTH|A,B", help="parameter groups: depth of the module name, or module names")
    add("--rank-by", choices=("el2n", "loss", "grad_norm"), help="what makes a suspect (default: el2n, else grad_norm)")
    add(
        "--top",
        type=_positive,
        default=10,
        metavar="N",
        help="suspects to list (default: 10; the report shows four times as many)",
    )
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="seed set before FILE.py is imported and before FUNCTION is called (default: 0)",
    )
    add("--epochs", type=_natural, default=5, metavar="N", help="training of the embedded example (default: 5)")
    again = score.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-every", type=_seconds, default=5.0, metavar="SECONDS", help="time between savings (default: 5)")
    add("--json", action="store_true", help="print the summary as one JSON object")
    add("--debug", action="store_true", help="show the traceback of an error")


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _seed(text: str) -> int:
    seed = _natural(text)
    if seed >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**64, got {text!r}")
    return seed


def _groups(text: str) -> str:
    if not text.strip(" ,"):
        raise argparse.ArgumentTypeError(f"expected a depth or names of modules, such as 2 or encoder,head; got {text!r}")
    return text


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}") from None


def _stop(line: str, status: int) -> int:
    print(f"samplewise: {line}", file=sys.stderr)
    return status
