"""Recordings in windows: where they begin, what is cut where, what differs from the whole, and how much memory is held."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from spear.data.fbank import fbank, num_fbank_frames
from spear.errors import ConfigError, DataError
from spear.export import AudioEncoder
from spear.export.audio import read_audio
from spear.export.long_audio import AudioFile, Loaded, encode_windows, window_starts
from spear.models.base import StudentConfig
from spear.models.conformer import ConformerConfig
from spear.types import EncoderOutput
from tests.export.tiny import tiny_config, tiny_encoder, tone

RATE = 16000


def noise(seconds: float) -> torch.Tensor:
    """(S,) seeded noise on a tone, so that all frames differ."""
    samples = int(seconds * RATE)
    return tone(samples) + 0.05 * torch.randn(samples, generator=torch.Generator().manual_seed(0))


def without_attention(encoder: AudioEncoder) -> AudioEncoder:
    """Every frame depends on its neighbours only: attention adds nothing."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ("attn" in name and ".out_proj." in name) or "nonlin_attention.out_proj." in name or "attention.out_proj." in name:
                parameter.zero_()
    return encoder


def whole(encoder: AudioEncoder, audio: torch.Tensor) -> EncoderOutput:
    with torch.no_grad():
        found: EncoderOutput = encoder(audio)
    return found


@pytest.mark.parametrize("num_frames", [5, 999, 1000, 1015, 1016, 1017, 1500, 1799, 1800, 4321, 360_000])
def test_windows_cover_a_recording_and_begin_where_groups_begin(num_frames: int) -> None:
    window, hop, grid = 1000, 800, 16
    starts = window_starts(num_frames, window, hop, grid)
    assert starts[0] == 0
    assert all(start % grid == 0 for start in starts)
    steps = [after - before for before, after in pairwise(starts)]
    assert all(0 < step <= hop for step in steps)
    assert all(step == hop for step in steps[:-1])
    assert num_frames - starts[-1] < window + grid
    assert len(starts) == 1 or num_frames - starts[-1] >= window


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (tiny_config(), 4),
        (tiny_config(downsampling_factor=(2, 3)), 12),
        (tiny_config(output_downsampling_factor=2, downsampling_factor=(1, 1)), 4),
        (tiny_config(causal=True, chunk_size=6, left_context_frames=36), 12),
        (ConformerConfig(), 2),
    ],
)
def test_grid_is_the_common_multiple_of_all_groups_of_frames(config: StudentConfig, grid: int) -> None:
    assert config.grid() == grid


def test_windows_hear_the_log_mels_of_the_whole_recording_bit_for_bit() -> None:
    audio, heard = noise(6.37), []

    def encode(features: torch.Tensor) -> EncoderOutput:
        heard.append(features[0])
        frames = features[:, ::2, :1]
        return EncoderOutput(frames, torch.tensor([frames.shape[1]]), ())

    pieces = list(encode_windows(encode, Loaded(audio), num_mel_bins=128, frame_rate_hz=50.0, grid=4, window_s=2.0, overlap_s=0.5))
    expected = fbank(audio)
    starts = window_starts(num_fbank_frames(len(audio)), 200, 148, 4)
    assert len(pieces) == len(heard) == len(starts) > 3
    for start, features in zip(starts, heard):
        assert torch.equal(features, expected[start : start + len(features)])
    # frames of this encoder are every second log-mel: the joined pieces must be theirs, each exactly once
    assert torch.equal(torch.cat([piece.features for piece in pieces], dim=1)[0], expected[::2, :1])


@pytest.mark.parametrize("changes", [{}, {"output_downsampling_factor": 2}, {"downsampling_factor": (4, 2)}])
def test_long_is_the_whole_where_frames_depend_on_their_neighbours_only(changes: dict[str, Any]) -> None:
    encoder, audio = without_attention(tiny_encoder(**changes)), noise(9.03)
    expected = whole(encoder, audio)
    # the reach of all convolutions is below half the overlap
    found = encoder.encode_long(audio, window_s=3.0, overlap_s=1.5, hidden_states=True)
    assert found.lens.tolist() == expected.lens.tolist()
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=1e-5)
    for state, reference in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(state, reference, atol=1e-5, rtol=1e-5)


