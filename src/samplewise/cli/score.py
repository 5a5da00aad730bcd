"""`samplewise score`: from options to files."""

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

import torch

from samplewise import __version__
from samplewise.attribution import BatchScores, Groups, ScoreTask, group_parameters, score_batches, trainable
from samplewise.attribution.neighbours import rounding

from . import checkpoint, digits, fingerprint, setup_file, table
from .failures import InputError, user_code
from .files import locked, write_text
from .options import ScoreOptions
from .printed import show
from .progress import progress
from .report import render
from .run_directory import Facts, RunDirectory, refuse_changes
from .summary import Summary, as_json, summarize
from .table import ScoreTable


def run(options: ScoreOptions) -> int:
    """Score, write the files, print the summary; the exit status.

    Raises:
        InputError: if something the user gave cannot be used.
    """
    _device(options.device)  # a missing one is better noticed now than after the set-up
    directory = RunDirectory(options.out or _default_out(options.target))
    # With --json, stdout belongs to the JSON alone, whatever the user's code prints.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        directory.create()
        with locked(directory.path):
            scores, summary = _finished_run(options, directory)
    if options.json:
        print(json.dumps(as_json(summary), allow_nan=False))
    else:
        show(summary, scores)
    return 0


def _finished_run(options: ScoreOptions, directory: RunDirectory) -> tuple[ScoreTable, Summary]:
    settings = fingerprint.settings(options)
    facts = directory.found(settings, resume=options.resume, overwrite=options.overwrite)
    if facts is not None and facts["status"] == "finished":
        _note(f"{directory.path} is finished, nothing is left to score")
        directory.finish(facts)  # a kill may have left something to drop
        scores = table.read(directory.scores)
        return scores, _summarize(options, directory, scores, facts["name"])
    if facts is not None and (lost := directory.drop_damaged()):
        _note(f"{lost} files of scores are damaged, or one before them is missing: their samples are scored again")
    task = _load_task(options, None if facts is None else _weights(directory))
    contents = _contents(options, task)
    if facts is None:
        facts = _started(options, directory, settings, task, contents["samples"])
    facts = _with_contents(options, directory, facts, task, contents)
    started, resumed_at = time.monotonic(), directory.done()
    _require_same_scores(options, directory, task)
    _score_rest(options, directory, task, contents["samples"])
    scores = _with_known(directory.merged(), task)
    facts |= {"counts": _counts(scores), **_facts_of_run(options, started, resumed_at)}
    return scores, _write(options, directory, scores, task, facts)


def _load_task(options: ScoreOptions, weights: Path | None) -> ScoreTask:
    """The task; of the embedded example with these weights, where they were kept."""
    if options.target is None:
        if options.checkpoint:
            raise InputError("--checkpoint needs a target FILE.py:FUNCTION: the embedded example trains its own model")
        return digits.task(seed=options.seed, epochs=options.epochs, weights=weights)
    task = setup_file.find(options.target).task(options.seed)
    if options.checkpoint:
        checkpoint.load(task.model, options.checkpoint)
    return task


def _started(options: ScoreOptions, directory: RunDirectory, settings: Facts, task: ScoreTask, samples: int) -> Facts:
    """Start a run; one that is there is dropped only when the first batch of the new one can be scored."""
    if directory.held():
        next(_batches(options, task, range(samples)))
    facts = directory.start(settings)
    if options.target is None:
        digits.keep(task.model, _weights(directory))
    return facts


def _weights(directory: RunDirectory) -> Path:
    return directory.working / "model.safetensors"


def _contents(options: ScoreOptions, task: ScoreTask) -> Facts:
    with user_code("reading the data set failed"):
        contents = fingerprint.contents(task, min(len(task.dataset), options.limit or len(task.dataset)))
    if contents["data"] == "random":
        _note("reading the same item twice gave two values: scores will depend on the data set's random draws")
    return contents


def _with_contents(options: ScoreOptions, directory: RunDirectory, facts: Facts, task: ScoreTask, contents: Facts) -> Facts:
    """Note what model and data hold, or see that they hold what they did when the run was started."""
    if "contents" in facts:
        refuse_changes(directory.path, facts["contents"], contents)
    facts = {**facts, "name": str(task.name or options.target), "contents": contents}
    directory.write_facts(facts)
    return facts


