"""Which share of the model the scores cover."""

from dataclasses import dataclass

from torch import nn

import samplewise as sw


@dataclass(frozen=True)
class Coverage:
    """The trainable parameters whose gradients the scores are made of. What is covered is exact."""

    tensors: int
    elements: int
    unreached: dict[str, int]  # parameter -> elements: no sample's loss reaches it, its gradient is zero
    fallback: dict[str, int]  # parameter -> elements: differentiated sample by sample, for want of a rule

    @property
    def share(self) -> float:
        """Share of the trainable elements that the loss reaches."""
        return 1 - sum(self.unreached.values()) / self.elements

    def joined(self, other: "Coverage") -> "Coverage":
        """The coverage of two batches together."""
        unreached = {name: count for name, count in self.unreached.items() if name in other.unreached}
        return Coverage(self.tensors, self.elements, unreached, self.fallback | other.fallback)

    def describe(self) -> str:
        """One line."""
        line = f"{self.share:.1%} of {self.elements:,} trainable parameters covered, in {self.tensors:,} tensors"
        if self.fallback:
            line += f"; slowly, for want of a rule: {_some(self.fallback)}"
        if self.unreached:
            line += f"; not reached by any loss: {_some(self.unreached)}"
        return line


def coverage_of(rec: sw.Record, model: nn.Module) -> Coverage:
    """Sum up what a recording reports."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = rec.coverage().rows
    return Coverage(
        tensors=len(sizes),
        elements=sum(sizes.values()),
        unreached={row.parameter: sizes[row.parameter] for row in rows if set(row.structure) <= {"unused"}},
        fallback={row.parameter: sizes[row.parameter] for row in rows if "fallback" in row.how},
    )


def _some(names: dict[str, int], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
