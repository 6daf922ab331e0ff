"""Finite scalar quantization of whitened principal components: rounding instead of a codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from spear.bounds import above, at_least
from spear.errors import ConfigError
from spear.quantizers.axes import principal_axes
from spear.quantizers.base import Quantizer, QuantizerConfig, check_fit_frames, take_normalizer
from spear.quantizers.clusters import MAX_ENTRIES, in_blocks
from spear.quantizers.normalize import Normalizer

MIN_DEVIATION = 1e-5
"""Smallest standard deviation that a component is divided by."""


class FSQ(Quantizer):
    """C groups of components, each component rounded to one of its levels; a group's levels make one code.

    A component z has mean 0 and variance 1 and takes level round((L - 1) / 2 * (1 + tanh(scale * z))) of 0..L-1: the bounded rounding of
    arXiv:2309.15505, section 3.1, without the shift that puts a learnt encoder's zero on a level. Levels l_1, l_2, ... of a
    group are the code l_1 + L_1 l_2 + L_1 L_2 l_3 + ..., K = L_1 L_2 L_3 .... There is no learnt encoder here: components are the principal
    axes, strongest first, dealt to the groups in turn. To decode, a level has the mean of the training components rounded to it.

    Args:
        levels: L_1, L_2, ... of one group, P of them. mean: (D,). axes: (D, C P) orthonormal. deviations: (C P,).
        values: (C P, max L) in units of the deviations. All float32. scale: see above.
    """

    kind: ClassVar[str] = "fsq"
    mean: Tensor
    axes: Tensor
    deviations: Tensor
    values: Tensor

    def __init__(
        self, levels: list[int], mean: Tensor, axes: Tensor, deviations: Tensor, values: Tensor, scale: float, normalizer: Normalizer | None = None
    ) -> None:
        super().__init__(axes.shape[0], axes.shape[1] // len(levels), math.prod(levels), normalizer)
        self.levels, self.scale = list(levels), scale
        for name, tensor in (("mean", mean), ("axes", axes), ("deviations", deviations), ("values", values)):
            self.register_buffer(name, tensor.float().clone())

    def components(self, frames: Tensor) -> Tensor:
        """(M, C P), mean 0 and variance 1 on the training frames, of normalised frames (M, D)."""
        return in_blocks(frames, self.dim, lambda block: (block - self.mean) @ self.axes) / self.deviations.clamp(min=MIN_DEVIATION)

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., C) of `code_dtype` for teacher frames (..., D).

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        rounded = round_to_levels(self.components(self.normalize(frames)), self.levels, self.scale)
        levels: Tensor = rounded.unflatten(1, (self.num_codebooks, -1))
        codes = (levels * self._places(rounded.device)).sum(dim=2)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Frames (M, D) of codes (M, C) int64 by the components that are coded, the mean in all others; normalised domain."""
        rounded = codes[:, :, None] // self._places(codes.device) % torch.tensor(self.levels, device=codes.device)
        components = self.values.gather(1, rounded.flatten(1).T).T * self.deviations
        return self.mean + components @ self.axes.T

    def _places(self, device: torch.device) -> Tensor:
        """(P,) int64: what one step of each level adds to the code."""
        return torch.tensor([math.prod(self.levels[:place]) for place in range(len(self.levels))], device=device)

    def settings(self) -> dict[str, Any]:
        """``levels`` and ``scale``."""
        return {"levels": self.levels, "scale": self.scale}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> FSQ:
        """See `Quantizer.from_state`."""
        levels, dim = [int(level) for level in config["levels"]], config["dim"]
        count = config["num_codebooks"] * len(levels)
        expected = {"mean": (dim,), "axes": (dim, count), "deviations": (count,), "values": (count, max(levels))}
        for name, shape in expected.items():
            if state[name].shape != shape:
                raise ValueError(f"`{name}` has shape {tuple(state[name].shape)}")
        if math.prod(levels) != config["codebook_size"]:
            raise ValueError(f"`levels` {levels} do not make `codebook_size` {config['codebook_size']}")
        mean, axes, deviations, values = (state[name] for name in expected)
        return cls(levels, mean, axes, deviations, values, float(config["scale"]), take_normalizer(config, state))


def round_to_levels(components: Tensor, levels: list[int], scale: float) -> Tensor:
    """Levels (M, C P) int64, 0 to L - 1, of components (M, C P); levels are those of one group of P."""
    half = (torch.tensor(levels, device=components.device).repeat(components.shape[1] // len(levels)) - 1) / 2
    return (half * (1 + torch.tanh(scale * components))).round().long()


def level_values(components: Tensor, rounded: Tensor, levels: list[int], scale: float) -> Tensor:
    """(C P, max L) float32: mean of the components (M, C P) rounded to each level; where there is none, the middle of the level."""
    most = max(levels)
    values = torch.zeros(components.shape[1], most)
    for index, (column, codes) in enumerate(zip(components.T, rounded.T)):
        count = levels[index % len(levels)]
        inside = torch.arange(count).double() / max(count - 1, 1) * 2 - 1
        middle = torch.atanh(inside * (1 - 0.5 / count)) / scale
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, codes, column.double())
        counts = torch.bincount(codes, minlength=count)
        values[index, :count] = torch.where(counts > 0, sums / counts.clamp(min=1), middle).float()
    return values


@dataclass(frozen=True, kw_only=True, slots=True)
class FSQConfig(QuantizerConfig):
    """FSQ (arXiv:2309.15505) on principal components. The paper's levels for about 2^8, 2^10 and 2^12: [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5]."""

    num_codebooks: int = 4
    """C, groups of components; C times the number of levels must not exceed D."""
    levels: list[int] = field(default_factory=lambda: [8, 6, 5])
    """Levels of each component of a group, strongest component first; their product is K, at most 65536."""
    scale: float = 0.8
    """Factor of a component before tanh: larger puts the levels closer to the mean. At 0.8 tanh follows the normal distribution function."""
    normalize: bool = True
    """Whether channels are normalised before the principal axes are found."""

    def __post_init__(self) -> None:
        at_least("num_codebooks", self.num_codebooks, 1)
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > MAX_ENTRIES:
            raise ConfigError(f"`levels` must be numbers of at least 2 with a product of at most {MAX_ENTRIES}, but is {self.levels}")
        above("scale", self.scale, 0)

    def sizes(self, dim: int) -> tuple[int, int]:
        """See `QuantizerConfig.sizes`."""
        if self.num_codebooks * len(self.levels) > dim:
            rule = f"times {len(self.levels)} levels must be at most {dim}, the width of the frames"
            raise ConfigError(f"`num_codebooks` {rule}, but is {self.num_codebooks}")
        return self.num_codebooks, math.prod(self.levels)

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> FSQ:
        """See `QuantizerConfig.fit`; nothing in it is random.

        Raises:
            ConfigError: more components than D. DataError: no frames, or non-finite ones.
        """
        check_fit_frames(train, heldout)
        self.sizes(train.shape[1])
        normalizer = Normalizer.fit(train) if self.normalize else None
        frames = train if normalizer is None else normalizer.apply_to(train)
        mean, variances, axes = principal_axes(frames)
        per_group = len(self.levels)
        dealt = [place * self.num_codebooks + group for group in range(self.num_codebooks) for place in range(per_group)]
        empty = torch.zeros(len(dealt), max(self.levels))
        quantizer = FSQ(self.levels, mean, axes[:, dealt], variances[dealt].sqrt(), empty, self.scale, normalizer)
        components = quantizer.components(frames)
        quantizer.values.copy_(level_values(components, round_to_levels(components, self.levels, self.scale), self.levels, self.scale))
        return quantizer