def _require_same_scores(options: ScoreOptions, directory: RunDirectory, task: ScoreTask) -> None:
    """Score the last kept samples again: what the loss imports, or data in between, may have changed since."""
    done = directory.done()
    if not done:
        return
    last = range(max(0, done - options.batch_size), done)
    kept = {name: values[last.start :] for name, values in directory.merged().columns.items()}
    first, second = (table.from_batches(list(_batches(options, task, last))).columns for _ in range(2))
    allowed = rounding(task.model)
    random = table.differing(first, second, allowed)
    if random:
        _note(f"scoring the same samples twice gave two values of {', '.join(random)}: they depend on random draws")
    changed = [name for name in table.differing(kept, first, allowed) if name not in random]
    if changed:
        raise InputError(
            f"cannot resume {directory.path}: scored again, samples {last.start} ... {done - 1} have another "
            f"{', '.join(changed)}. Has the loss, a module it imports, the data or the model changed? Nothing is lost: "
            "--resume goes on once they are as they were; otherwise choose another --out, or start again with --overwrite"
        )


def _batches(options: ScoreOptions, task: ScoreTask, samples: range) -> Iterator[BatchScores]:
    batches = score_batches(
        task,
        start=samples.start,
        stop=samples.stop,
        batch_size=options.batch_size,
        device=_device(options.device),
        groups=_groups(options.groups, task),
        num_workers=options.num_workers,
    )
    return _guarded(batches, options)


def _score_rest(options: ScoreOptions, directory: RunDirectory, task: ScoreTask, samples: int) -> None:
    """Score the samples no shard holds yet, saving now and then and when interrupted."""
    done = directory.done()
    unsaved: list[BatchScores] = []
    saved_at = time.monotonic()
    batches = _batches(options, task, range(done, samples))
    with progress("scoring", samples, done=done) as advance:
        try:
            for batch in batches:
                unsaved.append(batch)
                advance(batch.stop - batch.start)
                if time.monotonic() - saved_at >= options.save_every:
                    _save(directory, unsaved)
                    saved_at = time.monotonic()
        finally:
            _save(directory, unsaved)


def _guarded(batches: Iterator[BatchScores], options: ScoreOptions) -> Iterator[BatchScores]:
    """The same batches, errors in the user's code and want of memory put in one line."""
    while True:
        try:
            with user_code("scoring failed"):
                batch = next(batches, None)
        except InputError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise InputError(
                    f"out of memory with --batch-size {options.batch_size}: use a smaller one with --resume, "
                    "scores do not depend on it"
                ) from error
            raise
        if batch is None:
            return
        yield batch


def _save(directory: RunDirectory, unsaved: list[BatchScores]) -> None:
    if unsaved:
        directory.save_shard(table.from_batches(unsaved))
        unsaved.clear()


def _write(options: ScoreOptions, directory: RunDirectory, scores: ScoreTable, task: ScoreTask, facts: Facts) -> Summary:
    """Write every file; run.yaml, which says that the run is finished, comes last."""
    summary = _summarize(options, directory, scores, facts["name"])
    table.write(directory.scores, scores)
    write_text(directory.report, render(scores, task, summary, facts, options.top))
    directory.finish(facts)
    return summary


def _summarize(options: ScoreOptions, directory: RunDirectory, scores: ScoreTable, name: str) -> Summary:
    files = {"scores": directory.scores, "report": directory.report, "run": directory.record}
    return summarize(scores, name=name, ranked_by=options.rank_by, top=options.top, files=files)


def _with_known(scores: ScoreTable, task: ScoreTask) -> ScoreTable:
    """The table with what the task knows about classes and wrong labels."""
    columns = dict(scores.columns)
    if len(task.known_mislabelled):
        columns["known_mislabelled"] = torch.isin(columns["index"], torch.tensor(list(task.known_mislabelled)))
    return ScoreTable(columns, scores.coverage, [str(name) for name in task.class_names])


def _counts(scores: ScoreTable) -> Facts:
    return {
        "samples": len(scores),
        "trainable_parameters": scores.coverage.elements,
        "known_mislabelled": len(scores.mislabelled),
    }


def _facts_of_run(options: ScoreOptions, started: float, resumed_at: int) -> Facts:
    return {
        "options": {"batch_size": options.batch_size, "device": str(_device(options.device)), "seed": options.seed},
        "versions": {"samplewise": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "system": platform.platform(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_scoring": round(time.monotonic() - started, 2),
        "resumed_at_sample": resumed_at,
    }


def _groups(wanted: str | None, task: ScoreTask) -> Groups:
    names = trainable(task.model)
    if wanted is None:
        return group_parameters(names)
    if wanted.isdecimal() and int(wanted) > 0:
        return group_parameters(names, depth=int(wanted))
    return group_parameters(names, prefixes=[prefix for prefix in wanted.split(",") if prefix])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _default_out(target: str | None) -> Path:
    return Path("runs", Path(target.rsplit(":", 1)[0]).stem if target else "digits")


def _note(line: str) -> None:
    print(f"samplewise: {line}", file=sys.stderr)
