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
from spear.files import make_folder, write_json
from spear.quantizers.kmeans import KMeans
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
        (["--out", "."], "`out` must be a file, but . is a folder"),
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


def test_explore_shows_the_tokens_of_a_teacher(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / "audio" / f"{name}.wav", 8000, 440)
    recipe = {
        "teachers": {"mel": {"type": "logmel", "num_mel_bins": 16, "stack": 2}},
        "quantizers": {"mel": {"type": "kmeans", "codebook_size": 8}},
        "objective": {"type": "masked_prediction", "weights": {"speech": {"mel": 1.0}}},
        "student": {"type": "zipformer"},
    }
    write_json(tmp_path / "recipe.yaml", recipe)  # JSON is YAML
    KMeans(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) - 8).save(make_folder(tmp_path / "quantizer"))
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--teacher", "mel", "--quantizer", str(tmp_path / "quantizer")]
    assert main(["explore", str(export), str(tmp_path / "audio"), "--out", str(tmp_path / "page.html"), *options]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('"tokens": "data:image/png') == 2
    assert main(["explore", str(export), str(tmp_path / "audio"), "--quantizer", str(tmp_path / "quantizer")]) == 1
    assert "name the teacher by `--teacher-dir`, or by `--recipe` and `--teacher`" in capsys.readouterr().err
