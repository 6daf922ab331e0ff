"""The HEAR 2021 interface, held to the rules that ``hear-validator`` checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.evaluation import hear
from spear.export import save_encoder
from tests.export.tiny import tiny_encoder, tone

RATES = (16000, 22050, 32000, 44100, 48000)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = tiny_encoder()
    folder = tmp_path_factory.mktemp("hear") / "export"
    save_encoder(folder, encoder.encoder, encoder.student)
    return folder


def noise(items: int, seconds: float) -> torch.Tensor:
    return torch.rand((items, int(seconds * 16000)), generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("layer", ["", "#last", "#all", "#0"])
def test_hear_model_states_its_sizes(export: Path, layer: str) -> None:
    model = hear.load_model(f"{export}{layer}")
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in RATES
    wanted = {"": 48, "#last": 48, "#all": 32 + 48, "#0": 32}[layer]
    assert (model.scene_embedding_size, model.timestamp_embedding_size) == (wanted, wanted)
    assert type(model.scene_embedding_size) is int
    assert type(model.timestamp_embedding_size) is int


@pytest.mark.parametrize("seconds", [1.07, 1.98, 4.0])
def test_hear_timestamps_follow_the_rules(export: Path, seconds: float) -> None:
    model = hear.load_model(str(export), layer="all")
    embeddings, times = hear.get_timestamp_embeddings(noise(2, seconds), model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (*times.shape, model.timestamp_embedding_size)
    steps = times.diff(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 20.0))
    assert torch.equal(times[0], times[1])
    assert times.min() == 45.0
    assert 1000 * seconds - 65 <= times.max() <= 1000 * seconds


def test_hear_scene_embedding_is_the_mean_of_the_frames(export: Path) -> None:
    model = hear.load_model(str(export))
    audio = noise(4, 2.74)
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (4, model.scene_embedding_size)
    assert scenes.dtype == torch.float32
    torch.testing.assert_close(scenes, hear.get_timestamp_embeddings(audio, model)[0].mean(1), rtol=0, atol=0)
    alone = hear.get_scene_embeddings(audio[2:3], model)
    torch.testing.assert_close(alone[0], scenes[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 400, 800, 1000, 1360, 2000])
def test_hear_survives_short_audio(export: Path, samples: int) -> None:
    embeddings, times = hear.get_timestamp_embeddings(tone(samples)[None], hear.load_model(str(export)))
    assert embeddings.shape[1] == times.shape[1] >= 1
    assert float(times.max()) <= samples / 16 + 1e-3


def test_hear_reads_the_environment(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEAR_EXPORT", f"{export}#all")
    assert hear.load_model().scene_embedding_size == 80
