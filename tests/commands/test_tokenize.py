"""``spear tokenize``: the codes of the tokens stage for single files, from the teacher that the quantizer was fitted on."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet

import spear.commands.tokenize as tokenize_command
from spear.data.audio import load_audio, load_audio_file
from spear.files import read_json, write_json
from spear.quantizers.kmeans import KMeansConfig
from spear.stages import manifests
from spear.teachers.base import extract
from spear.teachers.logmel import LogMelConfig
from tests.data.cuts import folder_corpus, make_run, save, tone
from tests.road import Outcome, command

RECIPE = """
teachers: {mel: {type: logmel, num_mel_bins: 16, stack: 2}, bright: {type: logmel, num_mel_bins: 32}, long: {type: logmel, num_mel_bins: 8, stack: 4}}
quantizers: {mel: {type: kmeans, codebook_size: 8}, bright: {type: kmeans}, long: {type: kmeans}}
objective: {type: masked_prediction, weights: {speech: {mel: 1.0}}}
student: {type: zipformer}
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantizer as its stage leaves it, fitted on the teacher `mel`."""
    folder = tmp_path_factory.mktemp("mel")
    frames = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) - 8.0
    KMeansConfig(codebook_size=8).fit(frames, frames[:50], seed=0).save(folder)
    teacher = LogMelConfig(num_mel_bins=16, stack=2).build().fingerprint()
    write_json(folder / "artifact.json", {"fingerprint": "f", "kind": "quantizers", "inputs": {"teacher": teacher}})
    return folder


def tokenize(root: Path, quantizer: Path, *audio: Path, teacher: str = "mel") -> Outcome:
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE)
    return command("tokenize", "--recipe", recipe, "--teacher", teacher, "--quantizer", quantizer, *audio, "--out", root / "out")


def test_tokenize_gives_the_codes_of_audio_read_as_the_stages_read_it(tmp_path: Path, fitted: Path) -> None:
    from spear.quantizers import load_quantizer

    path = save(tmp_path / "a.wav", tone(1.0, rate=44100, hz=3000), 44100)
    assert tokenize(tmp_path, fitted, path).code == 0
    with np.load(tmp_path / "out" / "a.npz") as found:
        assert (float(found["frame_rate_hz"]), float(found["first_frame_s"]), str(found["source"])) == (50.0, 0.01, str(path))
        frames = extract(LogMelConfig(num_mel_bins=16, stack=2).build(), [torch.from_numpy(load_audio_file(path))])[0]
        assert np.array_equal(found["codes"], load_quantizer(fitted).encode(frames).numpy())


def test_tokenize_hears_what_the_stages_hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 24 kHz hears nothing above the 8 kHz of the manifests."""
    audio = np.random.default_rng(0).normal(0, 0.1, (30000, 2))
    run = make_run(tmp_path, [folder_corpus(save(tmp_path / "in" / "a.wav", audio, 44100).parent)])
    manifests.run(run)
    (cut,) = CutSet.from_jsonl_lazy(manifests.manifest_path(tmp_path, "sounds", "train"))
    heard: list[np.ndarray[Any, Any]] = []
    teacher = SimpleNamespace(sample_rate=24000, num_frames=int, frame_rate_hz=50.0, first_frame_s=0.01)
    monkeypatch.setattr(tokenize_command, "tokenizer_of", lambda _: (teacher, SimpleNamespace(encode=lambda frames: frames)))
    monkeypatch.setattr(tokenize_command, "extract", lambda _, audios, __: heard.append(audios[0].numpy()) or [torch.zeros(1, 1)])
    tokenize_command.tokenize_files(argparse.Namespace(audio=[tmp_path / "in" / "a.wav"], out=tmp_path / "out"))
    assert np.array_equal(heard[0], load_audio(cut, 24000))
    spectrum = np.square(np.abs(np.fft.rfft(heard[0])))
    assert spectrum[len(spectrum) * 17 // 24 :].mean() < 1e-2 * spectrum.mean()


def test_tokenize_keeps_the_codes_of_another_audio_of_the_same_name(tmp_path: Path, fitted: Path) -> None:
    first, second = (save(tmp_path / name / "a.wav", tone(1.0, hz=hz)) for name, hz in (("x", 300.0), ("y", 3000.0)))
    for path in (first, second, first):
        assert tokenize(tmp_path, fitted, path).code == 0
    sources = []
    for path in (tmp_path / "out").iterdir():
        with np.load(path) as found:
            sources.append(str(found["source"]))
    assert sorted(sources) == [str(first), str(second)]


def test_tokenize_raises_config_error_when_the_quantizer_is_of_another_teacher(tmp_path: Path, fitted: Path) -> None:
    """Three teachers of the same width; only one of them is the quantizer's."""
    path = save(tmp_path / "a.wav", tone(1.0))
    for teacher in ("bright", "long"):
        error = tokenize(tmp_path, fitted, path, teacher=teacher).error()
        assert error.startswith(
            f"`--quantizer` {fitted} was fitted on the teacher {read_json(fitted / 'artifact.json')['inputs']['teacher'][:12]}, but"
        )
    assert not (tmp_path / "out").exists()


def test_tokenize_warns_when_the_quantizer_does_not_name_its_teacher(tmp_path: Path, fitted: Path) -> None:
    from spear.quantizers import load_quantizer

    path = save(tmp_path / "a.wav", tone(1.0))
    load_quantizer(fitted).save(tmp_path / "plain")
    outcome = tokenize(tmp_path, tmp_path / "plain", path, teacher="bright")
    assert outcome.code == 0
    assert "does not say which teacher it was fitted on" in outcome.err


def test_tokenize_raises_data_error_when_a_file_is_missing_or_too_short(tmp_path: Path, fitted: Path) -> None:
    good, click = save(tmp_path / "a.wav", tone(1.0)), save(tmp_path / "click.wav", tone(0.03))
    assert tokenize(tmp_path, fitted, good, tmp_path / "gone.wav").error() == f"{tmp_path}/gone.wav is not a file"
    assert not (tmp_path / "out").exists()
    load = tmp_path / "long"
    frames = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    KMeansConfig(codebook_size=8).fit(frames, frames[:50], seed=0).save(load)
    assert tokenize(tmp_path, load, click, teacher="long").error() == f"{click} is too short for one frame of logmel"
