"""Fit of MVQ by turns: codes for fixed centres, then better centres for fixed codes.

Start: product k-means. Rounds: coordinate descent (beyond eight codebooks the merge search) on perturbed centres (noise falls to
zero, so that poor local optima are left), then the least-squares centres for the codes found; but for the last, they take turns on
shares of the frames, where there are many. Epochs: Adam on the squared error of small batches, with a rate that falls to zero; its
steps are noisy, and end in better optima than least squares does. Polish: the search that encoding will use, then least squares, on
from the best of all rounds so far. Of all rounds, the one with the lowest held-out loss is kept.
Least squares fits p centres to n frames p/n too well, most of all along directions that codes explain little of. So its centres are
shrunk along each by what it explains by chance; without that, the held-out loss of 16 codebooks rises from round to round.
In rounds and polishing, codes are looked for from the prediction, as encoding does: codes that follow from those of an earlier round
come to rely on centres that the encoder cannot find. Between epochs they are kept, C numbers per frame, since a prediction would be
stale after a few steps. The predictor is a linear discriminant analysis of the last codes, in closed form.

Every step is a function of seed and frames, whatever the number of processes (see `spear.quantizers.frame_source`).
Sources: local search quantisation with stochastic relaxation (Martinez et al., ECCV 2018); Adam (arXiv:1412.6980); shrinkage
(James and Stein, Berkeley Symposium 1961).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from spear.errors import ArtifactError
from spear.files import read_tensors, seed_from, write_tensors
from spear.progress import Meter
from spear.quantizers.frame_source import UNIT_FRAMES, Draw, FrameSource, Sums
from spear.quantizers.merge_search import Tables
from spear.quantizers.mvq import MVQ
from spear.quantizers.mvq_start import start_centers
from spear.quantizers.mvq_statistics import Moments, Statistics
from spear.quantizers.search import frame_costs, make_tables, refine, sweep

logger = logging.getLogger(__name__)

_QUIET_ROUNDS = 1
_JUDGED_FRAMES = 2000
_EARLY_FRAMES = 15
_SAMPLE_FRAMES = 2**16
_BATCH_PER_CODEBOOK = 128
_EPOCH_ITERS, _POLISH_ITERS = 1, 5
_MOMENTA = (0.9, 0.98)
_EPSILON = 1e-9
_REACH = 16.0
_SCARCE_FRAMES = 50
_SWEPT_CODEBOOKS = 8


@dataclass(frozen=True)
class Settings:
    """rounds: with sweeps. sweeps: passes over the codebooks per round; rounds of the merge search where there are more than eight.
    epochs: of Adam. rate: of its first step, relative to the data's standard deviation. polish_rounds: most rounds with the encoder's
    search. noise: initial standard deviation of the perturbation, relative to a codebook's share of the data's. ridge: pull of a centre
    towards its last place, in frames; it rises where an entry has fewer than 50, in proportion.
    """

    rounds: int
    sweeps: int
    epochs: int
    rate: float
    polish_rounds: int
    noise: float
    ridge: float

    @property
    def last(self) -> int:
        """Rounds of all three kinds."""
        return self.rounds + self.epochs + self.polish_rounds


@dataclass
class _State:
    """Between rounds: centres (C, K, D), predictor (C*K, D) and (C*K,), Adam's two averages, rounds made, and the best round so far."""

    centers: Tensor
    weight: Tensor
    bias: Tensor
    first: Tensor
    second: Tensor
    best_centers: Tensor
    best_weight: Tensor
    best_bias: Tensor
    made: int = 0
    best_made: int = 0
    best_loss: float = float("inf")

    @classmethod
    def start(cls, centers: Tensor, weight: Tensor, bias: Tensor) -> _State:
        zeros = torch.zeros_like(centers)
        return cls(centers, weight, bias, zeros, zeros, centers, weight, bias)

    def save(self, path: Path, signature: str) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        # clones: the best round may be the present one, and safetensors stores no tensor twice
        tensors = {name: value.clone() for name, value in tensors.items()}
        write_tensors(path, {**tensors, "signature": torch.tensor(list(signature.encode()), dtype=torch.uint8)})

    @classmethod
    def load(cls, path: Path, signature: str) -> _State:
        tensors = read_tensors(path)
        if bytes(tensors.pop("signature", torch.empty(0, dtype=torch.uint8)).tolist()).decode() != signature:
            raise ArtifactError(f"{path} was saved by a fit with other settings or frames; remove it")
        made, best_made = (int(tensors.pop(name)) for name in ("made", "best_made"))
        loss = float(tensors.pop("best_loss"))
        return cls(**tensors, made=made, best_made=best_made, best_loss=loss)  # type: ignore[arg-type]


