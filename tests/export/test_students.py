"""Students other than the Zipformer as model folders: round trip, config, and a client that has only the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.errors import CheckpointError
from spear.export import AudioEncoder, load_encoder, save_encoder
from spear.export.configuration_spear import SpearConfig
from spear.export.layout import STUDENTS, UNIFORM_REQUIRED, parse_student, student_fields
from spear.files import read_json, read_tensors, write_json, write_tensors
from spear.models.base import StudentConfig
from spear.models.conformer import ConformerConfig
from spear.models.conv_transformer import ConvTransformerConfig
from spear.models.transformer import TransformerConfig
from tests.export.tiny import tone

SIZES: dict[str, Any] = {"conv_channels": (2, 3, 4), "num_layers": 2, "dim": 32, "num_heads": 4, "feedforward_dim": 48, "dropout": 0.25}
CONV: dict[str, Any] = {"conv_dim": 8, "position_layers": 2, "position_kernel": 5, "position_groups": 4, "qkv_bias": True}
CONFIGS: dict[str, StudentConfig] = {
    "conformer": ConformerConfig(kernel=7, **SIZES),
    "transformer": TransformerConfig(**SIZES),
    "conv_transformer": ConvTransformerConfig(**CONV, **{key: value for key, value in SIZES.items() if key != "conv_channels"}),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
CLIENT = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("spear", "draccus", "lhotse"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

given, result, *folders = sys.argv[1:]
inputs, found = load_file(given), {}
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        out = model(inputs["audio"], inputs["lens"])
    found[folder + ".out"], found[folder + ".last"] = out["encoder_out"], out["hidden_states"][-1].clone()
save_file(found, result)
"""


def encoder_of(kind: str) -> AudioEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = CONFIGS[kind].build()
    return AudioEncoder(encoder, CONFIGS[kind]).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([9000, 6000])
    return torch.nn.utils.rnn.pad_sequence([tone(9000), tone(6000, 500.0)], batch_first=True), lens


@kinds
def test_student_comes_back_from_its_folder(kind: str, tmp_path: Path) -> None:
    encoder = encoder_of(kind)
    save_encoder(tmp_path, encoder.encoder, encoder.student, {"name": "x"})
    assert read_json(tmp_path / "config.json")["student_type"] == kind
    loaded = load_encoder(tmp_path)
    assert loaded.student == encoder.student
    with torch.no_grad():
        found, expected = loaded(*batch()), encoder(*batch())
    assert torch.equal(found.features, expected.features)
    assert (loaded.frame_rate_hz, loaded.dim, loaded.num_layers) == (50.0, 32, 2)
    assert "the whole utterance" in (tmp_path / "README.md").read_text()


def test_student_folders_serve_clients_without_the_package(tmp_path: Path) -> None:
    audio, lens = batch()
    write_tensors(tmp_path / "in", {"audio": audio, "lens": lens})
    (tmp_path / "client.py").write_text(CLIENT)
    for kind in CONFIGS:
        encoder = encoder_of(kind)
        save_encoder(tmp_path / kind, encoder.encoder, encoder.student, {})
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "client.py", "in", "out", *CONFIGS]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_tensors(tmp_path / "out")
    for kind in CONFIGS:
        with torch.no_grad():
            expected = encoder_of(kind)(audio, lens)
        torch.testing.assert_close(found[f"{kind}.out"], expected.features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[f"{kind}.last"], expected.hidden_states[-1], atol=1e-5, rtol=1e-5)


@kinds
def test_student_config_survives_json(kind: str, tmp_path: Path) -> None:
    SpearConfig(**student_fields(CONFIGS[kind])).save_pretrained(tmp_path)
    assert SpearConfig.from_pretrained(tmp_path).student() == CONFIGS[kind]
    assert parse_student(student_fields(CONFIGS[kind]), "config.json") == CONFIGS[kind]


@kinds
@pytest.mark.parametrize("key", UNIFORM_REQUIRED)
def test_student_config_raises_checkpoint_error_when_a_size_is_missing(kind: str, key: str) -> None:
    values = {name: value for name, value in student_fields(CONFIGS[kind]).items() if name != key}
    with pytest.raises(CheckpointError, match=f"my.json lacks `{key}`"):
        parse_student(values, "my.json")


def test_load_encoder_raises_checkpoint_error_when_student_is_of_an_unknown_kind(tmp_path: Path) -> None:
    encoder = encoder_of("conformer")
    save_encoder(tmp_path, encoder.encoder, encoder.student, {})
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "student_type": "mamba"})
    with pytest.raises(CheckpointError, match="`student_type` must be one of zipformer, conformer, transformer, conv_transformer, but is 'mamba'"):
        load_encoder(tmp_path)


def test_every_student_of_the_table_can_be_exported() -> None:
    assert set(STUDENTS) == set(StudentConfig.TABLE)
    assert all(StudentConfig.get_choice_class(name) is kind for name, kind in STUDENTS.items())
