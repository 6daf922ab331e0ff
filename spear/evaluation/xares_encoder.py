"""The X-ARES interface: any export under ``python -m xares.run``.

    SPEAR_EXPORT=EXPORT python -m xares.run --max-jobs 0 spear/evaluation/xares_encoder.py TASK.py

The harness turns that path into a module's name, so that the installed package is found from any folder. It wants exactly one name in
the module that ends in ``Encoder``, and makes it without arguments: the environment says which export.
Source: the interface that X-ARES checks (arXiv:2505.16369; github.com/jimbozhang/xares).
"""

from __future__ import annotations

from torch import Tensor, nn

from spear.evaluation.frozen import load_frames


class SpearEncoder(nn.Module):
    """The export named by the environment variable ``SPEAR_EXPORT``, as ``EXPORT`` or ``EXPORT#LAYER`` (`spear.evaluation.frozen`).

    Attributes: sampling_rate (Hz), output_dim (D), hop_size_in_ms (milliseconds from frame to frame).
    Raises:
        ConfigError: the variable is not set, or the export has no such layer. CheckpointError: it is no encoder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frames = load_frames("")
        self.sampling_rate: int = self.frames.sample_rate
        self.output_dim: int = self.frames.dim
        self.hop_size_in_ms: float = 1000.0 / self.frames.frame_rate_hz

    def forward(self, audio: Tensor) -> Tensor:
        """Frames (N, T, D) float32 of waveforms (N, S) or (S,) at `sampling_rate`; errors as of `FrozenFrames`."""
        frames: Tensor = self.frames(audio)
        return frames
