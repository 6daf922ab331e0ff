"""Settings of MVQ and the choice between its two fits."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from spear.errors import ConfigError, DataError
from spear.files import sha256_json
from spear.quantizers.base import QuantizerConfig, check_fit_frames, check_heldout
from spear.quantizers.frame_source import FrameSource
from spear.quantizers.mvq import MVQ, SearchMode, check_power_of_two
from spear.quantizers.mvq_alternating import Settings, fit_alternating
from spear.quantizers.mvq_reference import PHASE_TWO_SIZE, Schedule, fit_two_phase

logger = logging.getLogger(__name__)

_FEW_FRAMES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MVQConfig(QuantizerConfig):
    """Multi-codebook vector quantisation (arXiv:2211.00508), the targets of SPEAR (arXiv:2510.25955)."""

    num_codebooks: int = 16
    """C, a power of two. SPEAR: 16 for WavLM-Large, 8 for Dasheng-1.2B."""
    codebook_size: int = 256
    """K, a power of two of at least 2."""
    normalize: bool = True
    """Whether channels are normalised first, which weighs them equally."""
    search: SearchMode = "exact"
    """How codes are looked for. exact: as multi_quantization does. best: lowest error, twice the time. fast: no predictor, half the time."""
    solver: Literal["alternating", "reference"] = "alternating"
    """alternating: least squares by turns, short. reference: the two-phase gradient fit of multi_quantization, long."""
    frames_per_entry: int = 2
    """alternating: fewest frames per entry; with less data, codebooks use fewer entries."""
    rounds: int = 8
    """alternating: rounds of coordinate descent and least squares."""
    sweeps: int = 1
    """alternating: passes over the codebooks per round; beyond eight codebooks, rounds of the merge search."""
    epochs: int = 3
    """alternating: epochs of gradient steps on the centres, in batches of 128 C frames."""
    rate: float = 0.02
    """alternating: Adam's learning rate at the first step, relative to the data's standard deviation; it falls to zero."""
    polish_rounds: int = 3
    """alternating: most rounds with the encoder's own search, stopped early by the held-out loss."""
    noise: float = 0.5
    """alternating: perturbation of the centres in the first round, relative to a codebook's share of the spread."""
    ridge: float = 1.0
    """alternating: weight, in frames, that holds a centre at its last place; more where an entry has fewer than 50 frames."""
    phase_one_iters: int = 35000
    """reference: steps with 2C codebooks of 16 entries."""
    phase_two_iters: int = 35000
    """reference: steps with C codebooks of 256 entries."""
    batch_frames: int = 1024
    """reference: frames per step."""

    def __post_init__(self) -> None:
        if self.search not in get_args(SearchMode):
            raise ConfigError(f"`search` must be exact, best or fast, but is {self.search}")
        check_power_of_two("num_codebooks", self.num_codebooks)
        check_power_of_two("codebook_size", self.codebook_size)
        if self.codebook_size < 2 or self.codebook_size > 2**15:
            raise ConfigError(f"`codebook_size` must be between 2 and 32768, but is {self.codebook_size}")
        if self.solver == "reference" and self.codebook_size != PHASE_TWO_SIZE:
            raise ConfigError(f"`codebook_size` must be {PHASE_TWO_SIZE} with `solver: reference`, but is {self.codebook_size}")
        for name in ("frames_per_entry", "rounds", "sweeps", "phase_one_iters", "phase_two_iters", "batch_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be 1 or more, but is {getattr(self, name)}")
        for name in ("epochs", "rate", "polish_rounds", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` must be 0 or more, but is {getattr(self, name)}")
        if self.ridge <= 0:
            raise ConfigError(f"`ridge` must be above 0, but is {self.ridge}")

    def fit(self, train: Tensor, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> MVQ:
        """See `QuantizerConfig.fit`. A fit that was stopped and resumed from `checkpoint` ends in the same bytes.

        Raises:
            DataError: fewer frames than entries, or non-finite ones. ArtifactError: `checkpoint` belongs to another fit.
        """
        check_fit_frames(train, heldout)
        return self.fit_source(FrameSource([train]), heldout, seed=seed, checkpoint=checkpoint)

    def fit_source(self, source: FrameSource, heldout: Tensor, *, seed: int, checkpoint: Path | None = None) -> MVQ:
        """See `QuantizerConfig.fit_source`. alternating: frames are read in pieces, by all processes, which does not change the result."""
        check_heldout(heldout, source.dim)
        if len(source) < self.codebook_size:
            raise DataError(f"MVQ needs at least `codebook_size` {self.codebook_size} frames, but has {len(source)}", cause="too_few")
        signature = sha256_json({"config": asdict(self), "seed": seed, "frames": source.fingerprint()})
        source.measure(self.normalize)
        if len(source) < self.codebook_size * _FEW_FRAMES:
            logger.warning("quantizers: %d frames are few for %d entries, which fit them better than others", len(source), self.codebook_size)
        judged = heldout.float() if source.normalizer is None else source.normalizer.apply_to(heldout.float())
        quantizer = (self._by_turns if self.solver == "alternating" else self._by_schedule)(source, judged, seed, checkpoint, signature)
        quantizer.mode = self.search
        return quantizer

    def _by_turns(self, source: FrameSource, judged: Tensor, seed: int, checkpoint: Path | None, signature: str) -> MVQ:
        entries = self.entries_for(len(source))
        blank = MVQ(source.dim, self.num_codebooks, self.codebook_size, normalizer=source.normalizer, entries=entries, seed=seed)
        settings = Settings(self.rounds, self.sweeps, self.epochs, self.rate, self.polish_rounds, self.noise, self.ridge)
        return fit_alternating(source, judged, blank, settings, seed=seed, checkpoint=checkpoint, signature=signature)

    def _by_schedule(self, source: FrameSource, judged: Tensor, seed: int, checkpoint: Path | None, signature: str) -> MVQ:
        del judged
        schedule = Schedule(self.batch_frames, self.phase_one_iters, self.phase_two_iters)
        saved = checkpoint if source.rank == 0 else None  # every process makes the same steps
        frames = source.read(0, len(source))
        return fit_two_phase(frames, self.num_codebooks, schedule, seed=seed, normalizer=source.normalizer, checkpoint=saved, signature=signature)

    def entries_for(self, num_frames: int) -> int:
        """Entries a codebook can use: K, halved until each has `frames_per_entry` frames; at least 2."""
        entries = self.codebook_size
        while entries > 2 and entries * self.frames_per_entry > num_frames:
            entries //= 2
        if entries < self.codebook_size:
            logger.warning(
                "quantizers: %d frames allow %d of %d entries per codebook (%d frames each); extract more frames to use all",
                num_frames,
                entries,
                self.codebook_size,
                self.frames_per_entry,
            )
        return entries
