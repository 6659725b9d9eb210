"""From turns to the figures of the table: medians, and ratios taken within a repetition."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

Turn = dict[str, Any]

AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Goal:
    value: float
    sense: str = AT_LEAST

    def met(self, reached: float) -> bool:
        return reached >= self.value if self.sense == AT_LEAST else reached <= self.value


@dataclass(frozen=True)
class Side:
    """What one side reached, and how it was set."""

    value: float  # in the row's unit, the median of the turns
    setting: str
    peak_bytes: int | None = None  # the largest over the turns


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    workload: str
    title: str
    unit: str  # "tokens/s", "s", ...
    ours: Side
    other: Side | None
    ratios: list[float]  # a repetition each
    ratio_of: str  # "speed": ours over theirs; "time": our seconds over theirs; "share": of a peak
    goal: Goal | None

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def to_record(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratio": self.ratio,
            "met": None if self.goal is None else self.goal.met(self.ratio),
        }


def side(turns: Sequence[Turn], unit: str, setting: str) -> Side:
    """The median over the turns; for a unit of "s" the time of a turn, for any other units a second."""
    values = [t["seconds"] / t["units"] if unit == "s" else t["units"] / t["seconds"] for t in turns]
    return Side(median(values), setting, max(t["peak_bytes"] for t in turns))


def pairwise(ours: Sequence[Turn], theirs: Sequence[Turn], ratio_of: str = "speed") -> list[float]:
    """One ratio a repetition, so that what slowed both for a while cancels."""
    ratios = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine["repetition"] != other["repetition"]:
            raise ValueError("turns of different repetitions are not compared")
        time_ratio = (mine["seconds"] / mine["units"]) / (other["seconds"] / other["units"])
        ratios.append(time_ratio if ratio_of == "time" else 1 / time_ratio)
    return ratios


def compare(
    workload: str,
    title: str,
    unit: str,
    ours: tuple[Sequence[Turn], str],  # turns, setting
    theirs: tuple[Sequence[Turn], str],
    goal: Goal | None,
    ratio_of: str = "speed",
) -> Row:
    return Row(
        workload,
        title,
        unit,
        side(ours[0], unit, ours[1]),
        side(theirs[0], unit, theirs[1]),
        pairwise(ours[0], theirs[0], ratio_of),
        ratio_of,
        goal,
    )
