"""An exported student as a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spear.errors import CheckpointError, ConfigError
from spear.export import load_encoder, save_encoder
from spear.models.zipformer.config import ZipformerConfig
from spear.teachers import extract
from spear.teachers.spear import SpearTeacherConfig
from tests.teachers.conftest import noise


@pytest.fixture(scope="module", params=[1, 2])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random encoder at 50 or 25 Hz, exported."""
    config = ZipformerConfig(
        conv_channels=(4, 8, 16),
        downsampling_factor=(1, 2),
        num_encoder_layers=(1, 1),
        encoder_dim=(32, 48),
        encoder_unmasked_dim=(32, 32),
        feedforward_dim=(64, 64),
        num_heads=(2, 2),
        cnn_module_kernel=(15, 15),
        output_downsampling_factor=request.param,
    )
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("encoder") / f"by{request.param}"
    save_encoder(folder, config.build(), config, {})
    return folder


@pytest.mark.parametrize("layer", ["last", 0, 1, -1])
def test_spear_teacher_gives_the_layers_of_the_encoder(export: Path, layer: int | str) -> None:
    encoder = load_encoder(export)
    teacher = SpearTeacherConfig(model=str(export), layer=layer).build()  # type: ignore[arg-type]
    with torch.no_grad():
        out = encoder(noise(16000)[None])
    expected = out.features if layer == "last" else out.hidden_states[int(layer)]
    (found,) = extract(teacher, [noise(16000)])
    torch.testing.assert_close(found, expected[0])
    assert (teacher.frame_rate_hz, teacher.first_frame_s) == (encoder.frame_rate_hz, encoder.first_frame_s)
    assert teacher.dim == found.shape[1]


def test_spear_teacher_does_not_depend_on_batch_mates(export: Path) -> None:
    teacher = SpearTeacherConfig(model=str(export)).build()
    audio = [noise(16000, 1), noise(9000, 2), noise(16160, 3)]
    for item, found in zip(audio, extract(teacher, audio)):
        (alone,) = extract(teacher, [item])
        assert found.shape == alone.shape
        assert (found - alone).abs().max() < 1e-5


def test_spear_teacher_counts_frames_exactly(export: Path) -> None:
    teacher = SpearTeacherConfig(model=str(export)).build()
    for samples in (1440, 1680, 1681, 7919, 8000, 8081):
        assert len(extract(teacher, [noise(samples)])[0]) == teacher.num_frames(samples)
    assert teacher.num_frames(1300) == 0


def test_spear_teacher_folder_starts_from_the_data_folder(export: Path) -> None:
    found = SpearTeacherConfig(model=export.name).build(export.parent)
    assert found.fingerprint() == SpearTeacherConfig(model=str(export)).build().fingerprint()
    assert found.fingerprint() != SpearTeacherConfig(model=str(export), layer=0).build().fingerprint()


def test_spear_teacher_raises_config_error_when_layer_does_not_exist(export: Path) -> None:
    with pytest.raises(ConfigError, match=r"`layer` must be between 0 and 1, but is 2 \("):
        SpearTeacherConfig(model=str(export), layer=2).build()


def test_spear_teacher_raises_checkpoint_error_when_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        SpearTeacherConfig(model=str(tmp_path / "nothing")).build()
