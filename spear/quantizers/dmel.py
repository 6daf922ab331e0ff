"""dMel: every bin of a log-mel frame rounded to one of a few intensities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from spear.bounds import within
from spear.errors import ConfigError
from spear.quantizers.base import Quantizer, QuantizerConfig, check_fit_frames

_SAMPLE_VALUES = 1 << 22


class DMel(Quantizer):
    """One codebook per channel, all of them the same K = 2^bits values low + j (high - low) / K; a channel's code is the nearest.

    arXiv:2407.15835: low and high are the least and the largest value of the training frames over all channels and times.
    It is meant for the frames of a ``logmel`` teacher, where C = D is the number of mel bins.

    Args:
        bounds: (2,) float32, low and high. bits: per channel.
    """

    kind: ClassVar[str] = "dmel"
    bounds: Tensor

    def __init__(self, dim: int, bits: int, bounds: Tensor) -> None:
        super().__init__(dim, dim, 2**bits, None)
        self.bits = bits
        self.register_buffer("bounds", bounds.float().clone())

    def _step(self) -> Tensor:
        return (self.bounds[1] - self.bounds[0]) / self.codebook_size

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., D) of `code_dtype` for teacher frames (..., D).

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        places = (self.normalize(frames) - self.bounds[0]) / self._step().clamp(min=1e-12)
        return places.round().clamp(0, self.codebook_size - 1).view(frames.shape).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Values (M, D) of codes (M, D) int64."""
        return self.bounds[0] + codes * self._step()

    def settings(self) -> dict[str, Any]:
        """``bits``."""
        return {"bits": self.bits}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> DMel:
        """See `Quantizer.from_state`."""
        quantizer = cls(config["dim"], int(config["bits"]), state["bounds"])
        if quantizer.bounds.shape != (2,):
            raise ValueError(f"`bounds` has shape {tuple(quantizer.bounds.shape)}")
        if (quantizer.num_codebooks, quantizer.codebook_size, False) != (config["num_codebooks"], config["codebook_size"], config["normalize"]):
            raise ValueError("`dim`, `bits`, `num_codebooks` and `codebook_size` contradict each other")
        return quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class DMelConfig(QuantizerConfig):
    """dMel (arXiv:2407.15835); the paper takes 80 mel bins and 4 bits."""

    bits: int = 4
    """Bits per channel, 1 to 8; K = 2^bits."""
    tail: float = 0.0
    """Share of the training values left outside at each end and clamped, such as digital silence; 0, the paper's: none."""

    def __post_init__(self) -> None:
        within("bits", self.bits, 1, 8)
        if not 0 <= self.tail < 0.5:
            raise ConfigError(f"`tail` must be in [0, 0.5), but is {self.tail}")

    def sizes(self, dim: int) -> tuple[int, int]:
        """See `QuantizerConfig.sizes`."""
        return dim, 2**self.bits

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> DMel:
        """See `QuantizerConfig.fit`; nothing in it is random.

        Raises:
            DataError: no frames, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        values = train.flatten()
        if self.tail:
            values = values[:: max(1, len(values) // _SAMPLE_VALUES)].sort().values
            cut = int(self.tail * len(values))
            values = values[cut : len(values) - cut]
        return DMel(train.shape[1], self.bits, torch.stack([values.min(), values.max()]))