def test_long_differs_near_seams_only_where_the_overlap_is_short() -> None:
    encoder, audio = without_attention(tiny_encoder()), noise(9.0)
    expected, found = whole(encoder, audio).features[0], encoder.encode_long(audio, window_s=3.0, overlap_s=0.1).features[0]
    starts = window_starts(num_fbank_frames(len(audio)), 300, 288, 4)
    seams = [(after // 2 + before // 2 + (300 - 7) // 2) // 2 for before, after in pairwise(starts)]
    difference = (found - expected).abs().amax(dim=1)
    frames = torch.arange(len(difference))
    near = torch.stack([(frames - seam).abs() <= 20 for seam in seams]).any(dim=0)
    assert len(seams) == 3
    assert float(difference[~near].max()) < 1e-5
    # the last window is moved back, so that its overlap is long
    assert all(float(difference[seam - 20 : seam + 20].max()) > 1e-3 for seam in seams[:2])


def test_long_of_a_causal_encoder_is_the_whole_once_its_left_context_fits_the_overlap() -> None:
    encoder, audio = tiny_encoder(causal=True, chunk_size=8, left_context_frames=16), noise(9.0)
    expected = whole(encoder, audio)
    found = encoder.encode_long(audio, window_s=4.0, overlap_s=2.0)
    torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=1e-5)


def test_long_with_attention_differs_little_far_from_seams_and_keeps_every_frame() -> None:
    encoder, audio = tiny_encoder(), noise(12.0)
    expected, found = whole(encoder, audio), encoder.encode_long(audio, window_s=6.0, overlap_s=2.0)
    assert found.features.shape == expected.features.shape
    assert found.hidden_states == ()
    difference = (found.features - expected.features)[0].norm(dim=1) / expected.features[0].norm(dim=1)
    # untrained attention averages over the whole recording, which a window does not hear: small, but nowhere nothing
    assert float(difference.median()) < 0.1


def test_long_of_a_short_recording_is_the_recording_at_once() -> None:
    encoder = tiny_encoder()
    for samples in (160, 8000, 2 * RATE):
        assert torch.equal(encoder.encode_long(tone(samples), window_s=2.0, overlap_s=0.5).features, whole(encoder, tone(samples)).features)


def test_long_pieces_are_made_one_by_one_without_gradients() -> None:
    encoder, read = tiny_encoder(), []

    class Watched(Loaded):
        def read(self, start: int, stop: int) -> Any:
            read.append(stop - start)
            return super().read(start, stop)

    pieces = encoder.iter_long(Watched(noise(30.0)), window_s=2.0, overlap_s=0.5)
    first = next(pieces)
    assert len(read) == 1
    assert not first.features.requires_grad
    assert len(list(pieces)) == len(read) - 1 > 15
    assert max(read) <= 2.2 * RATE


def test_long_raises_config_error_when_the_overlap_does_not_fit() -> None:
    encoder, audio = tiny_encoder(), noise(5.0)
    for window_s, overlap_s in ((2.0, 1.1), (2.0, 0.05), (2.0, -0.5), (0.2, 0.19)):
        with pytest.raises(ConfigError, match=f"`overlap_s` must be at least 0.1, at most half of `window_s` {window_s:g} .*, but is {overlap_s:g}"):
            encoder.encode_long(audio, window_s=window_s, overlap_s=overlap_s)


def test_long_raises_data_error_when_audio_is_wrong() -> None:
    encoder = tiny_encoder()
    with pytest.raises(DataError, match=r"must be a tensor or an array of the shape \(S,\), but is \(2, 5\)"):
        encoder.encode_long(torch.zeros(2, 5))
    audio = noise(5.0)
    audio[4 * RATE] = float("nan")
    with pytest.raises(DataError, match="must be finite"):
        encoder.encode_long(audio, window_s=2.0, overlap_s=0.5)


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (16000, 2), (8000, 1), (44100, 2), (22050, 1)])
def test_audio_file_gives_the_pieces_of_the_whole_file(tmp_path: Path, rate: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.standard_normal((rate * 2 + 77, channels)), rate, subtype="FLOAT")
    expected, file = read_audio(tmp_path / "a.wav", RATE), AudioFile(tmp_path / "a.wav", RATE)
    assert len(file) == len(expected)
    for start, stop in ((0, len(file)), (0, 500), (12_345, 20_001), (len(file) - 333, len(file)), (16_000, 16_001)):
        torch.testing.assert_close(file.read(start, stop), expected[start:stop], atol=1e-6, rtol=1e-5)


def test_audio_file_raises_data_error_when_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    for name, match in (("none.wav", "is not a file"), ("text.wav", "cannot be decoded"), ("empty.wav", "has no samples")):
        with pytest.raises(DataError, match=f"{name} {match}"):
            AudioFile(tmp_path / name, RATE)
