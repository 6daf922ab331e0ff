"""`spear push`: what goes to the hub, written to a folder."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from spear.cli import main
from spear.commands import push as command
from spear.commands.push import names_licence, push, with_scores
from spear.errors import CheckpointError, ConfigError
from spear.export import load_encoder, save_encoder
from spear.files import write_json
from tests.export.tiny import tiny_encoder, tone

SCORES = {
    "words": {
        "student": {"label": "student", "metric": "accuracy", "value": 0.9, "ci": [0.85, 0.95]},
        "logmel": {"label": "log-mel", "metric": "accuracy", "value": 0.25},
    }
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The export folder of a finished run."""
    encoder = tiny_encoder()
    save_encoder(tmp_path / "exp" / "export", encoder.encoder, encoder.student, {"name": "small", "licence": "cc-by-4.0"})
    (tmp_path / "exp" / "export" / "artifact.json").write_text("{}")
    write_json(tmp_path / "exp" / "evaluate" / "scores.json", SCORES)
    return tmp_path / "exp" / "export"


def test_push_dry_run_writes_a_folder_that_loads(export: Path, tmp_path: Path) -> None:
    said: list[str] = []
    licence = tmp_path / "licence.txt"
    licence.write_text("All may use it.\n")
    push(export, "me/small", tmp_path / "out", said.append, licence_file=licence)
    assert "nothing was sent" in said[0]
    assert (tmp_path / "out" / "LICENSE").read_text() == "All may use it.\n"
    assert not (tmp_path / "out" / "artifact.json").exists()
    audio = tone(9000)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(tmp_path / "out")(audio).features, tiny_encoder()(audio).features)


def test_push_command_writes_what_would_be_sent(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    licence = tmp_path / "licence.txt"
    licence.write_text("All may use it.\n")
    out = tmp_path / "out"
    assert main(["push", str(export), "me/small", "--dry-run", str(out), "--licence-file", str(licence)]) == 0
    count = len(list(out.iterdir()))
    assert capsys.readouterr().out == f"{out}: {count} files, as they would go to me/small; nothing was sent\n"
    assert {"LICENSE", "README.md", "SHA256SUMS", "config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0


def test_push_command_exits_1_with_one_line_when_the_card_names_no_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student, {"name": "small"})
    assert main(["push", str(tmp_path / "export"), "me/small", "--dry-run", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("spear: error: ")
    assert "names no licence: set `export.licence`" in line
    assert not (tmp_path / "out").exists()
    assert main(["push", str(tmp_path / "export"), "me/small", "--dry-run", str(tmp_path / "out"), "--force"]) == 0


def test_push_sums_are_those_of_every_file(export: Path, tmp_path: Path) -> None:
    push(export, "me/small", tmp_path / "out", lambda _: None)
    lines = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"SHA256SUMS"}
    assert lines.keys() == files
    assert lines["model.safetensors"] == hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=False).returncode == 0


def test_push_card_has_the_scores_of_the_run(export: Path, tmp_path: Path) -> None:
    push(export, "me/small", tmp_path / "out", lambda _: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| words | log-mel | accuracy | 0.250 |\n| words | student | accuracy | 0.900 (0.850 to 0.950) |\n\n## Licence\n" in card
    assert "## Scores" not in (export / "README.md").read_text()


def test_push_card_has_the_score_of_a_fine_tuned_model() -> None:
    scores = {"metric": "WER", "task": "ctc", "value": 0.125, "words": 40}
    assert with_scores("# x\n", scores).endswith("| ctc | fine-tuned | WER | 0.125 |\n")


def test_push_refuses_weights_without_a_licence(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student, {"name": "small"})
    with pytest.raises(CheckpointError, match="names no licence"):
        push(tmp_path / "export", "me/small", tmp_path / "out", lambda _: None)
    push(tmp_path / "export", "me/small", tmp_path / "out", lambda _: None, force=True)


@pytest.mark.parametrize(("card", "found"), [("---\nlicense: mit\n---\n", True), ("---\nlicense: other\n---\n", False), ("license: mit\n", False)])
def test_names_licence(card: str, found: bool) -> None:
    assert names_licence(card) is found


def test_push_refuses_a_folder_with_files_and_a_bad_name(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be owner/name, but is 'small'"):
        push(export, "small", tmp_path / "out", lambda _: None)
    with pytest.raises(ConfigError, match="must be a folder that is empty"):
        push(export, "me/small", tmp_path, lambda _: None)


def test_push_from_inside_the_folder(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.chdir(export)
    monkeypatch.setattr(command, "_upload", lambda folder, *_: sent.extend(path.name for path in folder.iterdir()) or "sent")
    push(Path(), "me/small", None, lambda _: None)
    assert "model.safetensors" in sent


def test_push_says_what_to_do_when_the_hub_refuses(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ConfigError, match="no route to host; log in with `hf auth login`, or see what would be sent with `--dry-run DIR`"):
        push(export, "me/small", None, lambda _: None)
    assert not (export.parent / ".export.push").exists()
