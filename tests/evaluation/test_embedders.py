"""Embedders: time axes, shapes, context, tokens, padding."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from spear.data.fbank import fbank
from spear.errors import DataError
from spear.evaluation.embedders import Encoded, LogMel, TeacherFrames
from spear.types import EncoderOutput


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def test_logmel_averages_pairs_of_frames() -> None:
    audio = noise(16000)
    frames = fbank(torch.from_numpy(audio)).numpy()
    (found,) = LogMel().embed(audio)
    assert found.shape == (50, 128)
    np.testing.assert_allclose(found[3], (frames[6] + frames[7]) / 2, rtol=1e-6)


def test_logmel_times_are_the_centres_of_the_pairs() -> None:
    # 10 ms frames are centred at 5, 15, 25, ... ms
    np.testing.assert_allclose(LogMel().times(3), [0.01, 0.03, 0.05])


def test_logmel_puts_a_click_on_the_frame_that_holds_its_time() -> None:
    audio = 1e-3 * noise(16000)
    audio[int(0.507 * 16000)] = 1.0
    embedder = LogMel()
    (found,) = embedder.embed(audio)
    loudest = embedder.times(50)[found.mean(axis=1).argmax()]
    assert abs(loudest - 0.507) <= 0.5 / embedder.frame_rate_hz


def test_logmel_context_holds_the_neighbours_and_repeats_the_edges() -> None:
    audio = noise(8000)
    (plain,), (wide,) = LogMel().embed(audio), LogMel(context=3).embed(audio)
    assert wide.shape == (25, 7 * 128)
    np.testing.assert_array_equal(wide[10].reshape(7, 128), plain[7:14])
    np.testing.assert_array_equal(wide[0].reshape(7, 128)[:4], np.repeat(plain[:1], 4, axis=0))


def test_logmel_raises_data_error_when_audio_is_too_short() -> None:
    with pytest.raises(DataError, match="at least 20 ms of audio, but got 100 samples"):
        LogMel().embed(noise(100))


class Halves:
    """A quantizer of one bit per channel."""

    def encode(self, frames: Tensor) -> Tensor:
        return (frames > 0).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() * 2 - 1


def extract(audios: list[Tensor]) -> list[Tensor]:
    return [audio[: len(audio) // 320 * 320].reshape(-1, 320)[:, :4] for audio in audios]


def test_teacher_frames_are_rebuilt_from_tokens_utterance_by_utterance() -> None:
    teacher = SimpleNamespace(sample_rate=16000, frame_rate_hz=50.0, first_frame_s=0.01)
    plain, rebuilt = TeacherFrames("speech", teacher, extract), TeacherFrames("speech", teacher, extract, quantizer=Halves())
    audios = [noise(3200), noise(1600, 1)]
    for (frames,), (again,) in zip(plain.embed_batch(audios), rebuilt.embed_batch(audios)):
        np.testing.assert_array_equal(again, np.where(frames > 0, 1.0, -1.0))
    assert (plain.name, rebuilt.name, rebuilt.kind) == ("teacher_speech", "tokens_speech", "tokens")


def fake_encoder(audio: Tensor, lens: Tensor) -> EncoderOutput:
    """Two layers and an output at 25 Hz."""
    frames = audio[:, : audio.shape[1] // 640 * 640].reshape(len(audio), -1, 640)[:, :, :3]
    return EncoderOutput(frames[:, :, :2], lens // 640, (frames, frames + 1))


def test_encoded_gives_layers_and_output_on_one_time_axis() -> None:
    embedder = Encoded("student", fake_encoder, num_layers=2, frame_rate_hz=25.0, first_frame_s=0.055)
    long, short = embedder.embed_batch([noise(6400), noise(3200, 1)])
    assert embedder.layer_names == ["layer 1", "layer 2", "output"]
    assert [x.shape for x in long] == [(10, 3), (10, 3), (10, 2)]
    assert [x.shape for x in short] == [(5, 3), (5, 3), (5, 2)]
    np.testing.assert_array_equal(short[1], embedder.embed(noise(3200, 1))[1])


def test_encoded_raises_data_error_when_a_layer_is_missing() -> None:
    embedder = Encoded("student", fake_encoder, num_layers=3, frame_rate_hz=25.0, first_frame_s=0.055)
    with pytest.raises(DataError, match="must give 3 hidden states, but gives 2"):
        embedder.embed(noise(3200))


def test_encoded_raises_data_error_when_a_layer_has_another_rate() -> None:
    def forward(audio: Tensor, lens: Tensor) -> EncoderOutput:
        output = fake_encoder(audio, lens)
        return output._replace(hidden_states=(output.hidden_states[0].repeat_interleave(2, dim=1), output.hidden_states[1]))

    embedder = Encoded("student", forward, num_layers=2, frame_rate_hz=25.0, first_frame_s=0.055)
    with pytest.raises(DataError, match="must all have its frame rate, but have \\[10, 5, 5\\] frames"):
        embedder.embed(noise(3200))