class _Fit:
    """What does not change during a fit, and the three kinds of rounds on a state."""

    def __init__(self, source: FrameSource, heldout: Tensor, blank: MVQ, settings: Settings, seed: int) -> None:
        self.source, self.blank, self.settings, self.seed = source, blank, settings, seed
        self.sizes = (blank.num_codebooks, blank.entries)
        self.judged = heldout[:: max(1, len(heldout) // _JUDGED_FRAMES)]
        self.moments = Moments(source)
        self.batch_frames = _BATCH_PER_CODEBOOK * self.sizes[0]
        self.codes = torch.full((len(source), self.sizes[0]), -1, dtype=torch.int16)

    def start(self) -> _State:
        """Product k-means of a sample, and the predictor of its codes."""
        num, size = self.sizes
        sample = self.source.sample(_SAMPLE_FRAMES)
        centers, codes = start_centers(sample, self.moments.covariance, num, size, self.seed)
        alone = FrameSource([sample])
        alone.peak = self.source.peak
        statistics = Statistics(self.sizes, alone, pairs=False)
        statistics.add(sample, codes)
        statistics.gather(alone)
        return _State.start(centers, *statistics.discriminants(self.moments))

    def advance(self, state: _State) -> None:
        """The next round; its result is judged and the best is kept. Polishing goes on from the best so far."""
        settings = self.settings
        if state.made == settings.rounds + settings.epochs:
            state.centers, state.weight, state.bias = state.best_centers, state.best_weight, state.best_bias
        if state.made < settings.rounds or state.made >= settings.rounds + settings.epochs:
            self._alternate(state)
        else:
            self._descend(state)
        state.made += 1
        loss = self._judge(state)
        if loss < state.best_loss:
            state.best_centers, state.best_weight, state.best_bias = state.centers, state.weight, state.bias
            state.best_loss, state.best_made = loss, state.made
        logger.info("quantizers: round %d of %d, held-out relative loss %.5f", state.made, settings.last, loss)

    def done(self, state: _State) -> bool:
        """Whether all rounds are made, or polishing no longer helps."""
        polished = state.made - self.settings.rounds - self.settings.epochs
        return state.made >= self.settings.last or (polished > 0 and state.made - state.best_made >= _QUIET_ROUNDS)

    def _guess(self, state: _State, frames: Tensor) -> Tensor:
        logits = torch.addmm(state.bias, frames, state.weight.T)
        return logits.view(-1, *self.sizes).argmax(dim=-1)

    def _alternate(self, state: _State) -> None:
        """Codes by sweeps on perturbed centres or, after the epochs, by the encoder's search; then centres by least squares."""
        settings, sweeping = self.settings, state.made < self.settings.rounds
        early = sweeping and state.made + 1 < settings.rounds
        step = max(1, round(self.source.num_units * UNIT_FRAMES / (_EARLY_FRAMES * state.bias.numel()))) if early else 1
        step = min(step, self.source.num_units)
        tables = make_tables(self._perturbed(state) if sweeping else state.centers)
        statistics = Statistics(self.sizes, self.source)
        for frames in self.source.units(state.made % step, step):
            costs, codes = frame_costs(tables, frames), self._guess(state, frames)
            found = self._sweep(tables, costs, codes) if sweeping else refine(tables, costs, codes, _POLISH_ITERS)
            statistics.add(frames, found)
        statistics.gather(self.source)
        pull = max(settings.ridge, _SCARCE_FRAMES * self.sizes[1] / len(self.source))
        state.centers = statistics.solve(state.centers, pull, self.moments)
        state.weight, state.bias = statistics.discriminants(self.moments)

    def _sweep(self, tables: Tables, costs: Tensor, codes: Tensor) -> Tensor:
        """Codes of a round. Where codebooks are many, coordinate descent from the prediction ends far from what encoding finds."""
        count = self.settings.sweeps
        return sweep(tables, costs, codes, count) if self.sizes[0] <= _SWEPT_CODEBOOKS else refine(tables, costs, codes, count)

    def _perturbed(self, state: _State) -> Tensor:
        """Centres with noise that falls to zero over the rounds."""
        scale = self.settings.noise * (1 - (state.made + 1) / self.settings.rounds)
        if not scale:
            return state.centers
        generator = torch.Generator().manual_seed(seed_from(self.seed, "noise", state.made))
        spread = self.moments.covariance.diagonal().clamp(min=0.0).sqrt().float() / self.sizes[0] ** 0.5
        return torch.add(state.centers, spread * torch.randn(state.centers.shape, generator=generator), alpha=scale)

    def _descend(self, state: _State) -> None:
        """One epoch of Adam. A frame's codes start from those of the epoch before; the second half's say how codes are predicted next."""
        epoch, batch = state.made - self.settings.rounds, self.batch_frames
        steps = self.source.steps(batch)
        statistics = Statistics(self.sizes, self.source, pairs=False)
        first, second = state.first.clone(), state.second.clone()
        for step, draws in enumerate(self.source.epoch(batch, seed_from(self.seed, "epoch", epoch))):
            gradient = self._gradient(state, draws, statistics if 2 * step >= steps - 1 else None)
            made = epoch * steps + step
            first.mul_(_MOMENTA[0]).add_(gradient, alpha=1 - _MOMENTA[0])
            second.mul_(_MOMENTA[1]).addcmul_(gradient, gradient, value=1 - _MOMENTA[1])
            average, square = (m / (1 - b ** (made + 1)) for m, b in zip((first, second), _MOMENTA))
            rate = self.settings.rate * self.moments.spread * (1 - made / (steps * self.settings.epochs))
            state.centers = state.centers - rate * average / (square.sqrt() + _EPSILON)
        state.first, state.second = first, second
        statistics.gather(self.source)
        state.weight, state.bias = statistics.discriminants(self.moments)

    def _gradient(self, state: _State, draws: list[Draw], statistics: Statistics | None) -> Tensor:
        """Mean gradient (C, K, D) of half the squared error over a batch, with respect to the centres; codes are constants.

        It is taken relative to the data's standard deviation.
        """
        tables, flat, offsets = make_tables(state.centers), state.centers.flatten(0, 1), torch.arange(self.sizes[0]) * self.sizes[1]
        total = Sums((len(flat), self.source.dim), _REACH * max(self.source.peak, 1e-15), self.batch_frames)
        for places, frames in draws:
            start = self.codes[places].long()
            if bool((start < 0).any()):  # frames seen for the first time
                start = torch.where(start < 0, self._guess(state, frames), start)
            codes = refine(tables, frame_costs(tables, frames), start, _EPOCH_ITERS)
            self.codes[places] = codes.to(self.codes.dtype)
            rows = codes + offsets
            total.add_at(rows, functional.embedding_bag(rows, flat, mode="sum") - frames)
            if statistics is not None:
                statistics.add(frames, codes)
        scale = self.batch_frames * max(self.moments.spread, 1e-15)
        return (total.total(self.source) / scale).float().view(state.centers.shape)

    def save(self, state: _State, path: Path, signature: str) -> None:
        """Write the state by rank 0 and, between epochs, the codes of each lane by the process that reads it."""
        lanes = self.source.lanes(self.batch_frames) if self._between_epochs(state) else []
        for lane, (start, stop) in enumerate(lanes):
            if self.source.owns(lane):
                write_tensors(self._lane_path(path, lane, state.made), {"codes": self.codes[start:stop]})
        self.source.wait()
        if self.source.rank == 0:
            state.save(path, signature)
            for old in path.parent.glob(f"{path.stem}-codes-*{path.suffix}"):
                if not lanes or not old.stem.endswith(f"-{state.made:03d}"):
                    old.unlink()

    def load(self, path: Path, signature: str) -> _State:
        """Read what `save` wrote, by any number of processes."""
        state = _State.load(path, signature)
        for lane, (start, stop) in enumerate(self.source.lanes(self.batch_frames) if self._between_epochs(state) else []):
            if self.source.owns(lane):
                self.codes[start:stop] = read_tensors(self._lane_path(path, lane, state.made))["codes"]
        return state

    def _between_epochs(self, state: _State) -> bool:
        return self.settings.rounds < state.made < self.settings.rounds + self.settings.epochs

    def _lane_path(self, path: Path, lane: int, made: int) -> Path:
        return path.with_name(f"{path.stem}-codes-{lane}-{made:03d}{path.suffix}")

    def _judge(self, state: _State) -> float:
        """Held-out loss, relative to the spread around the mean, of encoding as a user would."""
        fill(self.blank, state.centers, state.weight, state.bias)
        error = self.blank.reconstruct(self.blank.search(self.judged, _POLISH_ITERS)) - self.judged
        spread = (self.judged - self.judged.mean(dim=0)).double().square().sum()
        return self.source.agree(float(error.double().square().sum() / (spread + 1e-20)))[0]


@torch.no_grad()
def fit_alternating(
    source: FrameSource,
    heldout: Tensor,
    blank: MVQ,
    settings: Settings,
    *,
    seed: int,
    checkpoint: Path | None,
    signature: str,
) -> MVQ:
    """Fit on frames whose source was measured, judged on normalised held-out frames (H, D). All processes return the same.

    Args:
        blank: quantizer of the wanted sizes; its weights are set and it is returned.
        checkpoint: file to resume from and to save every round in, by rank 0. signature: what run the file belongs to.
    """
    fit = _Fit(source, heldout, blank, settings, seed)
    with Meter("quantizers: alternating fit", settings.last + 1, unit="rounds") as meter:
        resumed = any(source.agree(float(source.rank == 0 and checkpoint is not None and checkpoint.exists())))
        state = fit.load(checkpoint, signature) if resumed and checkpoint is not None else fit.start()
        meter.advance(state.made + 1)
        while not fit.done(state):
            fit.advance(state)
            if checkpoint is not None:
                fit.save(state, checkpoint, signature)
            meter.advance()
        source.wait()
    fill(blank, state.best_centers, state.best_weight, state.best_bias)
    return blank


def fill(quantizer: MVQ, centers: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Set the weights of `quantizer` from centres (C, k, D) and the predictor (C*k, D), (C*k,) of its k entries in use; others are zeros."""
    num, used, size = quantizer.num_codebooks, quantizer.entries, quantizer.codebook_size
    quantizer.centers.zero_()[:, :used] = centers
    quantizer.to_logits.weight.zero_().view(num, size, -1)[:, :used] = weight.view(num, used, -1)
    quantizer.to_logits.bias.zero_().view(num, size)[:, :used] = bias.view(num, used)
