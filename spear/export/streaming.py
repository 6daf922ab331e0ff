"""Audio as it comes in, features as soon as they are known: a causal encoder behind its own log-mels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spear.data.fbank import HOP, WINDOW, fbank, num_fbank_frames
from spear.errors import ConfigError, DataError
from spear.export.audio import check_audio
from spear.models.base import Encoder
from spear.models.zipformer.encoder import ZipformerEncoder
from spear.models.zipformer.streaming import StreamState, ZipformerStream
from spear.models.zipformer.subsampling import CONVNEXT_REACH
from spear.types import LOG_EPSILON

MARGIN = 3
"""Log-mel frames kept before the next one, so that it does not see a mirrored edge."""
LATE = (WINDOW + HOP) // 2
"""Samples from a log-mel frame's begin on its grid to the last one it sees."""


class AudioStreamState(NamedTuple):
    """Everything a stream remembers.

    audio: (S,) the samples that are still needed. begin: log-mel frame at which they begin. frame: log-mel frame at which the next chunk
    begins. network: caches of the encoder.
    """

    audio: Tensor
    begin: int
    frame: int
    network: StreamState


class AudioStream:
    """Encodes one recording piece by piece; features are those of the chunk-masked pass over all of it.

    Only the end differs a little: the convolutions see padding after the last three frames, and the other frames of their chunk attend to
    these. Memory does not grow with time.

    Attributes:
        chunk_s: seconds of audio per chunk. look_ahead_s: seconds of audio after the centre of a chunk's last frame that the chunk waits for.
    Args:
        encoder: a causal Zipformer in eval mode. chunk_size, left_context_frames: at 50 Hz, one of those in its config; None for the only one.
    Raises:
        ConfigError: the encoder is no causal Zipformer, or the sizes are not in its config.
    """

    def __init__(self, encoder: Encoder, chunk_size: int | None = None, left_context_frames: int | None = None) -> None:
        if not isinstance(encoder, ZipformerEncoder):
            raise ConfigError(f"only a causal Zipformer streams, but this is a {type(encoder).__name__}")
        self.network = ZipformerStream(encoder, chunk_size, left_context_frames)
        self.chunk_s = self.network.hop_frames / 100
        last_centre = self.network.hop_frames - 2 + 4  # log-mel frame under the chunk's last frame
        self.look_ahead_s = (self.network.step_frames - 1 - last_centre) / 100 + (WINDOW / 2) / 16000
        self._bins, self._dim, self._halving = encoder.num_mel_bins, encoder.dim, encoder.config.output_downsampling_factor
        self._device = next(encoder.parameters()).device

    def start(self) -> AudioStreamState:
        """The state before the first sample."""
        return AudioStreamState(torch.zeros(0), 0, 0, self.network.start())

    def push(self, audio: Tensor | NDArray[np.floating[Any]], state: AudioStreamState) -> tuple[Tensor, AudioStreamState]:
        """Take in more audio.

        Args:
            audio: (S,) tensor or array, floating in [-1, 1] at 16 kHz, of any length. state: what the last call returned; it is not changed.
        Returns:
            features (1, T, D) of the chunks that are complete now, T may be 0, and the new state.
        Raises:
            DataError: wrong type, shape or range, or a value that is not finite.
        """
        audio = torch.as_tensor(audio)
        if audio.ndim != 1:
            raise DataError(f"audio must have the shape (S,), one channel, but has {tuple(audio.shape)}", cause="shape")
        if audio.numel() > 0:
            audio = check_audio(audio, None, torch.device("cpu"))[0][0]
        kept = torch.cat((state.audio, audio.cpu()))
        frame, network = state.frame, state.network
        complete = (state.begin * HOP + len(kept) - LATE) // HOP + 1
        pieces = [torch.zeros(1, 0, self._dim, device=self._device)]
        while complete - frame >= self.network.step_frames:
            mels = self._log_mels(kept, state.begin, frame, frame + self.network.step_frames)
            out = self.network.step(mels, torch.tensor([self.network.step_frames], device=self._device), network)
            pieces.append(out.features)
            frame, network = frame + self.network.hop_frames, out.state
        begin = max(state.begin, frame - MARGIN)
        return torch.cat(pieces, dim=1), AudioStreamState(kept[(begin - state.begin) * HOP :].clone(), begin, frame, network)

    def finish(self, state: AudioStreamState) -> Tensor:
        """Features (1, T, D) of what is left when the recording has ended; T may be 0."""
        frames = num_fbank_frames(state.begin * HOP + len(state.audio))
        network, frame = state.network, state.frame
        pieces = [torch.zeros(1, 0, self._dim, device=self._device)]
        while frame < frames and (frames - frame - 7) // 2 > 0:
            mels = self._log_mels(state.audio, state.begin, frame, min(frames, frame + self.network.step_frames))
            lens = min(self.network.step_frames, mels.shape[1] + 2 * CONVNEXT_REACH)
            padded = mels.new_full((1, self.network.step_frames, self._bins), LOG_EPSILON)
            padded[:, : mels.shape[1]] = mels
            out = self.network.step(padded, torch.tensor([lens], device=self._device), network)
            pieces.append(out.features[:, : -(-int(out.state.processed[0] - network.processed[0]) // self._halving)])
            frame, network = frame + self.network.hop_frames, out.state
        return torch.cat(pieces, dim=1)

    def _log_mels(self, audio: Tensor, begin: int, start: int, stop: int) -> Tensor:
        """(1, stop - start, F) of the recording whose samples from frame `begin` on are `audio`."""
        if len(audio) == 0:
            raise DataError("a stream that got no audio cannot be finished", cause="empty")
        first = max(begin, start - MARGIN)
        piece = audio[(first - begin) * HOP : (stop + MARGIN - begin) * HOP]
        return fbank(piece, self._bins)[None, start - first : stop - first].to(self._device)
