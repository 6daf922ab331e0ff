"""``spear report``."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear.commands.report import write_report
from spear.errors import SpearError
from tests.evaluation.synthetic import synthetic_run


def test_write_report_of_one_run_lies_in_its_folder(tmp_path: Path) -> None:
    exp = synthetic_run(tmp_path / "run", light=True)
    assert write_report([exp], None) == exp / "evaluate" / "report.html"


def test_write_report_of_several_runs_lies_where_the_command_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [synthetic_run(tmp_path / name, light=True) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    assert write_report(runs) == Path("report.html")
    assert "one · two" in (tmp_path / "report.html").read_text()


def test_write_report_raises_spear_error_when_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpearError, match="a file is in the way"):
        write_report([synthetic_run(tmp_path / "run", light=True)], tmp_path / "file" / "report.html")
