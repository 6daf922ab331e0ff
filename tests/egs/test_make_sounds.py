"""The synthetic sounds of the mini road."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from spear.data.audio import load_audio
from spear.data.sources import CutsSource


@pytest.fixture(scope="module")
def sounds(script: Any) -> ModuleType:
    return script("mini/local/make_sounds.py")


@pytest.fixture(scope="module")
def config(egs: Path) -> dict[str, Any]:
    return yaml.safe_load((egs / "mini/conf/corpus.yaml").read_text())["sounds"]


def make(sounds: ModuleType, config: dict[str, Any], folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    folder.parent.mkdir(exist_ok=True)
    path = folder.parent / "corpus.yaml"
    path.write_text(json.dumps({"seed": 1, "sounds": {**config, "clips": {"train": 20, "valid": 10, "test": 10}}}))
    monkeypatch.setattr("sys.argv", ["make_sounds.py", "--config", str(path), "--out", str(folder), "--workers", str(workers)])
    return int(sounds.main())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "artifact.json"}


def test_draw_clips_has_equally_many_of_each_class(sounds: ModuleType, config: dict[str, Any]) -> None:
    counts = Counter(clip.label for clip in sounds.draw_clips(config, "train", 20))
    assert set(counts) == set(sounds.SOUNDS)
    assert len(counts) == 10
    assert set(counts.values()) == {config["clips"]["train"] // 10}


@pytest.mark.parametrize("index", range(10))
def test_make_clip_has_the_clips_length_and_level(sounds: ModuleType, index: int) -> None:
    label = sorted(sounds.SOUNDS)[index]
    clip = sounds.Clip(id=f"clip-{index}", label=label, seconds=2.0, gain_db=-6.0, snr_db=10.0)
    audio = sounds.make_clip(clip, seed=3)
    assert audio.shape == (32000,)
    assert np.isfinite(audio).all()
    assert np.abs(audio).max() == pytest.approx(10 ** (-6 / 20))
    assert np.array_equal(audio, sounds.make_clip(clip, seed=3))
    assert not np.array_equal(audio, sounds.make_clip(clip, seed=4))


@pytest.mark.parametrize(("label", "low_hz", "high_hz"), [("tremolo", 3, 7), ("flutter", 16, 40)])
def test_swelling_sounds_swell_at_their_rate(sounds: ModuleType, label: str, low_hz: float, high_hz: float) -> None:
    share = []
    for seed in range(12):
        audio = sounds.SOUNDS[label](np.random.default_rng(seed), 32000)
        level = np.sqrt((audio.reshape(-1, 80) ** 2).mean(axis=1))  # 200 Hz
        spectrum = np.abs(np.fft.rfft(level - level.mean())) ** 2
        rates = np.fft.rfftfreq(len(level), 80 / 16000)
        share.append(spectrum[(rates >= low_hz - 0.5) & (rates <= high_hz + 0.5)].sum() / spectrum[rates < 60].sum())
    assert np.median(share) > 0.6


def test_main_gives_the_same_bytes_whatever_the_workers_and_after_a_kill(
    sounds: ModuleType, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "a" / "sounds", tmp_path / "b" / "sounds"
    assert make(sounds, config, first, 1, monkeypatch) == 0
    assert make(sounds, config, second, 2, monkeypatch) == 0
    wanted = files(first)
    assert len(wanted) == 40 + 3
    assert files(second) == wanted
    for name in ("artifact.json", "cuts_valid.jsonl.gz", "train/sound-train-00003.flac"):
        (second / name).unlink()
    assert make(sounds, config, second, 2, monkeypatch) == 0
    assert files(second) == wanted
    with caplog.at_level(logging.INFO):
        assert make(sounds, config, second, 1, monkeypatch) == 0
    assert "nothing to do" in caplog.text
    for item in CutsSource(train=str(second / "cuts_train.jsonl.gz")).files("train"):
        assert item.cut is not None
        assert item.cut.supervisions[0].custom["label"] in sounds.SOUNDS
        assert len(load_audio(item.cut)) == item.cut.num_samples


def test_main_refuses_a_folder_made_from_other_settings(
    sounds: ModuleType, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(sounds, config, tmp_path / "a" / "sounds", 1, monkeypatch) == 0
    assert make(sounds, {**config, "snr_db": [0, 1]}, tmp_path / "a" / "sounds", 1, monkeypatch) == 1
    assert "`config.snr_db`" in capsys.readouterr().err
