"""MVQ: codes, round trips, files, and parity with multi_quantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import read_json, write_json
from spear.quantizers import MVQ, load_quantizer
from spear.quantizers.mvq_reference import product
from spear.quantizers.normalize import Normalizer
from tests.quantizers.frames import clustered, random_mvq, squared_error


@pytest.fixture(scope="module")
def reference(fixtures: Path) -> dict[str, Tensor]:
    return load_file(fixtures / "mvq_dim64_cb4.safetensors")


@pytest.fixture(scope="module")
def reference_mvq(reference: dict[str, Tensor]) -> MVQ:
    return MVQ.from_multi_quantization({key.removeprefix("quantizer."): value for key, value in reference.items() if key.startswith("quantizer.")})


@pytest.mark.parametrize("iters", [0, 1, 5])
def test_mvq_gives_the_reference_indexes_and_sums(reference: dict[str, Tensor], reference_mvq: MVQ, iters: int) -> None:
    codes = reference_mvq.encode(reference["x"], refine_iters=iters)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, reference[f"indexes.iters{iters}"])
    torch.testing.assert_close(reference_mvq.decode(codes), reference[f"decode.iters{iters}"], atol=1e-5, rtol=0)


def test_mvq_gives_the_reference_logits_mean_and_identity(reference: dict[str, Tensor], reference_mvq: MVQ) -> None:
    logits = reference_mvq.logits(reference["x"][:64]).flatten(1)
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(reference_mvq.data_mean(), reference["data_mean"], atol=1e-5, rtol=0)
    assert reference_mvq.id == bytes(reference["quantizer.id_buf"].tolist()).decode()


@pytest.mark.parametrize(("dim", "num", "size"), [(24, 8, 256), (20, 4, 256), (16, 1, 256), (12, 8, 16), (40, 16, 256)])
def test_mvq_agrees_with_the_installed_package(dim: int, num: int, size: int) -> None:
    package = pytest.importorskip("multi_quantization", reason="needs multi_quantization and h5py")
    quantizer = random_mvq(dim, num, size, seed=dim)
    theirs = package.Quantizer(dim, size, num)
    theirs.load_state_dict(quantizer.to_multi_quantization())
    frames = torch.randn(60, dim, generator=torch.Generator().manual_seed(1))
    for iters in (0, 1, 5):
        assert torch.equal(quantizer.encode(frames, iters).long(), theirs.encode(frames, iters, as_bytes=False).long())
    codes = theirs.encode(frames, 5, as_bytes=False)
    torch.testing.assert_close(quantizer.decode(codes), theirs.decode(codes).detach(), atol=1e-5, rtol=0)


def test_mvq_with_fewer_entries_survives_the_package() -> None:
    package = pytest.importorskip("multi_quantization", reason="needs multi_quantization and h5py")
    quantizer = MVQ(12, 4, 256, entries=32, seed=3)
    theirs = package.Quantizer(12, 256, 4)
    theirs.load_state_dict(quantizer.to_multi_quantization())
    frames = 0.3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    ours = quantizer.encode(frames)
    assert int(ours.max()) < 32
    assert torch.equal(theirs.encode(frames, 5), ours)


def test_mvq_state_goes_to_the_package_and_back() -> None:
    quantizer = random_mvq(10, 4, 16)
    again = MVQ.from_multi_quantization(quantizer.to_multi_quantization())
    assert again.id == quantizer.id
    assert again.fingerprint() == quantizer.fingerprint()


def test_mvq_takes_the_dictionary_of_the_extraction_scripts() -> None:
    quantizer, frames = random_mvq(10, 2, 16), clustered(40, 10)
    mean, std = frames.mean(0), frames.std(0)
    scripts = MVQ.from_multi_quantization({"quantizer": quantizer.to_multi_quantization(), "mean": mean, "std": std})
    assert torch.equal(scripts.encode(frames), quantizer.encode(Normalizer(mean, std).apply_to(frames)))
    plain = MVQ.from_multi_quantization({"quantizer": quantizer.to_multi_quantization(), "mean": None, "std": None})
    assert plain.normalizer is None


def test_mvq_from_multi_quantization_raises_data_error_when_a_tensor_does_not_fit() -> None:
    state = random_mvq(10, 2, 16).to_multi_quantization()
    with pytest.raises(DataError, match="must have `id_buf`"):
        MVQ.from_multi_quantization({key: value for key, value in state.items() if key != "id_buf"})
    with pytest.raises(DataError, match=r"`to_logits.bias` must have shape \(32,\), but has \(31,\)"):
        MVQ.from_multi_quantization({**state, "to_logits.bias": torch.zeros(31)})
    with pytest.raises(DataError, match="given together"):
        MVQ.from_multi_quantization(state, mean=torch.zeros(10))


def test_mvq_refinement_lowers_the_error() -> None:
    quantizer, frames = random_mvq(16, 4, 64), torch.randn(400, 16, generator=torch.Generator().manual_seed(5))
    none, one, five = (squared_error(quantizer, frames, iters) for iters in (0, 1, 5))
    assert five <= one < none


def test_mvq_codes_do_not_depend_on_the_company_of_a_frame() -> None:
    quantizer, frames = random_mvq(24, 8, 64), torch.randn(2300, 24, generator=torch.Generator().manual_seed(5))
    whole = quantizer.encode(frames)
    pieces = torch.cat([quantizer.encode(piece) for piece in frames.split([1, 7, 100, 500, 1692])])
    assert torch.equal(whole, pieces)
    assert torch.equal(quantizer.encode(frames.flip(0)).flip(0), whole)


def test_mvq_follows_a_change_of_its_weights() -> None:
    quantizer, frames = random_mvq(8, 2, 16), torch.randn(50, 8, generator=torch.Generator().manual_seed(5))
    before = quantizer.encode(frames)
    with torch.no_grad():
        quantizer.centers.copy_(quantizer.centers.flip(1))
        quantizer.to_logits.weight.copy_(quantizer.to_logits.weight.view(2, 16, 8).flip(1).flatten(0, 1))
        quantizer.to_logits.bias.zero_()
    fresh = MVQ.from_multi_quantization(quantizer.to_multi_quantization())
    assert torch.equal(quantizer.encode(frames), fresh.encode(frames))
    assert not torch.equal(quantizer.encode(frames), before)


def test_mvq_keeps_leading_shapes_and_takes_no_frames() -> None:
    quantizer = random_mvq(8, 4, 16)
    frames = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    codes = quantizer.encode(frames)
    assert codes.shape == (2, 3, 4)
    assert torch.equal(codes[1, 2], quantizer.encode(frames[1, 2]))
    assert quantizer.decode(codes).shape == frames.shape
    for shape in ((0, 8), (3, 0, 8)):
        empty = quantizer.encode(torch.empty(shape))
        assert empty.shape == (*shape[:-1], 4)
        assert empty.dtype == torch.uint8
        assert quantizer.decode(empty).shape == shape


def test_mvq_encodes_half_precision_as_float32() -> None:
    quantizer = random_mvq(8, 4, 16)
    frames = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(quantizer.encode(frames), quantizer.encode(frames.float()))


def test_mvq_gives_int16_codes_when_entries_exceed_a_byte() -> None:
    quantizer = random_mvq(8, 2, 512)
    frames = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    codes = quantizer.encode(frames)
    assert codes.dtype == torch.int16
    assert int(codes.max()) > 255
    assert quantizer.bits_per_frame == 18


def test_mvq_raises_config_error_when_a_size_is_not_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="`codebook_size` must be a power of two, but is 100"):
        MVQ(8, 4, 100)
    with pytest.raises(ConfigError, match="`num_codebooks` must be a power of two, but is 12"):
        MVQ(8, 12, 16)
    with pytest.raises(ConfigError, match="`entries` must be at most"):
        MVQ(8, 4, 16, entries=32)
    with pytest.raises(ConfigError, match="`refine_iters` must be 0 or more, but is -1"):
        random_mvq(8, 4, 16).encode(torch.zeros(1, 8), -1)


def test_mvq_raises_data_error_when_input_does_not_fit() -> None:
    quantizer = random_mvq(8, 4, 16)
    with pytest.raises(DataError, match=r"must have 8 channels, but have shape \(5, 9\)"):
        quantizer.encode(torch.zeros(5, 9))
    with pytest.raises(DataError, match="non-finite"):
        quantizer.encode(torch.tensor([[0.0] * 7 + [float("inf")]]))
    with pytest.raises(DataError, match="must have 4 codebooks"):
        quantizer.decode(torch.zeros(5, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"must be in 0\.\.15, but reach from 0 to 16"):
        quantizer.decode(torch.tensor([[0, 0, 0, 16]]))


def test_mvq_decodes_to_raw_teacher_frames() -> None:
    frames = clustered(100, 8)
    inner = random_mvq(8, 4, 16)
    outer = MVQ.from_multi_quantization(inner.to_multi_quantization(), mean=frames.mean(0), std=frames.std(0))
    codes = outer.encode(frames)
    torch.testing.assert_close(outer.decode(codes), inner.decode(codes) * (frames.std(0) + 1e-5) + frames.mean(0))


def test_product_decodes_like_its_parts() -> None:
    quantizer = random_mvq(10, 8, 16)
    merged = product(quantizer, seed=1)
    codes = torch.randint(16, (50, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged.decode(codes[:, 0::2] * 16 + codes[:, 1::2]), quantizer.decode(codes), atol=1e-6, rtol=0)
    frames = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    first = quantizer.search(frames, 0)
    assert torch.equal(merged.search(frames, 0), first[:, 0::2] * 16 + first[:, 1::2])
    assert merged.id != quantizer.id


def test_correlations_are_symmetric_with_unit_diagonal_and_see_shared_directions() -> None:
    quantizer = MVQ(8, 4, 16)
    with torch.no_grad():
        quantizer.centers.zero_()
        generator = torch.Generator().manual_seed(0)
        quantizer.centers[0, :, :2] = torch.randn(16, 2, generator=generator)
        quantizer.centers[1] = quantizer.centers[0] * 3 + 5
        quantizer.centers[2, :, 2:5] = torch.randn(16, 3, generator=generator)
        quantizer.centers[3] = torch.randn(16, 8, generator=generator)
    found = quantizer.correlations()
    torch.testing.assert_close(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(4, dtype=torch.float64))
    assert found[0, 1] == pytest.approx(1.0)
    assert found[0, 2] == pytest.approx(0.0, abs=1e-9)
    assert 0 < found[0, 3] < 1


def test_mvq_survives_save_and_load(tmp_path: Path) -> None:
    frames = clustered(60, 8)
    inner = MVQ(8, 4, 16, normalizer=Normalizer.fit(frames), entries=8, seed=5)
    inner.save(tmp_path / "a")
    again = load_quantizer(str(tmp_path / "a"))
    assert isinstance(again, MVQ)
    assert (again.id, again.entries, again.fingerprint()) == (inner.id, 8, inner.fingerprint())
    assert torch.equal(again.encode(frames), inner.encode(frames))
    again.save(tmp_path / "b")
    for name in ("quantizer.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_load_quantizer_raises_artifact_error_when_a_file_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="config.json does not exist"):
        load_quantizer(tmp_path)
    quantizer = random_mvq(8, 4, 16)
    quantizer.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "quantizer.safetensors"
    good, description = weights.read_bytes(), read_json(config)
    weights.write_bytes(good[:100])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_quantizer(tmp_path)
    weights.write_bytes(good[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="fingerprints differ"):
        load_quantizer(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="quantizer.safetensors does not exist"):
        load_quantizer(tmp_path)
    weights.write_bytes(good)
    for change, message in (
        ({"type": "pq"}, "must have `type` .*kmeans or mvq"),
        ({"version": 99}, "must have `version` 1, but has 99"),
        ({"dim": 9}, "does not fit config.json"),
        ({"normalize": True}, "does not fit config.json"),
    ):
        write_json(config, {**description, **change})
        with pytest.raises(ArtifactError, match=message):
            load_quantizer(tmp_path)
    config.write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match="must have `type`"):
        load_quantizer(tmp_path)


def test_fingerprint_follows_weights_and_settings() -> None:
    quantizer = random_mvq(8, 4, 16)
    before = quantizer.fingerprint()
    assert random_mvq(8, 4, 16).fingerprint() == before
    with torch.no_grad():
        quantizer.centers[0, 0, 0] += 1e-3
    assert quantizer.fingerprint() != before


def test_mvq_modes_trade_error_for_time() -> None:
    quantizer, frames = random_mvq(16, 8, 64), torch.randn(400, 16, generator=torch.Generator().manual_seed(5))
    rows = quantizer.normalize(frames)

    def error(codes: Tensor) -> Tensor:
        return (quantizer.reconstruct(codes) - rows).square().sum(dim=1)

    exact, best, fast = quantizer.search(rows, 10), quantizer.search_best(rows), quantizer.search_fast(rows)
    assert bool((error(best) <= error(exact) + 1e-4).all())
    assert float(error(best).sum()) < float(error(exact).sum())
    assert float(error(fast).sum()) < float(error(quantizer.search(rows, 0)).sum())


@pytest.mark.parametrize("mode", ["best", "fast"])
def test_mvq_keeps_its_mode_with_its_weights(tmp_path: Path, mode: Literal["best", "fast"]) -> None:
    inner, frames = random_mvq(8, 4, 16), clustered(60, 8)
    before = inner.fingerprint()
    inner.mode = mode
    assert inner.fingerprint() != before
    inner.save(tmp_path)
    again = load_quantizer(tmp_path)
    assert isinstance(again, MVQ)
    assert again.mode == mode
    expected = inner.search_best(frames) if mode == "best" else inner.search_fast(frames)
    assert torch.equal(again.encode(frames).long(), expected)


def test_mvq_with_the_exact_mode_is_described_as_before_there_were_modes() -> None:
    assert random_mvq(8, 4, 16).settings().keys() == {"entries", "id"}


def test_mvq_raises_config_error_when_its_mode_is_unknown() -> None:
    with pytest.raises(ConfigError, match="`search` must be exact, best or fast, but is slow"):
        MVQ(8, 4, 16, mode="slow")  # type: ignore[arg-type]


def test_mvq_codes_single_frames_and_odd_widths() -> None:
    quantizer, frames = random_mvq(13, 4, 64), clustered(50, 13)
    assert torch.equal(torch.cat([quantizer.encode(frame[None]) for frame in frames]), quantizer.encode(frames))
    assert quantizer.encode(frames[0]).shape == (4,)


def test_mvq_gives_equal_frames_equal_codes() -> None:
    quantizer, frames = random_mvq(12, 8, 64), clustered(40, 12)
    for mode in ("exact", "best", "fast"):
        quantizer.mode = mode  # type: ignore[assignment]
        codes = quantizer.encode(torch.cat([frames, frames.flip(0)]))
        assert torch.equal(codes[:40], codes[40:].flip(0))
