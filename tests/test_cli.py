"""The command line: exit codes, one-line errors, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spear.cli import STAGES, main
from spear.stages import STAGES as ORDER


def test_cli_stages_are_the_stages_in_order() -> None:
    assert tuple(STAGES) == ORDER


@pytest.mark.parametrize(
    "command",
    [*STAGES, "preflight", "doctor", "import", "encode", "tokenize", "inspect", "compare", "report", "explore", "finetune", "sherpa", "push"],
)
def test_cli_help_names_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "1 something you can fix" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["pretrian"], ["manifests"], ["manifests", "--rec", "x"]])
def test_cli_exits_2_on_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: spear" in capsys.readouterr().err


def test_cli_exits_1_with_one_line_when_the_recipe_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["manifests", "--recipe", str(tmp_path / "no.yaml"), "--corpora", "c.yaml", "--data", "d", "--exp", "e"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("spear: error: ")
    assert "no.yaml cannot be read" in lines[0]


def test_python_dash_m_spear_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "spear", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("spear ")
