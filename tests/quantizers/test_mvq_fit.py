"""Both fits of MVQ."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spear.errors import ArtifactError, ConfigError, DataError
from spear.files import seed_from
from spear.quantizers import mvq_alternating, mvq_reference
from spear.quantizers.frame_source import FrameSource
from spear.quantizers.mvq import MVQ
from spear.quantizers.mvq_fit import MVQConfig
from spear.quantizers.mvq_reference import TwoPhaseTrainer
from spear.quantizers.mvq_start import start_centers
from spear.quantizers.mvq_statistics import Moments, Statistics
from spear.quantizers.search import frame_costs, make_tables, sweep
from tests.quantizers.frames import clustered

SMALL: dict[str, Any] = {"num_codebooks": 4, "codebook_size": 16, "rounds": 3, "epochs": 3, "polish_rounds": 2}
REFERENCE: dict[str, Any] = {"num_codebooks": 2, "solver": "reference", "phase_one_iters": 12, "phase_two_iters": 8, "batch_frames": 100}


def relative_loss(quantizer: MVQ, frames: torch.Tensor) -> float:
    rows = quantizer.normalize(frames)
    error = (quantizer.reconstruct(quantizer.search(rows, 5)) - rows).square().sum()
    return float(error / (rows - rows.mean(0)).square().sum())


def saved(quantizer: MVQ, folder: Path) -> tuple[bytes, ...]:
    quantizer.save(folder)
    return tuple((folder / name).read_bytes() for name in ("quantizer.safetensors", "config.json"))


def measured(frames: torch.Tensor) -> FrameSource:
    source = FrameSource([frames])
    source.measure(normalize=False)
    return source


def statistics_of(frames: torch.Tensor, codes: torch.Tensor, size: int) -> tuple[Statistics, Moments]:
    source = measured(frames)
    statistics = Statistics((codes.shape[1], size), source)
    statistics.add(frames, codes)
    statistics.gather(source)
    return statistics, Moments(source)


class KilledError(Exception):
    """Stands for the signal that ends a process."""


def test_two_phase_trainer_repeats_the_reference_trace(fixtures: Path) -> None:
    path = fixtures / "mvq_train_trace.safetensors"
    trace = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    one, two = int(about["phase_one_iters"]), int(about["phase_two_iters"])
    trainer = TwoPhaseTrainer(int(about["dim"]), int(about["bytes_per_frame"]), phase_one_iters=one, phase_two_iters=two, seed=0)
    trainer.quantizer.load_state_dict({key.removeprefix("init."): value for key, value in trace.items() if key.startswith("init.")})
    for call, (frames, iters) in enumerate(zip(trace["x"], trace["num_refine_iters"].tolist())):
        assert not trainer.done
        assert trainer.rate == pytest.approx(float(trace["lr"][call]), rel=1e-12)
        losses = torch.stack(list(trainer.step(frames, iters)))
        torch.testing.assert_close(losses, trace["losses"][call], atol=1e-6, rtol=1e-6)
        state = trainer.quantizer.state_dict()
        for name in (name for name in state if f"after{call}.{name}" in trace):
            torch.testing.assert_close(state[name], trace[f"after{call}.{name}"], atol=1e-6, rtol=1e-6)
    assert trainer.done
    assert not trainer.in_phase_one


def test_solve_centers_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    frames, codes = torch.randn(400, 5, generator=generator), torch.randint(8, (400, 3), generator=generator)
    previous = torch.randn(3, 8, 5, generator=generator)
    found = statistics_of(frames, codes, 8)[0].solve(previous, 0.5)
    design = torch.cat([torch.eye(8)[codes[:, c]] for c in range(3)], dim=1)
    stacked = torch.cat([design, 0.5**0.5 * torch.eye(24)])
    target = torch.cat([frames, 0.5**0.5 * previous.flatten(0, 1)])
    expected = torch.linalg.lstsq(stacked.double(), target.double()).solution
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, atol=1e-5, rtol=1e-5)


def test_solve_shrinks_means_as_james_and_stein_do() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (100, 1), generator=generator)
    frames = 3.0 + 0.3 * codes + torch.randn(100, 1, generator=generator)
    statistics, moments = statistics_of(frames, codes, 8)
    found = statistics.solve(torch.zeros(1, 8, 1), 1e-9, moments)[0, :, 0]
    means = torch.stack([frames[codes == k].mean() for k in range(8)])
    explained = (means[codes[:, 0]] - frames.mean()).square().sum()
    residual = (frames[:, 0] - means[codes[:, 0]]).square().sum()
    factor = 1 - 7 * residual / (100 - 7) / explained
    assert 0.3 < float(factor) < 0.95
    torch.testing.assert_close(found, frames.mean() + factor * (means - frames.mean()), atol=1e-4, rtol=0)


def test_solve_with_shrinkage_loses_less_on_other_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(3, 16, 8, generator=generator) * torch.tensor([2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(16, (count, 3), generator=generator)
        return sum(true[c][codes[:, c]] for c in range(3)) + torch.randn(count, 8, generator=generator), codes  # type: ignore[return-value]

    (frames, codes), (others, other_codes) = drawn(300), drawn(2000)
    statistics, moments = statistics_of(frames, codes, 16)

    def loss(centers: torch.Tensor) -> float:
        return float((sum(centers[c][other_codes[:, c]] for c in range(3)) - others).square().sum())

    start = torch.zeros(3, 16, 8)
    assert loss(statistics.solve(start, 1.0, moments)) < 0.95 * loss(statistics.solve(start, 1.0))


def test_sweep_ends_where_no_single_change_helps() -> None:
    generator = torch.Generator().manual_seed(0)
    centres, frames = torch.randn(4, 16, 6, generator=generator), torch.randn(50, 6, generator=generator) * 2
    tables = make_tables(centres)
    codes = sweep(tables, frame_costs(tables, frames), torch.zeros(50, 4, dtype=torch.int64), 30)
    total = sum(centres[c][codes[:, c]] for c in range(4))
    best = (total - frames).square().sum(1)
    for c in range(4):
        others = (total - centres[c][codes[:, c]])[:, None] + centres[c] - frames[:, None]
        assert bool((others.square().sum(-1).min(dim=1).values >= best - 1e-4).all())


def test_start_centers_are_orthogonal_and_reconstruct_better_than_the_mean() -> None:
    frames = clustered(2000, 16)
    frames = (frames - frames.mean(0)) / frames.std(0)
    centers, codes = start_centers(frames, frames.T.double().cov(correction=0), 4, 16, 0)
    subspaces = (centers - centers.mean(1, keepdim=True)).flatten(0, 1)
    cross = (subspaces @ subspaces.T).view(4, 16, 4, 16)
    assert float(cross[0, :, 1].abs().max()) < 1e-3
    error = (sum(centers[c][codes[:, c]] for c in range(4)) - frames).square().sum()
    assert float(error) < 0.6 * float(frames.square().sum())


def test_start_centers_serve_more_codebooks_than_channels() -> None:
    frames = clustered(1000, 3)
    centers, codes = start_centers(frames, frames.T.double().cov(correction=0), 8, 16, 0)
    assert centers.isfinite().all()
    error = (sum(centers[c][codes[:, c]] for c in range(8)) - frames).square().sum()
    assert float(error) < 0.05 * float((frames - frames.mean(0)).square().sum())


def test_discriminants_separate_classes_better_than_chance() -> None:
    frames = clustered(1500, 8)
    codes = torch.stack([(frames[:, 0] > 0).long(), (frames[:, 3] > frames[:, 3].median()).long()], dim=1)
    statistics, moments = statistics_of(frames, codes, 2)
    weight, bias = statistics.discriminants(moments)
    found = (frames @ weight.T + bias).view(-1, 2, 2).argmax(-1)
    assert float((found == codes).float().mean()) > 0.9


def test_alternating_fit_generalises_and_repeats_itself(tmp_path: Path) -> None:
    train, heldout = clustered(4000, 16), clustered(500, 16, seed=1)
    config = MVQConfig(**SMALL)
    first = config.fit(train, heldout, seed=3)
    assert relative_loss(first, heldout) < 0.2
    assert relative_loss(first, heldout) < 1.15 * relative_loss(first, train)
    assert float(first.search(first.normalize(heldout), 0).float().std()) > 1
    assert saved(first, tmp_path / "a") == saved(config.fit(train, heldout, seed=3), tmp_path / "b")
    assert config.fit(train, heldout, seed=4).fingerprint() != first.fingerprint()


def test_alternating_fit_beats_the_reference_schedule_on_the_same_frames() -> None:
    train, heldout = clustered(6000, 12), clustered(500, 12, seed=1)
    quick = MVQConfig(num_codebooks=2, rounds=4, polish_rounds=1).fit(train, heldout, seed=0)
    slow = MVQConfig(**{**REFERENCE, "phase_one_iters": 150, "phase_two_iters": 150}).fit(train, heldout, seed=0)
    assert relative_loss(quick, heldout) <= relative_loss(slow, heldout)


def test_alternating_fit_does_not_move_its_frames() -> None:
    train, heldout = clustered(800, 8), clustered(100, 8, seed=1)
    before = train.clone()
    MVQConfig(**{**SMALL, "normalize": False}).fit(train, heldout, seed=0)
    assert torch.equal(train, before)


def test_alternating_fit_of_few_frames_gains_from_more_entries() -> None:
    train, heldout = clustered(300, 12), clustered(300, 12, seed=1)
    losses = [relative_loss(MVQConfig(num_codebooks=2, codebook_size=size).fit(train, heldout, seed=0), heldout) for size in (16, 64, 128)]
    assert losses[0] > losses[1] > losses[2]


def test_alternating_fit_uses_fewer_entries_when_data_is_little(caplog: pytest.LogCaptureFixture) -> None:
    train, heldout = clustered(70, 8), clustered(100, 8, seed=1)
    with caplog.at_level(logging.WARNING):
        quantizer = MVQConfig(num_codebooks=2, codebook_size=64, rounds=2, frames_per_entry=4).fit(train, heldout, seed=0)
    assert "70 frames allow 16 of 64 entries per codebook" in caplog.text
    assert "70 frames are few for 64 entries" in caplog.text
    assert (quantizer.codebook_size, quantizer.entries) == (64, 16)
    assert int(quantizer.encode(train).max()) < 16
    assert relative_loss(quantizer, heldout) < 0.6
    assert torch.equal(quantizer.centers[:, 16:], torch.zeros(2, 48, 8))


@pytest.mark.parametrize("stop_after", [1, 4, 5, 7])
def test_alternating_fit_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    train, heldout = clustered(1500, 8), clustered(100, 8, seed=1)
    config, checkpoint = MVQConfig(**SMALL), tmp_path / "fit.safetensors"
    whole = saved(config.fit(train, heldout, seed=3), tmp_path / "whole")
    advance, made = mvq_alternating._Fit.advance, 0

    def dies(*arguments: Any) -> None:
        nonlocal made
        if made == stop_after:
            raise KilledError
        made += 1
        advance(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mvq_alternating._Fit, "advance", dies)
        with pytest.raises(KilledError):
            config.fit(train, heldout, seed=3, checkpoint=checkpoint)
    assert saved(config.fit(train, heldout, seed=3, checkpoint=checkpoint), tmp_path / "resumed") == whole
    with pytest.raises(ArtifactError, match="other settings or frames"):
        config.fit(train, heldout, seed=4, checkpoint=checkpoint)


@pytest.mark.parametrize("stop_after", [5, 16])
def test_reference_fit_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    train, heldout = clustered(600, 8), clustered(50, 8, seed=1)
    config, checkpoint = MVQConfig(**REFERENCE), tmp_path / "fit.safetensors"
    monkeypatch.setattr(mvq_reference, "SAVE_EVERY", 4)
    whole = saved(config.fit(train, heldout, seed=3), tmp_path / "whole")
    step = TwoPhaseTrainer.step

    def dies(trainer: TwoPhaseTrainer, frames: torch.Tensor, iters: int) -> Any:
        if trainer.step_count == stop_after:
            raise KilledError
        return step(trainer, frames, iters)

    with monkeypatch.context() as patch:
        patch.setattr(TwoPhaseTrainer, "step", dies)
        with pytest.raises(KilledError):
            config.fit(train, heldout, seed=3, checkpoint=checkpoint)
    assert checkpoint.exists()
    assert saved(config.fit(train, heldout, seed=3, checkpoint=checkpoint), tmp_path / "resumed") == whole
    with pytest.raises(ArtifactError, match="other settings or frames"):
        config.fit(train + 1, heldout, seed=3, checkpoint=checkpoint)


def test_reference_fit_learns_and_refines_once_or_twice() -> None:
    train, heldout = clustered(3000, 8), clustered(200, 8, seed=1)
    short = MVQConfig(**{**REFERENCE, "phase_one_iters": 4, "phase_two_iters": 4}).fit(train, heldout, seed=0)
    longer = MVQConfig(**{**REFERENCE, "phase_one_iters": 80, "phase_two_iters": 80}).fit(train, heldout, seed=0)
    assert relative_loss(longer, heldout) < 0.5 * relative_loss(short, heldout)
    drawn = [1 + seed_from(0, "refine", step) % 2 for step in range(400)]
    assert set(drawn) == {1, 2}
    assert abs(drawn.count(2) - 200) < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 100}, "`codebook_size` must be a power of two, but is 100"),
        ({"codebook_size": 1}, "`codebook_size` must be between 2 and 32768, but is 1"),
        ({"num_codebooks": 12}, "`num_codebooks` must be a power of two, but is 12"),
        ({"codebook_size": 64, "solver": "reference"}, "`codebook_size` must be 256 with `solver: reference`, but is 64"),
        ({"rounds": 0}, "`rounds` must be 1 or more, but is 0"),
        ({"noise": -0.5}, "`noise` must be 0 or more, but is -0.5"),
        ({"ridge": 0.0}, "`ridge` must be above 0, but is 0"),
    ],
)
def test_mvq_config_raises_config_error_when_a_setting_is_out_of_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MVQConfig(**settings)


def test_mvq_fit_raises_data_error_when_frames_do_not_serve() -> None:
    config, good = MVQConfig(**SMALL), clustered(100, 8)
    with pytest.raises(DataError, match="at least `codebook_size` 16 frames, but has 15"):
        config.fit(good[:15], good, seed=0)
    with pytest.raises(DataError, match="training frames have non-finite values"):
        config.fit(good.clone().index_fill_(0, torch.tensor([3]), float("nan")), good, seed=0)
    with pytest.raises(DataError, match="needs held-out frames, but there are 0"):
        config.fit(good, good[:0], seed=0)
    with pytest.raises(DataError, match=r"held-out frames must have shape \(frames, 8\)"):
        config.fit(good, good[:, :4], seed=0)


def test_quantizer_configs_are_tagged() -> None:
    from spear.config import to_json
    from spear.quantizers.base import QuantizerConfig

    value = to_json(MVQConfig(**SMALL), QuantizerConfig)
    assert value["type"] == "mvq"
    assert json.loads(json.dumps(value))["num_codebooks"] == 4


def test_alternating_fit_of_equal_frames_reproduces_them() -> None:
    frame = torch.linspace(-2.0, 3.0, 7)
    frames = frame.expand(400, 7).contiguous()
    quantizer = MVQConfig(**SMALL).fit(frames, frames[:20], seed=0)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(frames)), frames, atol=1e-3, rtol=0)


def test_alternating_fit_of_few_distinct_frames_reproduces_them() -> None:
    frames = clustered(12, 9)[torch.arange(600) % 12]
    quantizer = MVQConfig(**SMALL).fit(frames, frames[:24], seed=0)
    assert relative_loss(quantizer, frames[:24]) < 0.05


def test_alternating_fit_ignores_a_channel_that_never_changes() -> None:
    train, heldout = clustered(1500, 9), clustered(100, 9, seed=1)
    train[:, 4] = heldout[:, 4] = 2.5
    quantizer = MVQConfig(**SMALL).fit(train, heldout, seed=0)
    assert relative_loss(quantizer, heldout) < 0.3
    torch.testing.assert_close(quantizer.decode(quantizer.encode(heldout))[:, 4], heldout[:, 4], atol=1e-2, rtol=0)


def test_fit_raises_data_error_when_there_is_one_frame() -> None:
    with pytest.raises(DataError, match="at least `codebook_size` 16 frames, but has 1"):
        MVQConfig(**SMALL).fit(torch.ones(1, 8), torch.ones(1, 8), seed=0)


def test_fit_takes_early_rounds_from_a_share_of_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = clustered(10_000, 8), clustered(100, 8, seed=1)
    solve, sizes = Statistics.solve, []

    def counted(statistics: Statistics, *rest: Any) -> torch.Tensor:
        sizes.append(int(statistics.counts[0].sum()))
        return solve(statistics, *rest)

    monkeypatch.setattr(Statistics, "solve", counted)
    MVQConfig(**SMALL).fit(train, heldout, seed=0)
    assert sizes[:3] == [2048, 2048, 10_000]
    assert set(sizes[3:]) == {10_000}


def test_mvq_fit_hands_its_search_to_the_quantizer() -> None:
    train, heldout = clustered(800, 8), clustered(100, 8, seed=1)
    assert MVQConfig(**SMALL, search="best").fit(train, heldout, seed=0).mode == "best"
    with pytest.raises(ConfigError, match="`search` must be exact, best or fast, but is slow"):
        MVQConfig(search="slow")  # type: ignore[arg-type]


def test_alternating_fit_stops_early_and_keeps_the_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, judged = iter([0.9, 0.45, 0.7, 0.6, 0.55, 0.5, 0.4, 0.42, 0.3]), []

    def judge(fit: mvq_alternating._Fit, state: mvq_alternating._State) -> float:
        judged.append(state.centers)
        return next(losses)

    monkeypatch.setattr(mvq_alternating._Fit, "_judge", judge)
    train, heldout = clustered(800, 8), clustered(100, 8, seed=1)
    quantizer = MVQConfig(**{**SMALL, "polish_rounds": 9}).fit(train, heldout, seed=0)
    assert len(judged) == 3 + 3 + 2
    assert torch.equal(quantizer.centers, judged[6])


def test_alternating_fit_keeps_an_early_round_that_later_ones_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, judged = iter([0.5, 0.3, 0.6, 0.7, 0.8, 0.5, 0.4]), []

    def judge(fit: mvq_alternating._Fit, state: mvq_alternating._State) -> float:
        judged.append(state.centers)
        return next(losses)

    monkeypatch.setattr(mvq_alternating._Fit, "_judge", judge)
    quantizer = MVQConfig(**SMALL).fit(clustered(800, 8), clustered(100, 8, seed=1), seed=0)
    assert len(judged) == 7
    assert torch.equal(quantizer.centers, judged[1])


def test_alternating_fit_polishes_the_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, judged, polished = iter([0.5, 0.3, 0.6, 0.7, 0.8, 0.5, 0.2, 0.4]), [], []

    def judge(fit: mvq_alternating._Fit, state: mvq_alternating._State) -> float:
        judged.append(state.centers)
        return next(losses)

    solve = Statistics.solve

    def noted(statistics: Statistics, previous: torch.Tensor, *rest: Any) -> torch.Tensor:
        polished.append(previous)
        return solve(statistics, previous, *rest)

    monkeypatch.setattr(mvq_alternating._Fit, "_judge", judge)
    monkeypatch.setattr(Statistics, "solve", noted)
    MVQConfig(**SMALL).fit(clustered(800, 8), clustered(100, 8, seed=1), seed=0)
    assert [id(centers) for centers in polished[3:]] == [id(judged[1]), id(judged[6])]


def test_alternating_fit_of_many_codebooks_uses_the_merge_search() -> None:
    train, heldout = clustered(1500, 12), clustered(200, 12, seed=1)
    quantizer = MVQConfig(num_codebooks=16, codebook_size=4, rounds=2, epochs=1, polish_rounds=1).fit(train, heldout, seed=0)
    fewer = MVQConfig(num_codebooks=8, codebook_size=4, rounds=2, epochs=1, polish_rounds=1).fit(train, heldout, seed=0)
    assert relative_loss(quantizer, heldout) < relative_loss(fewer, heldout)
