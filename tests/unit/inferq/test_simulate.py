"""``inferq simulate``: its table, its JSON, its plot, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inferq.cli import app
from queue_schemas import BadRequest, CannotStart

TRACE = "poisson:requests=300,rate=10"


def simulated(*arguments: str) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_policy_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one another, for each size of the fleet."""
    monkeypatch.setenv("COLUMNS", "200")
    lines = simulated(TRACE, "--workers", "1", "--workers", "2").splitlines()
    assert lines[0].split()[:3] == ["POLICY", "FLEET", "SLO"]
    names = ["inferq", "round-robin", "least-loaded", "bounded-hashing", "oracle"]
    assert [line.split()[:2] for line in lines[1:]] == [[name, size] for name in names for size in ("1", "2")]


def test_json_has_every_figure() -> None:
    """For scripts."""
    chosen = ("--policy", "inferq", "--fleet", "queue-length", "--fleet", "clairvoyant", "--limit", "100", "--json")
    scaled, clairvoyant = json.loads(simulated(TRACE, *chosen))
    assert (scaled["policy"], scaled["fleet"], scaled["requests"]) == ("inferq", "queue-length 10", 100)
    assert (clairvoyant["policy"], clairvoyant["fleet"]) == ("oracle", "clairvoyant")
    assert 0 < clairvoyant["gpu_hours"] < scaled["gpu_hours"]


def test_scalers_are_varied_in_their_setting() -> None:
    """A row for each value."""
    chosen = ("--policy", "inferq", "--fleet", "lag-count", "--lag-threshold", "5", "--lag-threshold", "50", "--json")
    found = json.loads(simulated(TRACE, *chosen, "--fleet", "inferq", "--target-wait-ms", "100"))
    assert [one["fleet"] for one in found] == ["lag-count 5", "lag-count 50", "inferq 100 ms"]


def test_engine_options_change_the_engine() -> None:
    """A slower step makes slower tokens; the rest of the profile stays."""

    def tpot(*options: str) -> float:
        found = json.loads(simulated(TRACE, "--policy", "inferq", "--json", *options))
        return float(found[0]["tpot_mean_s"])

    assert tpot("--step-us", "20000") > tpot() + 0.01
    assert tpot("--engine", "simulated") == pytest.approx(0.01, rel=0.05)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    """As the picture that the file's name says."""
    picture = tmp_path / "figures.png"
    simulated(TRACE, "--policy", "inferq", "--workers", "1", "--workers", "2", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CannotStart, match="cannot be written"):
        simulated(TRACE, "--policy", "inferq", "--plot", str(tmp_path / "none" / "figures.png"))


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before it simulates anything."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CannotStart, match=r"pip install 'inferq\[plot\]'"):
        simulated("missing.jsonl", "--plot", str(tmp_path / "figures.png"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--policy", "best"), "--policy best: there are inferq, round-robin"),
        (("--fleet", "big"), "--fleet big: there are fixed"),
        (("--engine", "tpu"), "--engine tpu: there are h100"),
        (("--engine", "simulated", "--step-us", "1"), "has no steps"),
        (("--weight", "acme"), "--weight acme: give a tenant and a number"),
        (("--weight", "acme=-1"), "a number above 0"),
        (("--min-workers", "5", "--max-workers", "4"), "--min-workers must not be above"),
    ],
)
def test_what_makes_no_sense_is_refused(options: tuple[str, ...], problem: str) -> None:
    """With a sentence."""
    with pytest.raises(BadRequest, match=problem):
        simulated(TRACE, *options)
