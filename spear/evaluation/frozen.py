"""An exported encoder as other people's harnesses call it: a path that names a layer, equally long waveforms in, frames out."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from spear.errors import ConfigError
from spear.export.encoder import AudioEncoder, load_encoder
from spear.types import EncoderOutput

VARIABLE = "SPEAR_EXPORT"
"""Environment variable that names the export where a harness cannot."""
LONG_S = 60.0
"""Longer recordings go through the encoder in windows (`AudioEncoder.encode_long`), as in ``spear encode``."""


def named_export(path: str) -> str:
    """`path`, or where it is empty what the environment variable ``SPEAR_EXPORT`` says.

    Raises:
        ConfigError: both are empty.
    """
    path = path or os.environ.get(VARIABLE, "")
    if not path:
        raise ConfigError(f"the harness gives no model path and the environment variable {VARIABLE} is not set: one must name an export")
    return path


def parse_model_path(path: str) -> tuple[str, str]:
    """Split ``EXPORT#LAYER`` into export and layer; without ``#LAYER`` the layer is ``last``.

    An existing path is taken as a whole, and so is what ends in something else than ``#last``, ``#all`` or ``#`` and a number.

    Args:
        path: export folder, Hugging Face id or checkpoint; empty: see `named_export`.
    Raises:
        ConfigError: no export is named.
    """
    path = named_export(path)
    export, mark, layer = path.rpartition("#")
    if mark and export and not Path(path).exists() and (layer in ("last", "all") or layer.isdecimal()):
        return export, layer
    return path, "last"


class FrozenFrames(nn.Module):
    """One layer of a frozen encoder, or all of them side by side.

    Attributes: encoder, layer, sample_rate (Hz), frame_rate_hz, first_frame_s (centre of frame 0), dim (D of the frames).
    Args:
        encoder: its parameters are frozen. layer: ``last``: the output; ``all``: every hidden state, concatenated; a number: that
            hidden state, 0 is the first. source: of the encoder, for messages.
    Raises:
        ConfigError: there is no such layer.
    """

    def __init__(self, encoder: AudioEncoder, layer: str | int = "last", source: str = "encoder") -> None:
        super().__init__()
        widths = encoder.encoder.layer_dims
        layer = str(layer)
        if layer not in ("last", "all") and not (layer.isdecimal() and int(layer) < len(widths)):
            raise ConfigError(f"`layer` must be last, all or a number between 0 and {len(widths) - 1}, but is {layer!r} ({source})")
        self.encoder, self.layer = encoder.requires_grad_(False), layer
        self.sample_rate: int = int(encoder.sample_rate)
        self.frame_rate_hz: float = float(encoder.frame_rate_hz)
        self.first_frame_s: float = float(encoder.first_frame_s)
        self.dim: int = int(sum(widths) if layer == "all" else encoder.dim if layer == "last" else widths[int(layer)])
        self.eval()

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Frames (N, T, D) float32 of waveforms (N, S) in [-1, 1] at `sample_rate`, on the encoder's device.

        Every item is taken to be S samples long: silence with which a harness fills up a batch is encoded as silence.

        Raises:
            DataError: wrong type, shape or range, or a value that is not finite.
        """
        if audio.ndim == 2 and audio.shape[1] > LONG_S * self.sample_rate:
            return torch.cat([self._select(self.encoder.encode_long(row, hidden_states=self.layer != "last")) for row in audio])
        return self._select(self.encoder(audio))

    def _select(self, output: EncoderOutput) -> Tensor:
        if self.layer == "last":
            return output.features.float()
        if self.layer == "all":
            return torch.cat(output.hidden_states, dim=2).float()
        return output.hidden_states[int(self.layer)].float()

    def times_ms(self, num_frames: int) -> Tensor:
        """Centres of frames 0 to `num_frames` - 1 in milliseconds from the start of the audio, (T,) float64; no step is accumulated."""
        return 1000.0 * (self.first_frame_s + torch.arange(num_frames, dtype=torch.float64) / self.frame_rate_hz)


def load_frames(path: str, layer: str | int | None = None) -> FrozenFrames:
    """Load an export for a harness.

    Args:
        path: ``EXPORT``, ``EXPORT#LAYER`` or nothing, see `parse_model_path`. layer: goes before what the path says.
    Raises:
        ConfigError: no export is named, or it has no such layer. CheckpointError: it is no encoder.
    """
    export, named = parse_model_path(path)
    return FrozenFrames(load_encoder(export), named if layer is None else layer, export)
