"""Draw what simulations found. Needs matplotlib: the extra ``plot``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from queue_schemas import CannotStart

from .measures import Summary

_PERCENTILES = ("p50", "p90", "p99")


def load_matplotlib() -> Any:
    """matplotlib with a canvas that needs no screen. Raises ``CannotStart`` where it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise CannotStart("--plot needs matplotlib: pip install 'inferq[plot]'") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(series: Mapping[str, Sequence[Summary]], title: str, picture: Path) -> None:
    """Attainment against GPU hours, a line for each series (one policy with one way of scaling, by fleet size), and
    percentiles of TTFT, written to ``picture``; its suffix says the format.

    Raises ``CannotStart`` without matplotlib or where the file cannot be written.
    """
    pyplot = load_matplotlib()
    figure, (cost, latency) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    figure.suptitle(title)
    for number, (name, found) in enumerate(series.items()):
        color = f"C{number % 10}"
        by_cost = sorted(found, key=lambda one: one.gpu_hours)
        hours = [one.gpu_hours for one in by_cost]
        cost.plot(hours, [one.attainment * 100 for one in by_cost], marker="o", label=name, color=color)
        for one in by_cost:
            values = [one.ttft_p50_s, one.ttft_p90_s, one.ttft_p99_s]
            label = name if one is by_cost[0] else None
            latency.plot(_PERCENTILES, values, marker="o", label=label, color=color)
    cost.set(xlabel="GPU hours", ylabel="requests within TTFT and TPOT objectives, %")
    latency.set(ylabel="TTFT, s", yscale="log")
    for axes in (cost, latency):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise CannotStart(f"{picture} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
