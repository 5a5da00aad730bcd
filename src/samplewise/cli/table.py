"""The table of scores and its Parquet file: one row per sample, every column described in the file itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from samplewise.attribution import RANKINGS, BatchScores, Coverage
from samplewise.attribution.neighbours import alike

from .failures import InputError
from .files import atomically

DESCRIPTIONS = {
    "index": "position of the sample in the data set",
    "loss": "the sample's loss",
    "grad_norm": "L2 norm of the sample's loss gradient over all trainable parameters",
    "el2n": "L2 distance of softmax(logits) from the one-hot label (Paul et al. 2021)",
    "target": "class label in the data set",
    "prediction": "class with the largest logit",
    "probability": "softmax probability of the prediction",
    "known_mislabelled": "whether the label is known to be wrong (given with the task)",
}
GROUP_PREFIX = "grad_norm."


@dataclass(frozen=True)
class ScoreTable:
    """Scores of consecutive samples."""

    columns: dict[str, Tensor]  # {name: (n,)}
    coverage: Coverage
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.columns["index"])

    @property
    def groups(self) -> dict[str, Tensor]:
        """Gradient norms by parameter group, `{group: (n,)}`."""
        names = [name for name in self.columns if name.startswith(GROUP_PREFIX)]
        return {name.removeprefix(GROUP_PREFIX): self.columns[name] for name in names}

    @property
    def scores(self) -> dict[str, Tensor]:
        """The columns a sample can be ranked by."""
        return {name: self.columns[name] for name in RANKINGS if name in self.columns}

    @property
    def mislabelled(self) -> list[int]:
        """Rows known to carry a wrong label."""
        known = self.columns.get("known_mislabelled")
        return [] if known is None else known.nonzero()[:, 0].tolist()

    def class_name(self, label: int) -> str:
        """How to show a class."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def from_batches(batches: Sequence[BatchScores]) -> ScoreTable:
    """The table of consecutive batches."""
    return concatenate([ScoreTable(batch.columns(), batch.coverage, []) for batch in batches])


def concatenate(tables: Sequence[ScoreTable]) -> ScoreTable:
    """One table of several, rows in the order given."""
    first = tables[0]
    columns = {name: torch.cat([table.columns[name] for table in tables]) for name in first.columns}
    coverage = reduce(Coverage.joined, (table.coverage for table in tables))
    return ScoreTable(columns, coverage, first.class_names)


def write(path: Path, table: ScoreTable) -> None:
    """Write a Parquet file, whole or not at all."""
    notes = {"coverage": asdict(table.coverage), "class_names": table.class_names}
    arrays = [pa.array(values.numpy()) for values in table.columns.values()]
    fields = [
        pa.field(name, array.type, metadata={"description": describe(name)})
        for name, array in zip(table.columns, arrays, strict=True)
    ]
    schema = pa.schema(fields, metadata={"samplewise": json.dumps(notes)})
    with atomically(path) as partial:
        pq.write_table(pa.table(arrays, schema=schema), partial, compression="zstd")


def read(path: Path) -> ScoreTable:
    """Read what `write` wrote."""
    try:
        table = pq.read_table(path)
        notes = json.loads(table.schema.metadata[b"samplewise"])
    except PermissionError:
        raise  # nothing is wrong with the file
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} is gone, damaged or not of samplewise; --overwrite starts again") from error
    columns = {name: torch.tensor(table[name].to_numpy()) for name in table.column_names}
    return ScoreTable(columns, Coverage(**notes["coverage"]), notes["class_names"])


def differing(first: dict[str, Tensor], second: dict[str, Tensor], rounding: float) -> list[str]:
    """Columns `{name: (n,)}` of the same samples that only one has, or whose values differ by more than rounding."""
    # Which of two equal logits is the largest is rounding.
    names = [name for name in {**first, **second} if name != "prediction"]
    shared = first.keys() & second.keys()
    return [name for name in names if name not in shared or not alike(first[name], second[name], rounding)]


def describe(column: str) -> str:
    """What a column holds."""
    group = column.removeprefix(GROUP_PREFIX)
    return DESCRIPTIONS.get(column, f"L2 norm of the sample's loss gradient over the parameters of '{group}'")
