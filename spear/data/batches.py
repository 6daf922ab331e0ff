"""Which cuts go together, and from cuts in memory to a padded Batch: mixing, log-mels, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear.data.fbank import SAMPLE_RATE
from spear.data.inputs import INPUTS
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
        num_mel_bins: F of the student. reads: kind of its input, a key of `spear.data.inputs.INPUTS`.
        mixer: mixes the items first; None for validation.
        keep_audio: also give the padded waveforms in ``Batch.audio``.
    """

    def __init__(
        self,
        specs: Mapping[str, TokenSpec],
        *,
        num_mel_bins: int = 128,
        mixer: Mixer | None = None,
        keep_audio: bool = False,
        reads: str = "fbank",
    ) -> None:
        self.specs, self.num_mel_bins, self.mixer, self.keep_audio, self.input = dict(specs), num_mel_bins, mixer, keep_audio, INPUTS[reads]

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
        features, feature_lens = self.input.batch(audio, lens, self.num_mel_bins)
        tokens: dict[str, Tensor] = {}
        token_lens: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        soft = self.mixer is not None and self.mixer.soft
        for teacher, spec in self.specs.items():
            tokens[teacher], token_lens[teacher] = pad_tokens(items, teacher, spec.num_codebooks)
            if soft:
                second[teacher], _ = pad_tokens(items, teacher, spec.num_codebooks, second=True)
        return Batch(
            ids=[item.id for item in items],
            domains=[item.domain for item in items],
            features=features,
            feature_lens=feature_lens,
            seconds=float(lens.sum()) / SAMPLE_RATE,
            tokens=tokens,
            token_lens=token_lens,
            second=second,
            second_share=torch.tensor([item.second_share for item in items], dtype=torch.float32) if soft else None,
            audio=audio if self.keep_audio else None,
            audio_lens=lens if self.keep_audio else None,
        )


def pad_tokens(items: Sequence[Item], teacher: str, num_codebooks: int, *, second: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens of one teacher.

    Args:
        second: those of the other cut of a soft mixture instead, in a tensor of the same size.
    Returns:
        (N, T, C) int64, IGNORE past each length, T at least 1; (N,) int64 lengths, 0 where an item has none.
    Raises:
        DataError: an item's tokens have another number of codebooks.
    """
    lens = [len(item.tokens.get(teacher, ())) for item in items]
    padded = np.full((len(items), max(1, *lens), num_codebooks), IGNORE, np.int64)
    for i, item in enumerate(items):
        row = (item.second if second else item.tokens).get(teacher)
        if row is not None:
            if row.shape[1:] != (num_codebooks,):
                message = f"tokens of {teacher} for cut {item.id}: must have {num_codebooks} codebooks, but have the shape {row.shape}"
                raise DataError(message, cause="tokens")
            padded[i, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor(lens, dtype=torch.int64)
