"""What was recorded how: one row per parameter."""

from dataclasses import dataclass

from torch import nn

from .collecting import Use


@dataclass(frozen=True)
class Coverage:
    """Which parameter was used by which ops, how its gradient was found, and its share of all trainable parameters."""

    rows: tuple["CoverageRow", ...]

    @staticmethod
    def of(parameters: dict[str, nn.Parameter], uses: list[Use]) -> "Coverage":
        """Count the uses of each parameter."""
        total = sum(p.numel() for p in parameters.values())
        found: dict[str, list[Use]] = {name: [] for name in parameters}
        for use in uses:
            found[use.parameter].append(use)
        rows = []
        for name, parameter in parameters.items():
            mine = found[name]
            rows.append(
                CoverageRow(
                    name,
                    len(mine),
                    tuple(dict.fromkeys(use.op for use in mine)),
                    tuple(dict.fromkeys(use.how for use in mine)),
                    tuple(dict.fromkeys(use.structure for use in mine)),
                    tuple(dict.fromkeys(use.algorithm for use in mine)),
                    parameter.numel() / max(1, total),
                )
            )
        return Coverage(tuple(rows))

    @property
    def share(self) -> float:
        """The share of trainable parameters that the loss reached."""
        return sum(row.share for row in self.rows if set(row.structure) - {"unused"})

    @property
    def fallback_share(self) -> float:
        """The share of trainable parameters with a use that went sample by sample."""
        return sum(row.share for row in self.rows if "fallback" in row.how)

    def __str__(self) -> str:
        """A readable table."""
        head = ("parameter", "uses", "op", "how", "factor", "algorithm", "share")
        body = [
            (
                row.parameter,
                str(row.uses),
                *(", ".join(part) or "-" for part in (row.op, row.how, row.structure, row.algorithm)),
                f"{row.share:.1%}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [head, *body]
        )


@dataclass(frozen=True)
class CoverageRow:
    """One trainable parameter."""

    parameter: str
    uses: int
    op: tuple[str, ...]
    # "rule": factors from a rule; "rows": entered an elementwise op row by row; "fallback": sample by sample
    how: tuple[str, ...]
    # the factor classes, or "unused" where the loss did not reach a use
    structure: tuple[str, ...]
    # how norms are found: "dense" and "rows" from the gradients as they are, "gram", "tile" and "store" as in `record`
    algorithm: tuple[str, ...]
    share: float
