"""The two-phase gradient fit of MVQ, step by step as multi_quantization 0.1.1 does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spear.errors import ArtifactError
from spear.files import read_tensors, seed_from, write_tensors
from spear.progress import Meter
from spear.quantizers.mvq import MVQ
from spear.quantizers.normalize import Normalizer
from spear.quantizers.search import frame_costs, refine

ENTROPY_SCALE = 0.01
PHASE_ONE_SIZE, PHASE_TWO_SIZE = 16, 256
FIRST_RATE, SECOND_RATE = 0.005, 0.0025
SAVE_EVERY = 500


class MVQLosses(NamedTuple):
    """Scalars of one batch: squared error relative to the spread around the data mean; mean negative log-probability of the
    codes; how far the mean prediction, and the codes, are from uniform use (0 uniform, 1 a single entry)."""

    rel_reconstruction: Tensor
    logprob: Tensor
    logits_entropy: Tensor
    index_entropy: Tensor

    def total(self) -> Tensor:
        """What is minimised; the index entropy is for reading only."""
        return self.rel_reconstruction + self.logprob + ENTROPY_SCALE * self.logits_entropy


def mvq_losses(quantizer: MVQ, frames: Tensor, refine_iters: int) -> MVQLosses:
    """Losses of normalised frames (B, D); the codes found are constants, gradients reach every weight through one term each."""
    num, size = quantizer.num_codebooks, quantizer.entries
    logits = quantizer.logits(frames)
    codes = refine(quantizer.tables(), frame_costs(quantizer.tables(), frames), logits.argmax(dim=-1), refine_iters)
    rows = codes + torch.arange(num, device=codes.device) * size
    approximation = functional.embedding_bag(rows, quantizer.effective_centers().flatten(0, 1), mode="sum")
    spread = (frames - quantizer.data_mean()).square().sum()
    logprobs = logits.log_softmax(dim=-1)
    counts = torch.bincount(rows.flatten(), minlength=num * size).view(num, size) / len(frames)
    return MVQLosses(
        rel_reconstruction=(approximation - frames).square().sum() / (spread + 1e-20),
        logprob=-logprobs.gather(2, codes[..., None]).mean(),
        logits_entropy=_lost_entropy(logprobs.exp().mean(dim=0)),
        index_entropy=_lost_entropy(counts),
    )


def _lost_entropy(probabilities: Tensor) -> Tensor:
    """1 - H / ln K, averaged over codebooks, of probabilities (C, K)."""
    p = probabilities + 1e-20
    limit = math.log(p.shape[1])
    return (limit + (p * p.log()).sum(dim=1).mean()) / limit


def product(quantizer: MVQ, *, seed: int) -> MVQ:
    """Merge neighbouring codebooks 2c and 2c + 1 into one: entry k1 * K + k2 is the sum of entries k1 and k2.

    Every frame decodes as before; the new quantizer has half the codebooks, K^2 entries each, and a new identity.
    """
    num, size = quantizer.num_codebooks // 2, quantizer.codebook_size**2
    merged = MVQ(quantizer.dim, num, size, normalizer=quantizer.normalizer, seed=seed)

    def sums(x: Tensor) -> Tensor:
        pairs = x.view(num, 2, quantizer.codebook_size, -1)
        return (pairs[:, 0, :, None] + pairs[:, 1, None, :]).reshape(num * size, -1)

    with torch.no_grad():
        merged.to_logits.weight.copy_(sums(quantizer.to_logits.weight))
        merged.to_logits.bias.copy_(sums(quantizer.to_logits.bias).flatten())
        merged.centers.copy_(sums(quantizer.centers).view(num, size, -1))
        merged.logits_scale.copy_(quantizer.logits_scale)
        merged.centers_scale.copy_(quantizer.centers_scale)
    return merged.to(quantizer.device)


class TwoPhaseTrainer:
    """Adam on 2 * C codebooks of 16 entries, then, merged in pairs, on C codebooks of 256.

    Args:
        dim: D. num_codebooks: C after the merge. phase_one_iters, phase_two_iters: steps; phase one runs one more than its number.
        seed: initial weights. normalizer: kept in the quantizer; batches are normalised already.

    Attributes:
        quantizer: as it is now. step_count: steps made. rate: the learning rate of the next step.
    """

    def __init__(
        self, dim: int, num_codebooks: int, *, phase_one_iters: int, phase_two_iters: int, seed: int, normalizer: Normalizer | None = None
    ) -> None:
        self.phase_one_iters, self.phase_two_iters, self.seed = phase_one_iters, phase_two_iters, seed
        self.quantizer = MVQ(dim, 2 * num_codebooks, PHASE_ONE_SIZE, normalizer=normalizer, seed=seed)
        self.step_count = 0
        self._start_phase()

    def _start_phase(self) -> None:
        self.quantizer.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.quantizer.parameters(), lr=self.rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-6)

    @property
    def in_phase_one(self) -> bool:
        """Whether codebooks are not merged yet."""
        return self.step_count <= self.phase_one_iters

    @property
    def done(self) -> bool:
        """Whether both phases are over."""
        return self.step_count > self.phase_one_iters + self.phase_two_iters

    @property
    def rate(self) -> float:
        """Halved at every quarter of the phase's iterations; where quarters are not whole steps, only at those that are."""
        start, iters, first = (
            (0, self.phase_one_iters, FIRST_RATE) if self.in_phase_one else (self.phase_one_iters + 1, self.phase_two_iters, SECOND_RATE)
        )
        halvings = sum(1 for made in range(1, self.step_count - start + 1) if 4 * made % iters == 0)
        return first * 0.5**halvings

    def step(self, frames: Tensor, refine_iters: int) -> MVQLosses:
        """One update on normalised frames (B, D); returns the losses before it."""
        losses = mvq_losses(self.quantizer, frames, refine_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        losses.total().backward()
        self.optimizer.step()
        self.step_count += 1
        if self.step_count == self.phase_one_iters + 1:
            self.quantizer = product(self.quantizer, seed=seed_from(self.seed, "product"))
            self._start_phase()
        return MVQLosses(*(loss.detach() for loss in losses))

    def save(self, path: Path, signature: str) -> None:
        """Write weights, optimiser state and step to `path`; `signature` says what run they belong to."""
        tensors = {f"quantizer.{name}": value for name, value in self.quantizer.state_dict().items()}
        for name, parameter in self.quantizer.named_parameters():
            for field, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{field}.{name}"] = value
        tensors["step_count"] = torch.tensor(self.step_count)
        tensors["signature"] = torch.tensor(list(signature.encode()), dtype=torch.uint8)
        write_tensors(path, tensors)

    def load(self, path: Path, signature: str) -> None:
        """Continue from `path`.

        Raises:
            ArtifactError: the file is damaged or belongs to another run.
        """
        tensors = read_tensors(path)
        if bytes(tensors.get("signature", torch.empty(0, dtype=torch.uint8)).tolist()).decode() != signature:
            raise ArtifactError(f"{path} was saved by a fit with other settings or frames; remove it")
        self.step_count = int(tensors["step_count"])
        if not self.in_phase_one:
            self.quantizer = product(self.quantizer, seed=seed_from(self.seed, "product"))
        self.quantizer.load_state_dict({name[10:]: value for name, value in tensors.items() if name.startswith("quantizer.")})
        self._start_phase()
        for name, parameter in self.quantizer.named_parameters():
            found = {key.split(".")[1]: value for key, value in tensors.items() if key.startswith("adam.") and key.endswith(f".{name}")}
            if found:
                self.optimizer.state[parameter] = found


class Schedule(NamedTuple):
    """How `fit_two_phase` runs. batch_frames: B. phase_one_iters, phase_two_iters: steps of the phases."""

    batch_frames: int
    phase_one_iters: int
    phase_two_iters: int


def fit_two_phase(
    frames: Tensor,
    num_codebooks: int,
    schedule: Schedule,
    *,
    seed: int,
    normalizer: Normalizer | None,
    checkpoint: Path | None,
    signature: str,
    report: Callable[[TwoPhaseTrainer, MVQLosses], None] | None = None,
) -> MVQ:
    """Run both phases on normalised frames (M, D), shuffled once and read in contiguous windows, over and over.

    Each step refines twice with probability one half, else once, as the seed and the step decide.
    """
    trainer = TwoPhaseTrainer(
        frames.shape[1],
        num_codebooks,
        phase_one_iters=schedule.phase_one_iters,
        phase_two_iters=schedule.phase_two_iters,
        seed=seed,
        normalizer=normalizer,
    )
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint, signature)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed_from(seed, "shuffle")))
    window = min(schedule.batch_frames, len(frames))
    windows = len(frames) // window
    with Meter("quantizers: two-phase fit", schedule.phase_one_iters + schedule.phase_two_iters + 1, unit="steps") as meter:
        meter.advance(trainer.step_count)
        while not trainer.done:
            start = trainer.step_count % windows * window
            refine_iters = 1 + seed_from(seed, "refine", trainer.step_count) % 2
            losses = trainer.step(frames[order[start : start + window]], refine_iters)
            meter.advance()
            if report is not None:
                report(trainer, losses)
            if checkpoint is not None and trainer.step_count % SAVE_EVERY == 0:
                trainer.save(checkpoint, signature)
    return trainer.quantizer.requires_grad_(False)
