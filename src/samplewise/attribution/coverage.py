"""Which share of the model the scores cover."""

from dataclasses import dataclass

from torch import nn

import samplewise as sw


@dataclass(frozen=True)
class Coverage:
    """The trainable parameters whose gradients the scores are made of. What is covered is exact."""

    tensors: int
    elements: int
    share: float  # of the elements; the loss does not reach the others, so their gradient is zero
    fallback_share: float  # of the elements, differentiated sample by sample for want of a rule
    unreached: list[str]  # parameters

    def describe(self) -> str:
        """One line."""
        line = f"{self.share:.1%} of {self.elements:,} trainable parameters covered, in {self.tensors:,} tensors"
        if self.fallback_share:
            line += f"; {self.fallback_share:.0%} by the slow way, sample by sample"
        if self.unreached:
            line += (
                f"; the loss does not reach {', '.join(self.unreached[:3])}{', ...' if len(self.unreached) > 3 else ''}"
            )
        return line


def coverage_of(rec: sw.Record, model: nn.Module) -> Coverage:
    """Sum up what a recording reports."""
    report = rec.coverage()
    return Coverage(
        tensors=len(report.rows),
        elements=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        share=min(1.0, round(report.share, 9)),
        fallback_share=round(report.fallback_share, 9),
        unreached=[row.parameter for row in report.rows if not set(row.structure) - {"unused"}],
    )
