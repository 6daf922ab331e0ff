"""Which cuts go together, and from cuts in memory to a padded Batch: mixing, log-mels, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear.data.fbank import SAMPLE_RATE, fbank_batch
from spear.data.mixing import Mixer
from spear.data.shards import Item
from spear.errors import DataError
from spear.types import IGNORE, Batch, TokenSpec


def batches_of(cuts: Iterable[Any], batch_s: float) -> list[list[Any]]:
    """Cuts of like durations together, short ones first; depends on the set of cuts only.

    Args:
        cuts: with ``id`` and ``duration`` in seconds. batch_s: most seconds per batch, padding counted; a longer cut stands alone.
    """
    batches: list[list[Any]] = []
    for cut in sorted(cuts, key=lambda cut: (cut.duration, cut.id)):
        if not batches or (len(batches[-1]) + 1) * cut.duration > batch_s:
            batches.append([])
        batches[-1].append(cut)
    return batches


class BatchBuilder:
    """Makes batches for a student.

    Args:
        specs: teacher -> what its tokens are; every batch has a row of each for each item.
        num_mel_bins: F of the student.
        mixer: mixes the items first; None for validation.
        keep_audio: also give the padded waveforms in ``Batch.audio``.
    """

    def __init__(self, specs: Mapping[str, TokenSpec], *, num_mel_bins: int = 128, mixer: Mixer | None = None, keep_audio: bool = False) -> None:
        self.specs, self.num_mel_bins, self.mixer, self.keep_audio = dict(specs), num_mel_bins, mixer, keep_audio

    def __call__(self, items: Sequence[Item], seed: int, g: int) -> Batch:
        """Make batch `g` of `items`.

        A teacher that an item's domain does not use has a row of IGNORE and length 0.

        Raises:
            DataError: there are no items.
        """
        if not items:
            raise DataError("a batch must have at least one cut, but has none", cause="empty")
        if self.mixer is not None:
            items = self.mixer(items, seed, g)
        lens = torch.tensor([len(item.audio) for item in items], dtype=torch.int64)
        audio = torch.zeros(len(items), int(lens.max()))
        for row, item in zip(audio, items):
            row[: len(item.audio)] = torch.from_numpy(item.audio)
        features, feature_lens = fbank_batch(audio, lens, self.num_mel_bins)
        tokens: dict[str, Tensor] = {}
        token_lens: dict[str, Tensor] = {}
        for teacher, spec in self.specs.items():
            tokens[teacher], token_lens[teacher] = pad_tokens(items, teacher, spec.num_codebooks)
        return Batch(
            ids=[item.id for item in items],
            domains=[item.domain for item in items],
            features=features,
            feature_lens=feature_lens,
            seconds=float(lens.sum()) / SAMPLE_RATE,
            tokens=tokens,
            token_lens=token_lens,
            audio=audio if self.keep_audio else None,
            audio_lens=lens if self.keep_audio else None,
        )


def pad_tokens(items: Sequence[Item], teacher: str, num_codebooks: int) -> tuple[Tensor, Tensor]:
    """Tokens of one teacher.

    Returns:
        (N, T, C) int64, IGNORE past each length, T at least 1; (N,) int64 lengths, 0 where an item has none.
    Raises:
        DataError: an item's tokens have another number of codebooks.
    """
    rows = [item.tokens.get(teacher) for item in items]
    lens = [0 if row is None else len(row) for row in rows]
    padded = np.full((len(items), max(1, *lens), num_codebooks), IGNORE, np.int64)
    for i, (item, row) in enumerate(zip(items, rows)):
        if row is not None:
            if row.shape[1:] != (num_codebooks,):
                message = f"tokens of {teacher} for cut {item.id}: must have {num_codebooks} codebooks, but have the shape {row.shape}"
                raise DataError(message, cause="tokens")
            padded[i, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor(lens, dtype=torch.int64)
