"""The S3PRL interface, without the harness: shapes, lengths, rates, and the ways to find the upstream."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spear.errors import ConfigError
from spear.evaluation.s3prl import UpstreamExpert, expert, hubconf
from spear.evaluation.s3prl.__main__ import register
from spear.export import save_encoder
from tests.export.tiny import tiny_encoder, tone


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = tiny_encoder()
    folder = tmp_path_factory.mktemp("s3prl") / "export"
    save_encoder(folder, encoder.encoder, encoder.student)
    return folder


def test_upstream_gives_all_layers_in_one_width(export: Path) -> None:
    upstream, encoder = UpstreamExpert(str(export), None, refresh=False), tiny_encoder()
    wavs = [tone(16000), tone(9000, 500.0), tone(12345)]
    with torch.no_grad():
        found = upstream(wavs)
    states = found["hidden_states"]
    assert len(states) == upstream.num_states == 3
    assert {state.shape for state in states} == {(3, states[0].shape[1], 48)}
    for row, wav in enumerate(wavs):
        with torch.no_grad():
            alone = encoder(wav)
        count = int(alone.lens[0])
        inner = count - 4  # the last frames of a shorter item see the padding (`AudioEncoder.forward`)
        torch.testing.assert_close(states[0][row, :inner, :32], alone.hidden_states[0][0, :inner], rtol=0.05, atol=0.02)
        assert abs(count - len(wav) / upstream.get_downsample_rates("hidden_states")) < 5
    assert not states[0][..., 32:].any()
    torch.testing.assert_close(states[-1], found["last_hidden_state"], rtol=0, atol=0)


@pytest.mark.parametrize(("factor", "rate"), [(1, 320), (2, 640)])
def test_upstream_downsample_rate_is_samples_per_frame(tmp_path: Path, factor: int, rate: int) -> None:
    encoder = tiny_encoder(output_downsampling_factor=factor)
    save_encoder(tmp_path / "export", encoder.encoder, encoder.student)
    upstream = UpstreamExpert(str(tmp_path / "export"))
    assert upstream.get_downsample_rates("hidden_states") == upstream.get_downsample_rates("SID") == rate
    with torch.no_grad():
        assert len({state.shape[1] for state in upstream([tone(16000)])["hidden_states"]}) == 1


def test_upstream_survives_the_shortest_input_of_the_harness(export: Path) -> None:
    with torch.no_grad():
        states = UpstreamExpert(str(export))([tone(800), tone(900)])["hidden_states"]
    assert states[0].shape[:2] == (2, 1)


def test_upstream_can_be_trained(export: Path) -> None:
    upstream = UpstreamExpert(str(export))
    sum(state.square().mean() for state in upstream([tone(8000)])["hidden_states"]).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in upstream.parameters())


def test_upstream_raises_config_error_when_a_config_is_given(export: Path) -> None:
    with pytest.raises(ConfigError, match="`model_config` must be empty, but is 'x.yaml'"):
        UpstreamExpert(str(export), "x.yaml")


def test_upstream_registers_its_names(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = SimpleNamespace()
    register(hub)
    assert hub.spear_local(ckpt=str(export), model_config=None, refresh=False).width == 48
    monkeypatch.setenv("SPEAR_EXPORT", str(export))
    assert hub.spear().width == 48


def test_upstream_folder_loads_with_torch_hub(export: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(hubconf.__file__).parent, tmp_path / "upstream", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("spear", "spear_local"):
        upstream = torch.hub.load(str(tmp_path / "upstream"), name, source="local", ckpt=str(export))
        assert upstream.get_downsample_rates("hidden_states") == 320


def test_upstream_file_works_beside_an_export(export: Path, tmp_path: Path) -> None:
    """S3PRL puts a repository's folder on the path of modules and imports ``expert``."""
    folder = tmp_path / "repository"
    shutil.copytree(export, folder)
    shutil.copy(expert.__file__, folder / "expert.py")
    code = "import sys; sys.path.append(sys.argv[1]); from expert import UpstreamExpert; print(UpstreamExpert(ckpt=sys.argv[1] + '/.').num_states)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
