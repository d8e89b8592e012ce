"""What became of a fault: a row of the table that the long form prints."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass
class Row:
    """One fault, once.

    Attributes:
        fault: what was done.
        seed: of the random choices of moment or place.
        moment: when or where it was done.
        survived: yes; refused: it stopped with one line that names the fault, as it must; or NO.
        steps_lost: steps that had to be done again; None where none could be.
        wrong: results that differ from the unbroken run's, or that nothing should have let pass; a line each.
    """

    fault: str
    seed: int
    moment: str
    survived: str = "yes"
    steps_lost: int | None = None
    wrong: list[str] = dataclasses.field(default_factory=list)

    @property
    def right(self) -> bool:
        return self.survived != "NO" and not self.wrong


FOLDED = 50  # right rows of one fault, seed and end: more of them than this are one line


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown; of hundreds that are alike and right, how many."""
    lines = ["| fault | seed | moment | survived | steps lost | wrong results |", "|---|---|---|---|---|---|"]
    alike: dict[tuple, list[Row]] = {}
    for row in rows:
        alike.setdefault((row.fault, row.seed, row.survived, row.right or row.moment), []).append(row)
    for these in alike.values():
        if len(these) > FOLDED:
            these = [dataclasses.replace(these[0], moment=f"{len(these)} places")]
        for row in these:
            lost = "-" if row.steps_lost is None else row.steps_lost
            lines.append(f"| {row.fault} | {row.seed} | {row.moment} | {row.survived} | {lost} | {len(row.wrong)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """The rows by fault: how many, how many survived or were refused, the most steps lost, the wrong results."""
    lines = ["| fault | times | survived | refused, by name | most steps lost | wrong results |", "|---|---|---|---|---|---|"]
    for fault in dict.fromkeys(row.fault for row in rows):
        these = [row for row in rows if row.fault == fault]
        survived, refused = (sum(row.survived == how for row in these) for how in ("yes", "refused"))
        lost = max((row.steps_lost for row in these if row.steps_lost is not None), default="-")
        wrong = sum(len(row.wrong) for row in these)
        lines.append(f"| {fault} | {len(these)} | {survived} | {refused} | {lost} | {wrong} |")
    return "\n".join(lines)
