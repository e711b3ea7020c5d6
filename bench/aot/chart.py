"""Draws a chip's roofline, and where the kernels are predicted to lie below it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.aot.chips import Chip, Gpu
from bench.aot.measure import Measurement

_COLORS = {
    "forward": "#0072b2",
    "forward+statistics": "#56b4e9",
    "backward": "#d55e00",
}


def place(chip: Chip, found: Measurement) -> tuple[float, float]:
    """Returns a kernel's coordinates in the chart.

    Returns:
      x: for a GPU, bytes in flight per SM; for a TPU, bytes moved per compute cycle.
      y: upper bound of the rate in GB/s, with x, y, dy and dx each counted once.
    """
    useful = found.ideal / found.total
    if isinstance(chip, Gpu):
        assert found.in_flight is not None
        return found.in_flight, useful * roof(chip, found.in_flight)
    assert found.seconds is not None
    per_core = chip.bandwidth / chip.cores
    moved = sum(found.seconds_of_bytes) * per_core
    reached = chip.cores * found.ideal / found.total * moved / found.seconds
    return moved / sum(found.cycles), reached / 1e9


def roof(chip: Chip, x: float) -> float:
    """Returns the GB/s that memory bandwidth and latency (GPU) or compute (TPU) allow.

    Args:
      chip: the chip.
      x: bytes in flight per SM of a GPU, or bytes moved per compute cycle of a TPU.
    """
    if isinstance(chip, Gpu):
        slope = chip.core_count / chip.latency
    else:
        slope = chip.cores * chip.clock * 1e9
    return min(chip.bandwidth, x * slope) / 1e9


def draw(chip: Chip, found: Sequence[Measurement], path: Path) -> None:
    """Draws the chart as a PNG."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axis = figure.subplots()
    points = [place(chip, one) for one in found]
    ridge = chip.bandwidth / 1e9 / roof(chip, 1)
    ends = [ridge, *(x for x, _ in points)]
    line = np.geomspace(min(ends) / 2, max(ends) * 2, 200)
    axis.plot(line, [roof(chip, x) for x in line], color="black", linewidth=1)
    for op, color in _COLORS.items():
        mine = [point for one, point in zip(found, points, strict=True) if one.op == op]
        if mine:
            x, y = np.array(mine).T
            axis.scatter(x, y, color=color, s=18, label=op)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for text, point in _labels(axis, [one.case for one in found], points):
        axis.annotate(text, point, (3, 3), textcoords="offset points", fontsize=6)
    for numbers in (axis.xaxis, axis.yaxis):
        numbers.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        numbers.set_major_formatter("{x:,.0f}")
        numbers.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)
    axis.set_xlabel(
        "bytes in flight per SM, at most"
        if isinstance(chip, Gpu)
        else "bytes moved per cycle of computing"
    )
    axis.set_ylabel("GB/s of x, y, dy and dx, each counted once")
    axis.set_title(
        f"{chip.name}: predicted from compiled code, not measured; roof: "
        f"{chip.bandwidth / 1e9:.0f} GB/s, and "
        + ("the memory's latency" if isinstance(chip, Gpu) else "the core's cycles")
    )
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _labels(
    axis: Any, names: Sequence[str], points: Sequence[tuple[float, float]]
) -> list[tuple[str, tuple[float, float]]]:
    """Returns one label per heap of points: the first case's name, and how many follow.

    A heap holds the points within 60 x 9 typographic points of its first one, which is
    the size of a label.
    """
    heaps: list[tuple[tuple[float, float], dict[str, None]]] = []
    on_paper = axis.transData.transform
    for name, point in sorted(zip(names, points, strict=True), key=lambda p: p[1]):
        for first, heap in heaps:
            apart = np.abs(on_paper(first) - on_paper(point)) * 72 / axis.figure.dpi
            if (apart < (60, 9)).all():
                heap[name] = None
                break
        else:
            heaps.append((point, {name: None}))
    return [
        (next(iter(heap)) + (f" +{len(heap) - 1}" if len(heap) > 1 else ""), point)
        for point, heap in heaps
    ]
