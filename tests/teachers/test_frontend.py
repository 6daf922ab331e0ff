"""Front ends against the feature extractors they replace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spear.teachers.frontend import decibel_mel, kaldi_log_mel, mel_filters, num_kaldi_frames
from tests.teachers.conftest import noise


@pytest.mark.parametrize("samples", [400, 559, 560, 16001])
def test_kaldi_log_mel_is_that_of_the_ast_extractor(samples: int) -> None:
    import transformers as tf

    extractor = tf.ASTFeatureExtractor(max_length=100, do_normalize=False)
    expected = extractor(noise(samples).numpy(), sampling_rate=16000)["input_values"][0]
    found = kaldi_log_mel(noise(samples), num_mel_bins=128, sample_rate=16000, window="hann")
    assert len(found) == num_kaldi_frames(samples) == (samples - 400) // 160 + 1
    np.testing.assert_allclose(found.numpy(), np.asarray(expected)[: len(found)], atol=1e-4)


def test_kaldi_log_mel_is_that_of_the_w2v_bert_extractor() -> None:
    import transformers as tf

    expected = tf.SeamlessM4TFeatureExtractor()(noise(4000).numpy(), sampling_rate=16000, do_normalize_per_mel_bins=False)["input_features"][0]
    found = kaldi_log_mel(noise(4000), num_mel_bins=80, sample_rate=16000, window="povey", scale=2.0**15)
    assert len(found) == 23  # an odd number: the last one has no neighbour to be stacked with
    np.testing.assert_allclose(found[:22].reshape(11, 160).numpy(), np.asarray(expected)[:11], atol=1e-4)


def test_num_kaldi_frames_is_zero_for_audio_shorter_than_a_frame() -> None:
    assert [num_kaldi_frames(n) for n in (0, 399, 400)] == [0, 0, 1]


def test_decibel_mel_of_a_tone_peaks_at_the_bin_around_its_frequency() -> None:
    time_s = torch.arange(16000) / 16000
    found = decibel_mel(0.5 * torch.sin(2 * torch.pi * 1000 * time_s), num_mel_bins=64, sample_rate=16000)
    assert found.shape == (64, 101)

    def mel(hz: float) -> float:
        return 2595 * float(np.log10(1 + hz / 700))

    expected = round(mel(1000) / (mel(8000) / 65)) - 1
    assert abs(int(found[:, 50].argmax()) - expected) <= 1


def test_decibel_mel_of_a_constant_power_follows_its_formula() -> None:
    audio = noise(8000)
    found = decibel_mel(audio, num_mel_bins=64, sample_rate=16000)
    padded = torch.nn.functional.pad(audio.double()[None], (256, 256), mode="reflect")[0]
    frame = padded[10 * 160 : 10 * 160 + 512] * torch.hann_window(512, dtype=torch.float64)
    power = torch.fft.rfft(frame).abs().square() @ mel_filters(64, 16000, 0.0, kaldi=False)
    torch.testing.assert_close(found[:, 10].double(), 10 * power.log10(), atol=1e-4, rtol=0)


def test_decibel_mel_floor_is_120_db_below_the_loudest() -> None:
    audio = torch.cat([noise(8000), torch.zeros(8000)]) * 100
    found = decibel_mel(audio, num_mel_bins=64, sample_rate=16000)
    assert float(found.max() - found.min()) <= 120.0 + 1e-4
