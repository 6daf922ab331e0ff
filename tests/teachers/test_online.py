"""Teachers beside the student: the tokens of the store, for the domains that use them, on whatever audio the batch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear.data.batches import BatchBuilder
from spear.data.shards import Item
from spear.quantizers.kmeans import KMeansConfig
from spear.teachers.base import Teacher, extract
from spear.teachers.huggingface import HuggingFaceConfig
from spear.teachers.layers import LayersConfig
from spear.teachers.logmel import LogMelConfig
from spear.teachers.online import LabelledSource, Labeller, Target, by_length, resampled
from spear.types import IGNORE, Batch, TokenSpec
from tests.teachers.conftest import noise

CPU = torch.device("cpu")
SAMPLES = (9000, 16000, 5000, 16000)


def batch_of(domains: tuple[str, ...] = ("speech", "audio", "speech", "speech"), samples: tuple[int, ...] = SAMPLES) -> Batch:
    items = [Item(f"c{i}", domain, noise(count, seed=i).numpy(), {}) for i, (domain, count) in enumerate(zip(domains, samples))]
    return BatchBuilder({}, keep_audio=True)(items, 0, 0)


def tokens_of(teacher: Teacher, size: int = 8) -> tuple[TokenSpec, Any]:
    frames = torch.cat(extract(teacher, [noise(32000, seed=9)]))
    quantizer = KMeansConfig(codebook_size=size).fit(frames, frames[:20], seed=1)
    return TokenSpec(1, size, teacher.frame_rate_hz, teacher.first_frame_s), quantizer


@pytest.mark.parametrize("batch_seconds", [0.5, 60.0])
@pytest.mark.parametrize("family", ["wavlm_group", "wavlm_layer", "whisper"])
def test_labeller_gives_every_cut_the_codes_it_has_alone(teacher: Callable[..., Teacher], family: str, batch_seconds: float) -> None:
    made = teacher(family)
    spec, quantizer = tokens_of(made)
    label = Labeller({"t": Target(made, frozenset({"speech"}), spec, quantizer.encode)}, batch_seconds=batch_seconds, device=CPU)
    found = label(batch_of())
    assert label.token_specs() == {"t": spec}
    assert label.frame_specs() == {}
    for i, count in enumerate(SAMPLES):
        frames = int(found.token_lens["t"][i])
        if i == 1:
            assert frames == 0
        else:
            codes = quantizer.encode(extract(made, [noise(count, seed=i)])[0])
            assert frames == made.num_frames(count) == len(codes)
            assert (found.tokens["t"][i, :frames] == codes).float().mean() > 0.99  # a tie may fall the other way
        assert (found.tokens["t"][i, frames:] == IGNORE).all()


def test_labeller_gives_frames_of_several_layers_and_nothing_to_what_is_too_short(saved: Callable[[str], Path]) -> None:
    made = LayersConfig(model=str(saved("wavlm_layer")), layers=[0, 2]).build()
    label = Labeller({"t": Target(made, frozenset({"speech", "audio"}))}, batch_seconds=60.0, device=CPU)
    (spec,) = label.frame_specs().values()
    assert (spec.dim, spec.num_parts) == (64, 2)
    found = label(batch_of(samples=(9000, 16000, 320, 16000)))
    assert found.target_lens["t"].tolist() == [27, 49, 0, 49]
    first, last = (HuggingFaceConfig(model=str(saved("wavlm_layer")), layer=layer).build() for layer in (0, 2))
    for one, part in ((first, slice(0, 32)), (last, slice(32, 64))):
        assert torch.allclose(found.targets["t"][0, :27, part], extract(one, [noise(9000, seed=0)])[0], atol=1e-5)
    assert not found.targets["t"][2].any()


def test_labeller_resamples_as_files_are_resampled(tmp_path: Path) -> None:
    import soundfile

    from spear.data.audio import load_audio_file

    audio = noise(16000).clamp(-1, 1)
    path = tmp_path / "a.wav"
    soundfile.write(path, audio.numpy(), 16000, subtype="FLOAT")
    assert torch.allclose(resampled(audio, 24000), torch.from_numpy(load_audio_file(path, 24000)), atol=1e-6)
    assert resampled(audio, 16000) is audio


def test_by_length_groups_like_lengths_within_the_limit() -> None:
    audio = [torch.zeros(n) for n in (5, 3, 9, 4, 20)]
    assert list(by_length(range(5), audio, 12)) == [[1, 3], [0], [2], [4]]


def test_labeller_replaces_tokens_and_needs_audio() -> None:
    made = LogMelConfig(stack=2).build()
    label = Labeller({"t": Target(made, frozenset({"speech"}))}, batch_seconds=60.0, device=CPU)
    batch = batch_of()
    batch.tokens, batch.token_lens = {"old": torch.zeros(4, 1, 1)}, {"old": torch.ones(4)}
    found = label(batch)
    assert not found.tokens
    assert list(found.targets) == ["t"]
    assert batch.tokens  # the batch that was given stays as it is
    batch.audio = None
    with pytest.raises(ValueError, match="must keep its audio"):
        label(batch)


def test_labelled_source_labels_what_the_source_gives_and_is_the_source_otherwise() -> None:
    class Source:
        batches_per_epoch = 7
        closed = False

        def __len__(self) -> int:
            return 3

        def iterate(self, first: int, second: int) -> Any:
            try:
                yield from ((first, second, i) for i in range(5))
            finally:
                self.closed = True

    source = Source()
    labelled = LabelledSource(source, lambda batch: (*batch, "labelled"))  # type: ignore[misc, arg-type]
    assert (len(labelled), labelled.batches_per_epoch) == (3, 7)
    batches = labelled.iterate(4, 2)
    assert next(batches) == (4, 2, 0, "labelled")  # type: ignore[comparison-overlap]
    batches.close()  # type: ignore[attr-defined]
    assert source.closed


def test_labeller_is_the_same_for_any_order_of_the_batch(teacher: Callable[..., Teacher]) -> None:
    label = Labeller({"t": Target(teacher("hubert_layer"), frozenset({"speech"}))}, batch_seconds=60.0, device=CPU)
    found = label(batch_of(("speech",) * 4))
    items = [Item(f"c{i}", "speech", noise(SAMPLES[i], seed=i).numpy(), {}) for i in reversed(range(4))]
    other = label(BatchBuilder({}, keep_audio=True)(items, 0, 0))
    for i in range(4):
        count = int(found.target_lens["t"][i])
        assert np.allclose(found.targets["t"][i, :count], other.targets["t"][3 - i, :count], atol=1e-5)
