"""Latents of EnCodec, Mimi and DAC against transformers itself, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spear.errors import ConfigError
from spear.teachers import Teacher, extract
from spear.teachers.codec import causal_frames, centred_frames
from spear.teachers.huggingface import HuggingFaceConfig
from tests.teachers.codecs import KINDS, save
from tests.teachers.conftest import noise

RATES = {"encodec": (24000, 75.0, 160 / 24000, 16), "mimi": (24000, 12.5, 0.04, 32), "dac": (16000, 16000 / 512, 256 / 16000, 64)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("codecs")
    return {kind: save(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def teachers(folders: dict[str, Path]) -> dict[str, Teacher]:
    return {kind: HuggingFaceConfig(model=str(folder)).build() for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_codec_states_rate_and_gives_its_frames(teachers: dict[str, Teacher], kind: str) -> None:
    teacher = teachers[kind]
    rate, frames, first, dim = RATES[kind]
    assert (teacher.sample_rate, teacher.dim, teacher.num_layers, teacher.depends_on_padding) == (rate, dim, 1, True)
    assert teacher.frame_rate_hz == frames
    assert teacher.first_frame_s == pytest.approx(first)
    hop = round(rate / frames)
    for samples in (hop, 5 * hop - 1, 5 * hop, 5 * hop + 1, 16000):
        assert len(extract(teacher, [noise(samples)])[0]) == teacher.num_frames(samples)
    assert teacher.num_frames(hop - 1) == 0


@pytest.mark.parametrize("samples", [1920, 24000, 24001, 25000])
def test_codec_frames_follow_from_the_strides(samples: int) -> None:
    assert causal_frames(samples, [2, 4, 5, 8]) == -(-samples // 320)
    assert abs(centred_frames(samples, [2, 4, 8, 8]) - samples // 512) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_codec_latents_are_what_transformers_quantizes(folders: dict[str, Path], teachers: dict[str, Teacher], kind: str) -> None:
    import transformers as tf

    model: Any = tf.AutoModel.from_pretrained(folders[kind]).eval()
    audio = noise(24000)
    (found,) = extract(teachers[kind], [audio])
    latents = found.T[None]
    with torch.no_grad():
        out = model.encode(audio[None, None])
        if kind == "encodec":
            codes, expected = model.quantizer.encode(latents, model.config.target_bandwidths[0]).transpose(0, 1), out.audio_codes[0]
        elif kind == "mimi":
            codes, expected = model.quantizer.encode(latents, None).transpose(0, 1), out.audio_codes
        else:
            codes, expected = model.quantizer(latents, None)[1], out.audio_codes
    torch.testing.assert_close(codes, expected)
    assert len(set(expected.flatten().tolist())) > 1


@pytest.mark.parametrize("kind", ["encodec", "mimi"])
def test_causal_codec_hears_a_sample_first_in_the_frame_of_its_hop(teachers: dict[str, Teacher], kind: str) -> None:
    teacher = teachers[kind]
    hop = round(teacher.sample_rate / teacher.frame_rate_hz)
    audio = noise(30 * hop)
    (before,) = extract(teacher, [audio])
    for sample in (20 * hop, 21 * hop - 1):
        changed = audio.clone()
        changed[sample] += 1.0
        (after,) = extract(teacher, [changed])
        moved = (after - before).abs().amax(dim=1) > 1e-6
        assert moved.nonzero()[0].item() == 20


@pytest.mark.parametrize("kind", KINDS)
def test_codec_does_not_depend_on_batch_mates(teachers: dict[str, Teacher], kind: str) -> None:
    audio = [noise(16000, 1), noise(9000, 2), noise(16000, 3)]
    for item, found in zip(audio, extract(teachers[kind], audio)):
        assert (extract(teachers[kind], [item])[0] - found).abs().max() < 1e-5


def test_codec_raises_config_error_when_it_is_stereo(tmp_path: Path) -> None:
    save("encodec", tmp_path, audio_channels=2, normalize=True, chunk_length_s=1.0)
    with pytest.raises(ConfigError, match=r"`audio_channels` of a codec must be 1, but is 2"):
        HuggingFaceConfig(model=str(tmp_path)).build()


def test_codec_raises_config_error_when_another_layer_is_asked(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"`layer` must be between 0 and 0, but is 1"):
        HuggingFaceConfig(model=str(folders["mimi"]), layer=1).build()
