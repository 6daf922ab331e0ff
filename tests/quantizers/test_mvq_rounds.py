"""The parts of the alternating fit of MVQ, each by itself: perturbation, an epoch of Adam, the predictor of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from spear.quantizers.frame_source import FrameSource
from spear.quantizers.mvq import MVQ
from spear.quantizers.mvq_alternating import Settings, _Fit, _State
from spear.quantizers.mvq_statistics import Moments, Statistics
from tests.quantizers.frames import clustered

NOISY = Settings(rounds=4, sweeps=1, epochs=2, rate=0.02, polish_rounds=0, noise=0.5, ridge=1.0)


def started() -> tuple[_Fit, _State]:
    """A fit of 4 codebooks with 16 entries before its first round."""
    source = FrameSource([clustered(2000, 8)])
    source.measure(normalize=False)
    fit = _Fit(source, clustered(300, 8, seed=1), MVQ(8, 4, 16, seed=0), NOISY, seed=5)
    return fit, fit.start()


def test_perturbed_centres_have_noise_that_falls_to_zero_over_the_rounds() -> None:
    fit, state = started()
    state.centers = torch.zeros(4, 4000, 8)
    for made, share in enumerate((0.75, 0.5, 0.25)):
        state.made = made
        wanted = NOISY.noise * share * fit.moments.covariance.diagonal().sqrt().float() / 2  # the square root of 4 codebooks
        torch.testing.assert_close(fit._perturbed(state).flatten(0, 1).std(dim=0), wanted, rtol=0.03, atol=0.0)
    state.made = 3
    assert fit._perturbed(state) is state.centers


def test_perturbed_centres_follow_seed_and_round() -> None:
    fit, state = started()
    first = fit._perturbed(state)
    assert torch.equal(first, fit._perturbed(state))
    state.made = 1
    later = fit._perturbed(state)
    assert not torch.allclose((first - state.centers) / 0.75, (later - state.centers) / 0.5, atol=1e-2)


def test_an_epoch_of_adam_lowers_the_heldout_error() -> None:
    fit, state = started()
    before, start = fit._judge(state), state.centers
    state.made = NOISY.rounds
    fit._descend(state)
    assert fit._judge(state) < 0.95 * before
    assert not torch.equal(state.centers, start)


def discriminants_of(frames: Tensor, codes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the linear discriminants of frames (F, D) with codes (F, 1)."""
    source = FrameSource([frames])
    source.measure(normalize=False)
    statistics = Statistics((1, num_classes), source, pairs=False)
    statistics.add(frames, codes)
    statistics.gather(source)
    return statistics.discriminants(Moments(source))


def test_discriminants_are_the_log_odds_of_gaussians_with_one_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.tensor([0] * 4000 + [1] * 1500 + [2] * 500)[:, None]
    places = torch.tensor([[0.0, 0.0, 1.0], [4.0, 0.0, 1.0], [0.0, -3.0, 2.0]])
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.8]])
    frames = 2.0 + places[codes[:, 0]] + torch.randn(6000, 3, generator=generator) @ mix
    weight, bias = discriminants_of(frames, codes, 3)
    classes = [frames[codes[:, 0] == k].double() for k in range(3)]
    within = sum(len(x) * x.T.cov(correction=0) for x in classes) / 6000 + 0.01 * torch.diag(frames.double().var(dim=0))
    points = frames[::50].double()
    wanted = torch.stack([MultivariateNormal(x.mean(dim=0), within).log_prob(points) + torch.tensor(len(x) / 6000).log() for x in classes], dim=1)
    found = points @ weight.double().T + bias.double()
    torch.testing.assert_close(found - found[:, :1], wanted - wanted[:, :1], rtol=0.01, atol=0.1)


@pytest.mark.parametrize("counts", [(300, 100), (100, 300)])
def test_discriminants_of_classes_in_one_place_are_the_log_of_their_sizes(counts: tuple[int, int]) -> None:
    frames = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    codes = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(counts))[:, None]
    weight, bias = discriminants_of(frames, codes, 2)
    torch.testing.assert_close(weight, torch.zeros(2, 2), rtol=0, atol=1e-4)
    assert bias.exp().tolist() == pytest.approx([(count + 0.5) / 400 for count in counts], rel=1e-4)
