"""Several layers of one model side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spear.errors import ConfigError
from spear.teachers import Teacher, TeacherConfig, extract
from spear.teachers.layers import JoinedLayers, LayersConfig
from tests.teachers.conftest import noise

Build = Callable[..., Teacher]
Saved = Callable[[str], Path]


@pytest.mark.parametrize("family", ["wavlm_layer", "wavlm_group", "w2v_bert", "whisper", "ast"])
def test_layers_are_the_single_layers_side_by_side(saved: Saved, teacher: Build, family: str) -> None:
    both = LayersConfig(model=str(saved(family)), layers=[2, 0]).build()
    assert (both.dim, both.num_layers) == (64, 3)
    singles = [teacher(family, layer=layer) for layer in (2, 0)]
    assert (both.frame_rate_hz, both.first_frame_s) == (singles[0].frame_rate_hz, singles[0].first_frame_s)
    for samples in (16000, 27001):
        expected = torch.cat([extract(single, [noise(samples)])[0] for single in singles], dim=1)
        torch.testing.assert_close(extract(both, [noise(samples)])[0], expected, atol=1e-6, rtol=1e-5)


def test_layers_of_ast_keep_the_patches_beside_each_other(saved: Saved, teacher: Build) -> None:
    both = LayersConfig(model=str(saved("ast")), layers=[1], frequency="concat").build()
    single = teacher("ast", layer=1, frequency="concat")
    torch.testing.assert_close(extract(both, [noise(16000)])[0], extract(single, [noise(16000)])[0])


def test_layers_run_the_model_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    both = LayersConfig(model=str(saved("wavlm_layer")), layers=[0, 1, 2]).build()
    calls: list[object] = []
    both.model.model.register_forward_hook(lambda *_: calls.append(None))  # type: ignore[union-attr, operator]
    extract(both, [noise(16000)])
    assert len(calls) == 1


def test_layers_fingerprint_names_layers_and_their_order(saved: Saved) -> None:
    folder = str(saved("wavlm_layer"))
    found = {LayersConfig(model=folder, layers=layers).build().fingerprint() for layers in ([0, 1], [1, 0], [1, 2], [1])}
    assert len(found) == 4
    assert LayersConfig(model=folder, layers=[-1, 0]).build().fingerprint() == LayersConfig(model=folder, layers=[2, 0]).build().fingerprint()


def test_layers_config_is_read_from_yaml() -> None:
    import draccus

    config = draccus.decode(TeacherConfig, {"type": "layers", "model": "a/b", "layers": [9, 21]})
    assert config == LayersConfig(model="a/b", layers=[9, 21])


@pytest.mark.parametrize("layers", [[], [1, 1]])
def test_layers_raises_config_error_when_they_are_not_different(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match="`layers` must be one or more different numbers"):
        LayersConfig(model="x", layers=layers)
    with pytest.raises(ConfigError, match="`layer` must not be given beside `layers`, but is 3"):
        LayersConfig(model="x", layers=[1], layer=3)


def test_layers_raises_config_error_when_two_name_one_or_none(saved: Saved) -> None:
    with pytest.raises(ConfigError, match=r"`layers` must be different, but \[2, -1\] name one of 3 twice"):
        LayersConfig(model=str(saved("wavlm_layer")), layers=[2, -1]).build()
    with pytest.raises(ConfigError, match="`layer` must be between 0 and 2, but is 3"):
        LayersConfig(model=str(saved("wavlm_layer")), layers=[0, 3]).build()


def test_layers_raises_config_error_when_the_model_has_one_output(tmp_path: Path) -> None:
    from tests.teachers.codecs import make

    make("mimi").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="`layers` needs a model that gives its hidden states one by one"):
        LayersConfig(model=str(tmp_path), layers=[0]).build()


def test_joined_layers_raises_config_error_when_the_count_differs(saved: Saved, teacher: Build) -> None:
    joined = JoinedLayers(teacher("wavlm_layer").model, [0], 4, "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="x must give 4 hidden states, but gives 3"):
        joined(noise(16000)[None])
