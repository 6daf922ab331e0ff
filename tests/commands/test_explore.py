"""``spear explore``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spear.cli import main
from spear.commands.explore import read_clip
from spear.export import save_encoder
from spear.export.long_audio import AudioFile
from tests.export.tiny import tiny_encoder, tone


@pytest.fixture
def export(tmp_path: Path) -> Path:
    encoder = tiny_encoder()
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student)
    return tmp_path / "export"


def write(path: Path, samples: int, hz: float, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(samples, hz).numpy(), rate)


def test_explore_writes_a_page_of_all_audio_below_a_folder(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(4):
        write(tmp_path / "audio" / f"part{index % 2}" / f"{index}.wav", 9000 + index, 200 + 100 * index)
    write(tmp_path / "audio" / "short.flac", 400, 300)
    (tmp_path / "audio" / "notes.txt").write_text("no audio")
    assert main(["explore", str(export), str(tmp_path / "audio"), "--out", str(tmp_path / "page.html"), "--method", "pca"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "5 clips" in page
    assert '"part0/2.wav"' in page
    assert '"no folder"' in page


def test_explore_takes_evenly_spaced_clips(tmp_path: Path, export: Path) -> None:
    for index in range(5):
        write(tmp_path / "audio" / f"{index}.wav", 4000, 300)
    out = tmp_path / "page.html"
    assert main(["explore", str(export), str(tmp_path / "audio"), "--out", str(out), "--max-clips", "3"]) == 0
    assert [f'"{index}.wav"' in out.read_text() for index in range(5)] == [True, False, True, False, True]


def test_read_clip_embeds_the_mean_of_all_frames(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    write(tmp_path / "a.wav", 30000, 300)
    recording = AudioFile(tmp_path / "a.wav", 16000)
    clip = read_clip(encoder, recording, Path("x/a.wav"), 0.5)
    with torch.no_grad():
        wanted = encoder(recording.read(0, 30000)).features[0].mean(dim=0)
    np.testing.assert_allclose(clip.embedding, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert (clip.name, clip.group, clip.duration_s, len(clip.sound)) == ("x/a.wav", "x", 1.875, 8000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-clips", "1"], "`max_clips` must be at least 2, but is 1"),
        (["--max-mb", "0.001"], "`max_mb` is 0.001, which leaves"),
    ],
)
def test_explore_exits_1_when_an_option_is_out_of_range(
    tmp_path: Path, export: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        write(tmp_path / "audio" / f"{index}.wav", 9000, 300)
    assert main(["explore", str(export), str(tmp_path / "audio"), "--out", str(tmp_path / "page.html"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_explore_exits_1_when_there_is_too_little_audio(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "audio" / "one.wav", 9000, 300)
    assert main(["explore", str(export), str(tmp_path / "audio")]) == 1
    assert "must hold at least two audio files" in capsys.readouterr().err
    assert main(["explore", str(export), str(tmp_path / "nothing")]) == 1
    assert "nothing is not a folder" in capsys.readouterr().err
