"""What every quantizer keeps to, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import ArtifactError, DataError
from spear.files import read_json, write_json
from spear.quantizers import KINDS, load_quantizer
from spear.quantizers.base import CONFIG, QuantizerConfig
from spear.quantizers.card import card, write_card
from spear.quantizers.dmel import DMelConfig
from spear.quantizers.fsq import FSQConfig
from spear.quantizers.kmeans import KMeansConfig
from spear.quantizers.mvq_fit import MVQConfig
from spear.quantizers.product import ProductConfig
from spear.quantizers.random_projection import RandomProjectionConfig
from spear.quantizers.residual import ResidualConfig
from tests.quantizers.frames import clustered

DIM = 12
CONFIGS: dict[str, QuantizerConfig] = {
    "mvq": MVQConfig(num_codebooks=2, codebook_size=16),
    "kmeans": KMeansConfig(codebook_size=300, epochs=3, batch_frames=500),
    "residual": ResidualConfig(num_codebooks=3, codebook_size=16, epochs=3, batch_frames=500),
    "product": ProductConfig(num_codebooks=3, codebook_size=16, epochs=3, batch_frames=500),
    "random_projection": RandomProjectionConfig(num_codebooks=2, codebook_size=64, projection_dim=4),
    "fsq": FSQConfig(num_codebooks=2, levels=[8, 5, 5, 5]),
    "dmel": DMelConfig(),
}
WITHOUT_CHANCE = ("fsq", "dmel")
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_every_kind_is_tried_here_and_can_be_loaded() -> None:
    taken_over = {"codec"}  # from a teacher, not made of frames: test_codec.py
    assert set(CONFIGS) | taken_over == set(KINDS) == set(QuantizerConfig.TABLE)
    assert all(QuantizerConfig.get_choice_name(type(config)) == name for name, config in CONFIGS.items())


@each
def test_quantizer_fit_repeats_itself_and_is_saved_whole(config: QuantizerConfig, tmp_path: Path) -> None:
    train, heldout = clustered(2000, DIM), clustered(200, DIM, seed=1)
    first, second, other = (config.fit(train, heldout, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == second.fingerprint()
    assert (other.fingerprint() == first.fingerprint()) == (first.kind in WITHOUT_CHANCE)
    assert (first.num_codebooks, first.codebook_size) == config.sizes(DIM)
    first.save(tmp_path)
    again = load_quantizer(tmp_path)
    codes = first.encode(heldout)
    assert torch.equal(again.encode(heldout), codes)
    assert torch.equal(again.decode(codes), first.decode(codes))


@each
def test_quantizer_keeps_the_shape_and_gives_the_smallest_integer_type(config: QuantizerConfig) -> None:
    train = clustered(1000, DIM)
    quantizer = config.fit(train, train[:50], seed=0)
    codes = quantizer.encode(train[:30].view(2, 5, 3, DIM))
    assert codes.shape == (2, 5, 3, quantizer.num_codebooks)
    assert codes.dtype == (torch.uint8 if quantizer.codebook_size <= 256 else torch.int16)
    frames = quantizer.decode(codes)
    assert frames.shape == (2, 5, 3, DIM)
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames.view(30, DIM), quantizer.decode(quantizer.encode(train[:30])))
    assert quantizer.encode(train[:0].view(4, 0, DIM)).shape == (4, 0, quantizer.num_codebooks)
    assert quantizer.encode(train[0]).shape == (quantizer.num_codebooks,)


@each
def test_quantizer_codes_do_not_depend_on_the_company_of_a_frame(config: QuantizerConfig) -> None:
    frames = clustered(700, DIM, seed=1)
    quantizer = config.fit(clustered(1000, DIM), frames, seed=0)
    assert torch.equal(quantizer.encode(frames), torch.cat([quantizer.encode(piece) for piece in frames.split([1, 33, 266, 400])]))


@each
def test_quantizer_card_says_what_decoding_loses(config: QuantizerConfig, tmp_path: Path) -> None:
    train, heldout = clustered(3000, DIM), clustered(400, DIM, seed=1)
    quantizer = config.fit(train, heldout, seed=0)
    found = card(quantizer, heldout)
    frames, decoded = quantizer.normalize(heldout), quantizer.normalize(quantizer.decode(quantizer.encode(heldout)))
    expected = (decoded - frames).double().square().sum() / (frames - frames.mean(dim=0)).double().square().sum()
    assert found["relative_loss"] == pytest.approx(float(expected), abs=1e-4)
    assert found["relative_loss"] < 0.75
    assert all(1 <= value <= active for value, active in zip(found["perplexity"], found["active_entries"], strict=True))
    assert len(found["perplexity"]) == quantizer.num_codebooks
    write_card(tmp_path, found, quantizer, heldout)
    assert f"`{quantizer.kind}`" in (tmp_path / "card.md").read_text()


@each
def test_quantizer_raises_data_error_when_frames_are_wrong(config: QuantizerConfig) -> None:
    train = clustered(1000, DIM)
    spoilt = train.clone()
    spoilt[7, 3] = torch.nan
    quantizer = config.fit(train, train[:50], seed=0)
    with pytest.raises(DataError, match="non-finite"):
        config.fit(spoilt, train, seed=0)
    with pytest.raises(DataError, match="non-finite"):
        quantizer.encode(spoilt)
    with pytest.raises(DataError, match="must have 12 channels"):
        quantizer.encode(train[:, :5])
    with pytest.raises(DataError, match="there are 0"):
        config.fit(train[:0], train, seed=0)
    with pytest.raises(DataError, match=f"codes must be in 0..{quantizer.codebook_size - 1}"):
        quantizer.decode(torch.full((1, quantizer.num_codebooks), quantizer.codebook_size))


@each
def test_quantizer_of_constant_frames_gives_them_back(config: QuantizerConfig) -> None:
    frames = torch.linspace(-2.0, 3.0, DIM).repeat(1000, 1)
    if config.sizes(DIM)[1] == 2**4 and isinstance(config, DMelConfig):
        frames = torch.full_like(frames, 1.5)
    quantizer = config.fit(frames, frames[:20], seed=0)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(frames)), frames, atol=1e-3, rtol=1e-3)


@each
def test_load_quantizer_raises_artifact_error_when_sizes_do_not_fit(config: QuantizerConfig, tmp_path: Path) -> None:
    train = clustered(600, DIM)
    config.fit(train, train, seed=0).save(tmp_path)
    saved = read_json(tmp_path / CONFIG)
    write_json(tmp_path / CONFIG, {**saved, "codebook_size": saved["codebook_size"] * 2})
    with pytest.raises(ArtifactError, match="does not fit config.json"):
        load_quantizer(tmp_path)
