"""A codec's own codes against transformers, on tiny random models of all three families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json, write_json
from spear.quantizers import load_quantizer
from spear.quantizers.base import CONFIG
from spear.quantizers.card import card, write_card
from spear.quantizers.codec import Codec, CodecConfig
from spear.quantizers.frame_source import FrameSource
from spear.teachers import Teacher, extract
from spear.teachers.huggingface import HuggingFaceConfig
from spear.teachers.logmel import LogMelConfig
from spear.types import CodecCodebooks
from tests.teachers.codecs import KINDS, save
from tests.teachers.conftest import noise

LEVELS = {"encodec": 80, "mimi": 4, "dac": 2, "mimi_plain": 3}
"""Codebooks of the models here; mimi_plain has no projections and two semantic codebooks."""
SETTINGS = {"mimi_plain": {"vector_quantization_hidden_dimension": 32, "codebook_dim": 32, "num_quantizers": 3, "num_semantic_quantizers": 2}}
each = pytest.mark.parametrize("name", LEVELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("codecs")
    return {name: save(name.partition("_")[0], root / name, **SETTINGS.get(name, {})) for name in LEVELS}


@pytest.fixture(scope="module")
def teachers(folders: dict[str, Path]) -> dict[str, Teacher]:
    return {name: HuggingFaceConfig(model=str(folder)).build() for name, folder in folders.items()}


def fit(teacher: Teacher, frames: Tensor, num_codebooks: int) -> Codec:
    known: Any = CodecConfig(num_codebooks=num_codebooks).knowing(teacher.codebooks)
    assert known.sizes(teacher.dim) == (num_codebooks, 16)
    return known.fit(frames, frames, seed=0)


@torch.no_grad()
def transformers_codes(folder: Path, audio: Tensor, num_codebooks: int) -> Tensor:
    """(T, C), what the model's own ``encode`` says."""
    import transformers as tf

    model: Any = tf.AutoModel.from_pretrained(folder).eval()
    kind = model.config.model_type
    if kind == "encodec":  # asked by its rate in kbit/s: 75 Hz times 4 bits for each codebook
        model.config.target_bandwidths = [*model.config.target_bandwidths, num_codebooks * 0.3 + 1e-6]
        return model.encode(audio[None, None], bandwidth=model.config.target_bandwidths[-1]).audio_codes[0, 0].T
    key = {"mimi": "num_quantizers", "dac": "n_quantizers"}[kind]
    return model.encode(audio[None, None], **{key: num_codebooks}).audio_codes[0].T


@each
@pytest.mark.parametrize("fewer", [0, 1])
def test_codec_codes_are_those_of_the_models_own_encode(folders: dict[str, Path], teachers: dict[str, Teacher], name: str, fewer: int) -> None:
    audio = noise(48000)
    (frames,) = extract(teachers[name], [audio])
    num_codebooks = LEVELS[name] - fewer
    quantizer = fit(teachers[name], frames, num_codebooks)
    expected = transformers_codes(folders[name], audio, num_codebooks)
    assert expected.shape == (len(frames), num_codebooks)
    assert torch.equal(quantizer.encode(frames).long(), expected)
    assert len(set(expected.flatten().tolist())) > 1


@each
def test_codec_codes_any_frames_as_the_models_quantizer_does_and_decodes_to_what_its_decoder_hears(
    folders: dict[str, Path], teachers: dict[str, Teacher], name: str
) -> None:
    import transformers as tf

    model: Any = tf.AutoModel.from_pretrained(folders[name]).eval()
    teacher = teachers[name]
    frames = 0.2 * torch.randn(300, teacher.dim, generator=torch.Generator().manual_seed(5))
    quantizer = fit(teacher, frames, LEVELS[name])
    codes = quantizer.encode(frames).long()
    with torch.no_grad():
        if name == "dac":
            expected = model.quantizer(frames.T[None])[1]  # (1, C, T)
            decoded = model.quantizer.from_codes(expected)[0]
        else:
            found = model.quantizer.encode(frames.T[None], None)  # (C, 1, T)
            expected = found.transpose(0, 1)
            decoded = model.quantizer.decode(found if name == "encodec" else expected)
    assert torch.equal(codes, expected[0].T)
    assert all(len(set(column.tolist())) > 4 for column in codes.T)
    torch.testing.assert_close(quantizer.decode(codes), decoded[0].T, atol=1e-5, rtol=1e-5)


