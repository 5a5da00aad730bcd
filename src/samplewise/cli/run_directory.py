"""The directory of a run: what is kept while it goes, what it leaves, when it may go on."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from . import table
from .failures import InputError
from .files import write_text
from .table import ScoreTable

Facts = dict[str, Any]  # what run.yaml holds


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files.

    While it goes, finished samples lie in `.partial/` as Parquet shards named after their range. A shard appears whole
    or not at all, so after a kill the next one starts where the last one ends.
    """

    path: Path

    @property
    def scores(self) -> Path:
        """One row per sample."""
        return self.path / "scores.parquet"

    @property
    def report(self) -> Path:
        """For people."""
        return self.path / "report.html"

    @property
    def record(self) -> Path:
        """The run's options and counts; the first file of a run and the last one to change."""
        return self.path / "run.yaml"

    @property
    def working(self) -> Path:
        """Kept until the run is finished."""
        return self.path / ".partial"

    def create(self) -> None:
        """Make the directory and see that files can be written, before any work is done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise InputError(f"cannot write to the directory {self.path}: {error.strerror}") from error

    def found(self, settings: Facts, *, resume: bool, overwrite: bool) -> Facts | None:
        """The run that is there and goes on or is finished; None where one is to be started. Nothing is changed.

        Returns:
            What run.yaml holds: `status`, `settings` and, once known, the rest.

        Raises:
            InputError: if a run is there that should neither be replaced nor continued, or cannot be.
        """
        held, facts = self.held(), self._facts()
        if resume and facts is not None and (held or facts["settings"] == settings):
            refuse_changes(self.path, facts["settings"], settings)
            return facts
        if held and resume:
            raise InputError(f"{self.path} holds {', '.join(held)}, but not of a run that can go on: use --overwrite")
        if held and not overwrite:
            raise InputError(
                f"{self.path} already holds {', '.join(held)}: go on with --resume, replace them with --overwrite, "
                "or choose another --out"
            )
        return None

    def start(self, settings: Facts) -> Facts:
        """Start a run in the place of the one that is there; what run.yaml holds."""
        # run.yaml goes first: a kill in between leaves a directory that holds no run.
        for path in (self.record, self.scores, self.report):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.working, ignore_errors=True)
        self.working.mkdir()
        facts = {"status": "running", "settings": settings}
        self.write_facts(facts)
        return facts

    def held(self) -> list[str]:
        """What a new start would destroy; a run that failed before its first score is worth nothing."""
        held = [path.name for path in (self.record, self.scores, self.report) if path.exists()]
        facts = self._facts()
        failed_early = held == [self.record.name] and facts is not None and facts["status"] == "running" and not self.done()
        return [] if failed_early else held

    def write_facts(self, facts: Facts) -> None:
        """Write run.yaml."""
        write_text(self.record, yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))

    def save_shard(self, shard: ScoreTable) -> None:
        """Keep finished samples."""
        index = shard.columns["index"]
        table.write(self.working / f"{int(index[0]):012d}-{int(index[-1]) + 1:012d}.parquet", shard)

    def drop_damaged(self) -> int:
        """Drop the shards from the first one on that is missing or damaged, so that their samples are scored again.

        Returns:
            How many were dropped.
        """
        self.working.mkdir(exist_ok=True)
        shards, done = self._shards(), 0
        for position, shard in enumerate(shards):
            start, stop = map(int, shard.stem.split("-"))
            if start != done or not _holds(shard, range(start, stop)):
                for lost in shards[position:]:
                    lost.unlink()
                return len(shards) - position
            done = stop
        return 0

    def done(self) -> int:
        """How many samples are finished."""
        shards = self._shards()
        return int(shards[-1].stem.split("-")[1]) if shards else 0

    def merged(self) -> ScoreTable:
        """All finished samples, each once and in data set order, or an error."""
        whole = table.concatenate([table.read(shard) for shard in self._shards()])
        if not torch.equal(whole.columns["index"], torch.arange(self.done())):
            raise InputError(f"{self.working} does not hold every sample exactly once; start again with --overwrite")
        return whole

    def finish(self, facts: Facts) -> None:
        """Mark the run as finished, then drop what is no longer needed."""
        self.write_facts({**facts, "status": "finished"})
        shutil.rmtree(self.working, ignore_errors=True)

    def _facts(self) -> Facts | None:
        """What run.yaml holds, if it is there and ours."""
        try:
            facts = yaml.safe_load(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
            return None
        ours = isinstance(facts, dict) and "status" in facts and isinstance(facts.get("settings"), dict)
        return facts if ours else None

    def _shards(self) -> list[Path]:
        return sorted(self.working.glob("*-*.parquet"))


def _holds(shard: Path, samples: range) -> bool:
    try:
        index = table.read(shard).columns["index"]
    except InputError:
        return False
    return torch.equal(index, torch.arange(samples.start, samples.stop))


def refuse_changes(path: Path, before: Facts, now: Facts) -> None:
    """Raise `InputError` naming every setting that differs."""
    changed = [
        f"{name.replace('_', ' ')} (was {before.get(name)}, is {now.get(name)})"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(f"cannot resume {path}: it has another {', '.join(changed)}; --overwrite starts again")
