"""A neural codec's own codes: its residual codebooks are taken over as they are, nothing is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from spear.bounds import at_least
from spear.errors import ConfigError, DataError
from spear.quantizers.base import Quantizer, QuantizerConfig, check_heldout
from spear.quantizers.clusters import in_blocks
from spear.quantizers.frame_source import FrameSource
from spear.types import CodecCodebooks

PAIRS = ("level_in", "level_out")


class Codec(Quantizer):
    """The codes that a codec itself gives its latents: residual vector quantization in one chain or several, see `CodecCodebooks`.

    EnCodec: arXiv:2210.13438, section 3.2; DAC's factorised codebooks: arXiv:2306.06546, section 3.2; Mimi's semantic codebook beside the
    acoustic ones: arXiv:2410.00037, section 3.3.3. Decoding gives the latents that the codec's decoder would hear.
    """

    kind: ClassVar[str] = "codec"
    entries: Tensor

    def __init__(self, own: CodecCodebooks) -> None:
        chains = own.chain_in is not None
        width = int(own.chain_in.shape[2]) if own.chain_in is not None else int((own.level_in[0] if own.level_in else own.entries).shape[2])
        super().__init__(width, own.entries.shape[0], own.entries.shape[1], None)
        if own.measure not in MEASURES or own.starts[:1] != (0,) or chains != (own.chain_out is not None):
            raise ValueError(f"`measure` {own.measure!r}, `starts` {own.starts} and the projections do not make a codec")
        self.measure, self.starts = own.measure, own.starts
        for name, tensor in state_of(own).items():
            self.register_buffer(name, tensor.detach().cpu().float().clone())

    def _rows(self, name: str, index: int) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of one projection, None where there is none."""
        found = dict(self.named_buffers())
        if name not in found:
            return None
        bias = found.get(f"{name}_bias")
        return found[name][index], None if bias is None else bias[index]

    def encode(self, frames: Tensor) -> Tensor:
        """Codes (..., C) of `code_dtype` for latents (..., D), the same that the codec's own encoder ends with.

        Raises:
            DataError: the width is not D, or a value is not finite.
        """
        rows = self.normalize(frames)
        codes = in_blocks(rows, 2 * self.codebook_size + 4 * self.dim, self._search)
        return codes.view(*frames.shape[:-1], self.num_codebooks).to(self.code_dtype)

    def _search(self, frames: Tensor) -> Tensor:
        """(M, C) int64 for latents (M, D)."""
        codes = []
        left = frames
        for level, entries in enumerate(self.entries):
            if level in self.starts:
                left = _through(frames, self._rows("chain_in", self.starts.index(level)))
            found = MEASURES[self.measure](_through(left, self._rows("level_in", level)), entries)
            left = left - _through(entries[found], self._rows("level_out", level))
            codes.append(found)
        return torch.stack(codes, dim=1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Latents (M, D) of codes (M, C) int64: what all codebooks give, added up."""
        chains: list[Tensor] = []
        for level, entries in enumerate(self.entries):
            given = _through(entries[codes[:, level]], self._rows("level_out", level))
            if level in self.starts:
                chains.append(given)
            else:
                chains[-1] = chains[-1] + given
        return torch.stack([_through(total, self._rows("chain_out", index)) for index, total in enumerate(chains)]).sum(dim=0)

    def settings(self) -> dict[str, Any]:
        """``measure`` and ``starts``."""
        return {"measure": self.measure, "starts": list(self.starts)}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Codec:
        """See `Quantizer.from_state`."""
        pairs = {name: (state[name], state[f"{name}_bias"]) for name in PAIRS if name in state}
        chains = {name: state[name] for name in ("chain_in", "chain_out") if name in state}
        quantizer = cls(CodecCodebooks(state["entries"], tuple(config["starts"]), str(config["measure"]), **chains, **pairs))  # type: ignore[arg-type]
        sizes = (quantizer.dim, quantizer.num_codebooks, quantizer.codebook_size, False)
        if sizes != (config["dim"], config["num_codebooks"], config["codebook_size"], config["normalize"]):
            raise ValueError(f"its codebooks are {quantizer.num_codebooks} x {quantizer.codebook_size} for frames of width {quantizer.dim}")
        return quantizer


def state_of(own: CodecCodebooks) -> dict[str, Tensor]:
    """Name in the weights file -> tensor, of what a codec has."""
    found = {"entries": own.entries, "chain_in": own.chain_in, "chain_out": own.chain_out}
    for name in PAIRS:
        found[name], found[f"{name}_bias"] = getattr(own, name) or (None, None)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def first_levels(own: CodecCodebooks, count: int) -> CodecCodebooks:
    """The first `count` codebooks alone, as the codec uses them at a lower rate.

    Raises:
        ConfigError: it has fewer.
    """
    if count > len(own.entries):
        raise ConfigError(f"`num_codebooks` must be at most {len(own.entries)}, the codebooks of the codec, but is {count}")
    starts = tuple(start for start in own.starts if start < count)
    cut: dict[str, Any] = {name: getattr(own, name)[: len(starts)] for name in ("chain_in", "chain_out") if getattr(own, name) is not None}
    cut |= {name: tuple(part[:count] for part in getattr(own, name)) for name in PAIRS if getattr(own, name) is not None}
    return own._replace(entries=own.entries[:count], starts=starts, **cut)


def _through(rows: Tensor, projection: tuple[Tensor, Tensor | None] | None) -> Tensor:
    return rows if projection is None else functional.linear(rows, *projection)


def _squared(rows: Tensor, entries: Tensor) -> Tensor:
    """Nearest by |x|^2 - 2 x.e + |e|^2, rounded in EnCodec's order."""
    return (rows.square().sum(1, keepdim=True) - 2 * rows @ entries.T + entries.T.square().sum(0, keepdim=True)).argmin(dim=1)


def _distance(rows: Tensor, entries: Tensor) -> Tensor:
    """Nearest by Euclidean distance, rounded as Mimi's."""
    return torch.cdist(rows[None], entries[None])[0].argmin(dim=1)


def _direction(rows: Tensor, entries: Tensor) -> Tensor:
    """Nearest of the directions, entries and rows brought to length 1."""
    return (functional.normalize(rows) @ functional.normalize(entries).T).argmax(dim=1)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"squared": _squared, "distance": _distance, "direction": _direction}


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig(QuantizerConfig):
    """The teacher's own codes, where it is a codec; targets of EnCodecMAE (arXiv:2309.07391). Features are needed for the card alone."""

    num_codebooks: int = 8
    """The first C of the codec's codebooks; 8 of EnCodec at 24 kHz are its 6 kbit/s."""

    def __post_init__(self) -> None:
        at_least("num_codebooks", self.num_codebooks, 1)

    def knowing(self, codebooks: Callable[[], CodecCodebooks]) -> QuantizerConfig:
        """See `QuantizerConfig.knowing`."""
        return KnownCodecConfig(num_codebooks=self.num_codebooks, codebooks=codebooks)

    def sizes(self, dim: int) -> tuple[int, int]:
        """See `QuantizerConfig.sizes`; K is the codec's."""
        num_codebooks, codebook_size, _ = self.own().entries.shape
        return num_codebooks, codebook_size

    def own(self) -> CodecCodebooks:
        """The first C codebooks of the teacher.

        Raises:
            ConfigError: the teacher is not known, has none or too few.
        """
        raise ConfigError("a quantizer of `type` codec takes the codebooks of its teacher, but was given none: use `knowing` first")

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Codec:
        """See `QuantizerConfig.fit`; neither frames nor seed change anything.

        Raises:
            ConfigError: see `own`. DataError: frames are of another width than the codec's latents, or none are held out.
        """
        return self.fit_source(FrameSource([train]), heldout, seed=seed, checkpoint=checkpoint)

    def fit_source(self, source: FrameSource, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> Codec:
        """See `QuantizerConfig.fit_source` and `fit`; the source is not read."""
        quantizer = Codec(self.own())
        if source.dim != quantizer.dim:
            raise DataError(f"a codec with latents of width {quantizer.dim} cannot code frames of width {source.dim}")
        check_heldout(heldout, quantizer.dim)
        return quantizer


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownCodecConfig(CodecConfig):
    """`CodecConfig` once the teacher is known; never part of a recipe."""

    codebooks: Callable[[], CodecCodebooks]
    """Gives the codec's codebooks."""

    def own(self) -> CodecCodebooks:
        """See `CodecConfig.own`."""
        return first_levels(self.codebooks(), self.num_codebooks)
