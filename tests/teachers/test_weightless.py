"""Log-mel and MFCC teachers."""

from __future__ import annotations

import draccus
import pytest
import torch

from spear.data.fbank import fbank, mfcc
from spear.errors import ConfigError
from spear.teachers import TeacherConfig, extract
from spear.teachers.logmel import LogMelConfig, MfccConfig
from tests.teachers.conftest import noise


def test_logmel_is_the_students_fbank() -> None:
    teacher = LogMelConfig(num_mel_bins=40).build()
    assert (teacher.frame_rate_hz, teacher.first_frame_s, teacher.dim, teacher.num_layers) == (100.0, 0.005, 40, 1)
    (found,) = extract(teacher, [noise(8000)])
    torch.testing.assert_close(found, fbank(noise(8000), 40))


def test_logmel_stacks_neighbouring_frames() -> None:
    teacher = LogMelConfig(num_mel_bins=40, stack=4).build()
    assert (teacher.frame_rate_hz, teacher.first_frame_s, teacher.dim) == (25.0, 0.02, 160)
    (found,) = extract(teacher, [noise(8320)])  # 52 frames
    torch.testing.assert_close(found, fbank(noise(8320), 40).reshape(13, 160))
    (shorter,) = extract(teacher, [noise(8000)])  # 50 frames: the last two are dropped
    assert shorter.shape == (12, 160)


def test_mfcc_has_39_coefficients() -> None:
    teacher = MfccConfig(stack=2).build()
    (found,) = extract(teacher, [noise(8000)])
    torch.testing.assert_close(found, mfcc(noise(8000)).reshape(25, 78))


def test_logmel_does_not_depend_on_batch_mates() -> None:
    teacher = LogMelConfig().build()
    audio = [noise(8000, 1), noise(5000, 2)]
    for item, found in zip(audio, extract(teacher, audio)):
        assert torch.equal(extract(teacher, [item])[0], found)


def test_weightless_fingerprints_differ_by_settings() -> None:
    configs = [LogMelConfig(), LogMelConfig(stack=2), LogMelConfig(num_mel_bins=64), MfccConfig(), MfccConfig(stack=2)]
    assert len({config.build().fingerprint() for config in configs}) == len(configs)
    assert LogMelConfig().build().fingerprint() == LogMelConfig().build().fingerprint()


@pytest.mark.parametrize("key", ["num_mel_bins", "stack"])
def test_logmel_raises_config_error_when_a_size_is_zero(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be at least 1, but is 0"):
        LogMelConfig(**{key: 0})


def test_teacher_config_raises_config_error_when_type_is_unknown() -> None:
    with pytest.raises(ConfigError, match="must be one of atst, beats, dasheng, huggingface, layers, logmel, mfcc, python, redimnet, spear or"):
        TeacherConfig.get_choice_class("wavlm2")


def test_teacher_config_reads_logmel_from_yaml() -> None:
    assert draccus.decode(TeacherConfig, {"type": "logmel", "stack": 2}) == LogMelConfig(stack=2)
