"""Draw ``growth.csv``: ``plot.py TABLE PICTURE``. Runs in the peers' environment, which has matplotlib."""

from __future__ import annotations

import csv
import sys

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

with open(sys.argv[1], newline="", encoding="utf-8") as file:  # noqa: PTH123
    points = list(csv.DictReader(file))
axes = list(dict.fromkeys(point["axis"] for point in points))
figure, places = plt.subplots((len(axes) + 1) // 2, 2, figsize=(12, 3.2 * ((len(axes) + 1) // 2)), squeeze=False)
for axis, place in zip(axes, places.flat, strict=False):
    of_axis = [point for point in points if point["axis"] == axis]
    for name in dict.fromkeys(point["figure"] for point in of_axis):
        # Rates and times have other scales than microseconds of CPU; they are in the table.
        if "CPU" in name or name.startswith("of it"):
            chosen = [(int(point["value"]), float(point["number"])) for point in of_axis if point["figure"] == name]
            place.plot(*zip(*chosen, strict=True), marker="o", label=name)
    place.set(xlabel=axis, ylabel="us", xscale="log", ylim=(0, None))
    place.grid(visible=True, alpha=0.3)
    place.legend(fontsize="small")
for place in list(places.flat)[len(axes) :]:
    place.set_visible(False)
figure.tight_layout()
figure.savefig(sys.argv[2], dpi=110)
