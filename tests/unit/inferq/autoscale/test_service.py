"""What the autoscaler's process refuses to start with."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferq.autoscale.service import main

REFUSED = 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--pool MODEL"),
        (["--pool", "m", "--min", "3", "--max", "2"], "min must not be more than max"),
        (["--pool", "m", "--target-wait", "soon"], "as in 2s"),
        (["--pool", "m", "--manager-url", "ray:manager"], "give the Router's http:// address"),
        (["--pool", "m", "--driver", "command"], "-- PROGRAM ARGUMENTS"),
        (["--pool", "m", "--driver", "slurm"], "'process', 'command', 'ray' or 'kubernetes'"),
        (["--pool", "m", "--driver", "kubernetes"], "deployment/NAME or statefulset/NAME"),
        (["--pool", "x" * 300], "model"),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With what to write instead; nothing is started."""
    assert main([*arguments, "--port", "0", "--data-dir", str(tmp_path / "data")]) == REFUSED
    assert said in capsys.readouterr().err
    assert not (tmp_path / "data" / "logs").exists()