@each
def test_codec_is_saved_whole_and_has_a_card(teachers: dict[str, Teacher], tmp_path: Path, name: str) -> None:
    (frames,) = extract(teachers[name], [noise(48000)])
    quantizer = fit(teachers[name], frames, LEVELS[name])
    quantizer.save(tmp_path)
    again = load_quantizer(tmp_path)
    codes = again.encode(frames)
    assert torch.equal(codes, quantizer.encode(frames))
    assert torch.equal(codes, torch.cat([again.encode(piece) for piece in frames.split(11)]))
    assert again.encode(frames[:0].view(3, 0, frames.shape[1])).shape == (3, 0, LEVELS[name])
    found = card(again, frames)
    error = (again.decode(codes) - frames).double().square().sum() / (frames - frames.mean(dim=0)).double().square().sum()
    assert found["relative_loss"] == pytest.approx(float(error), rel=1e-4)
    assert (found["type"], found["normalize"]) == ("codec", False)
    write_card(tmp_path, found, again, frames)
    assert "`codec`" in (tmp_path / "card.md").read_text()


def test_codec_loses_nothing_where_frames_are_sums_of_its_entries() -> None:
    entries = torch.tensor([[[8.0, 0.0], [0.0, 8.0]], [[1.0, 0.0], [0.0, -1.0]]])
    quantizer = Codec(CodecCodebooks(entries, (0,), "squared"))
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    frames = quantizer.decode(codes)
    assert frames.tolist() == [[9.0, 0.0], [8.0, -1.0], [1.0, 8.0], [0.0, 7.0]]
    assert torch.equal(quantizer.encode(frames).long(), codes)
    beside = Codec(CodecCodebooks(entries, (0, 1), "squared"))  # the second codebook hears the frame, not what is left of it
    assert beside.encode(frames).tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]


def test_codec_of_many_entries_gives_two_bytes_a_code() -> None:
    quantizer = Codec(CodecCodebooks(torch.randn(2, 1024, 4, generator=torch.Generator().manual_seed(1)), (0,), "distance"))
    assert quantizer.encode(torch.randn(5, 4)).dtype == torch.int16
    assert quantizer.bits_per_frame == 20


def test_codec_raises_config_error_when_it_has_too_few_codebooks(teachers: dict[str, Teacher]) -> None:
    with pytest.raises(ConfigError, match=r"`num_codebooks` must be at most 2, the codebooks of the codec, but is 3"):
        CodecConfig(num_codebooks=3).knowing(teachers["dac"].codebooks).sizes(64)


def test_codec_raises_config_error_when_the_teacher_is_none_or_unknown() -> None:
    with pytest.raises(ConfigError, match=r"needs a teacher with codebooks of its own \(EnCodec, DAC, Mimi\), but .* has none"):
        CodecConfig().knowing(LogMelConfig().build().codebooks).sizes(80)
    with pytest.raises(ConfigError, match="was given none"):
        CodecConfig().fit(torch.zeros(3, 4), torch.zeros(3, 4), seed=0)


def test_codec_raises_data_error_when_frames_are_not_its_latents(teachers: dict[str, Teacher]) -> None:
    known = CodecConfig(num_codebooks=2).knowing(teachers["dac"].codebooks)
    with pytest.raises(DataError, match="latents of width 64 cannot code frames of width 12"):
        known.fit_source(FrameSource([torch.zeros(5, 12)]), torch.zeros(5, 12), seed=0)


@pytest.mark.parametrize(("key", "value"), [("codebook_size", 32), ("starts", [1]), ("measure", "angle")])
def test_load_quantizer_raises_artifact_error_when_a_codecs_description_was_changed(
    teachers: dict[str, Teacher], tmp_path: Path, key: str, value: object
) -> None:
    fit(teachers["encodec"], torch.randn(40, 16), 3).save(tmp_path)
    write_json(tmp_path / CONFIG, {**read_json(tmp_path / CONFIG), key: value})
    with pytest.raises(ArtifactError, match="does not fit config.json"):
        load_quantizer(tmp_path)


def test_every_family_of_codecs_is_tried_here() -> None:
    assert set(KINDS) <= set(LEVELS)
