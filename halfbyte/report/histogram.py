"""How long the examples are: bars in a terminal, or a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import HalfbyteError

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BINS = 12  # at most, and one for the longest
_UNITS = (1, 2, 5)  # times a power of ten: bins that a person can add up


@dataclass(frozen=True)
class Bin:
    first: int  # tokens, inclusive
    last: int  # inclusive
    count: int  # examples


def bins_of(lengths: Mapping[int, int]) -> list[Bin]:
    """Lengths (tokens -> examples) in bins of one width, up to where 99 in 100 lie; the last bin takes the rest."""
    total = sum(lengths.values())
    if not total:
        return []
    shortest, longest, most = min(lengths), max(lengths), percentile(lengths, 0.99)
    widths = (unit * 10**power for power in range(18) for unit in _UNITS)
    width = next(width for width in widths if most // width - shortest // width < _BINS)
    first, last = shortest // width, most // width
    counts = [0] * (last - first + 1)
    beyond = 0
    for length, count in lengths.items():
        if length // width <= last:
            counts[length // width - first] += count
        else:
            beyond += count
    bins = [Bin((first + i) * width, (first + i + 1) * width - 1, count) for i, count in enumerate(counts)]
    return [*bins, Bin(bins[-1].last + 1, longest, beyond)] if beyond else bins


def percentile(lengths: Mapping[int, int], share: float) -> int:
    """The length that `share` (0 to 1) of the examples do not exceed."""
    wanted, seen = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


def bar(count: int, most: int, width: int) -> str:
    """`count` as a bar of at most `width` letters, to an eighth of one; never nothing for something."""
    eighths = max(round(8 * width * count / most), 1 if count else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def draw_png(lengths_of: Mapping[str, Mapping[int, int]], max_length: int, file: Path) -> None:
    """A histogram for each data set, one below the other, with a line at max_length.  Needs matplotlib.

    Raises:
        HalfbyteError: matplotlib is not installed; the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise HalfbyteError(f"{file}: drawing a picture takes matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 1 + 2.6 * len(lengths_of)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(lengths_of), sharex=True, squeeze=False)[:, 0]
    longest = max(max(lengths, default=0) for lengths in lengths_of.values())
    for axes, (name, lengths) in zip(all_axes, lengths_of.items(), strict=True):
        axes.hist(list(lengths), bins=min(longest, 60), range=(0, longest + 1), weights=list(lengths.values()),
                  color="#2a6f97")  # fmt: skip
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_ylabel("examples")
        axes.spines[["top", "right"]].set_visible(False)
        if max_length <= 2 * longest:
            axes.axvline(max_length, color="#b08968", linewidth=1.5)
            axes.annotate("max_length", (max_length, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                          textcoords="offset points", color="#b08968", fontsize=9)  # fmt: skip
    all_axes[-1].set_xlabel("tokens, before any cut")
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise HalfbyteError(f"{file} cannot be written ({error.strerror})") from error
