"""The encoder as users meet it, and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spear.data.fbank import fbank_batch
from spear.errors import CheckpointError, DataError
from spear.export import AudioEncoder, load_encoder, save_encoder
from spear.export.huggingface import write_folder
from spear.files import read_json, read_tensors, write_json, write_tensors
from tests.export.tiny import tiny_encoder, tone


def save(folder: Path, encoder: AudioEncoder, **info: Any) -> Path:
    save_encoder(folder, encoder.encoder, encoder.student, info)
    return folder


def run(encoder: AudioEncoder, *arguments: Any, **options: Any) -> Any:
    with torch.no_grad():
        return encoder(*arguments, **options)


def test_audio_encoder_states_what_its_frames_are() -> None:
    encoder = tiny_encoder()
    assert (encoder.sample_rate, encoder.frame_rate_hz, encoder.dim, encoder.num_layers) == (16000, 50.0, 48, 2)
    assert encoder.first_frame_s == pytest.approx(0.045)
    slow = tiny_encoder(output_downsampling_factor=2)
    assert slow.frame_rate_hz == 25.0
    assert slow.first_frame_s == pytest.approx(0.055)


def test_audio_encoder_gives_one_frame_for_ten_milliseconds() -> None:
    out = run(tiny_encoder(), tone(160))
    assert out.features.shape == (1, 1, 48)
    assert out.lens.tolist() == [1]
    longer = run(tiny_encoder(), torch.cat([tone(160), torch.zeros(1200)]))
    assert torch.equal(out.features, longer.features)


def test_audio_encoder_takes_audio_as_its_log_mels() -> None:
    encoder, audio, lens = tiny_encoder(), torch.stack([tone(8000), tone(8000, 900.0)]), torch.tensor([8000, 5000])
    out = run(encoder, audio, lens)
    with torch.no_grad():
        same = encoder.forward_features(*fbank_batch(audio, lens))
    assert torch.equal(out.features, same.features)
    assert [state.shape for state in out.hidden_states] == [(2, 21, 32), (2, 21, 48)]


@pytest.mark.parametrize("factor", [1, 2])
def test_audio_encoder_hidden_states_have_the_rate_of_the_output(factor: int) -> None:
    encoder = tiny_encoder(output_downsampling_factor=factor, downsampling_factor=(2, 1))
    out = run(encoder, tone(8000))
    frames = out.features.shape[1]
    assert frames == -(-21 // factor)
    assert {state.shape[1] for state in out.hidden_states} == {frames}
    # the last stack is not downsampled, so its layer is the output
    torch.testing.assert_close(out.hidden_states[-1], out.features)


def test_audio_encoder_ignores_batch_mates_of_equal_length_and_padding_content() -> None:
    encoder, first, second = tiny_encoder(), tone(8000), tone(8000, 900.0)
    alone = run(encoder, first)
    together = run(encoder, torch.stack([first, second]))
    torch.testing.assert_close(together.features[0], alone.features[0], atol=1e-5, rtol=1e-5)
    noisy = torch.cat([first, torch.full((3000,), float("nan"))])
    torch.testing.assert_close(run(encoder, noisy, torch.tensor([8000])).features, alone.features, atol=1e-5, rtol=1e-5)


def test_audio_encoder_batch_independent_gives_what_each_item_gives_alone() -> None:
    encoder, lengths = tiny_encoder(), [5000, 8000, 300, 5000]
    rows = [tone(length, 200.0 + 150 * i) for i, length in enumerate(lengths)]
    audio = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    out = run(encoder, audio, torch.tensor(lengths), batch_independent=True)
    for i, row in enumerate(rows):
        alone = run(encoder, row)
        frames = int(alone.lens)
        assert int(out.lens[i]) == frames
        torch.testing.assert_close(out.features[i, :frames], alone.features[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.hidden_states[0][i, :frames], alone.hidden_states[0][0], atol=1e-5, rtol=1e-5)
        assert not out.features[i, frames:].any()


@pytest.mark.parametrize("factor", [1, 2])
def test_audio_encoder_batch_independent_takes_log_mels_too(factor: int) -> None:
    encoder, lengths = tiny_encoder(output_downsampling_factor=factor), [5000, 8000, 7900]
    audio = torch.nn.utils.rnn.pad_sequence([tone(length, 200.0 + 150 * i) for i, length in enumerate(lengths)], batch_first=True)
    features, lens = fbank_batch(audio, torch.tensor(lengths))
    with torch.no_grad():
        out = encoder.forward_features(features, lens, batch_independent=True)
        for i, length in enumerate(lens.tolist()):
            alone = encoder.forward_features(features[i, :length])
            frames = int(alone.lens)
            assert int(out.lens[i]) == frames
            torch.testing.assert_close(out.features[i, :frames], alone.features[0], atol=1e-5, rtol=1e-5)
            for state, expected in zip(out.hidden_states, alone.hidden_states):
                torch.testing.assert_close(state[i, :frames], expected[0], atol=1e-5, rtol=1e-5)


def test_padded_batch_front_end_differs_in_the_last_three_frames_only() -> None:
    encoder = tiny_encoder().encoder
    audio = torch.stack([tone(8000), tone(8000, 900.0)])
    features, lens = fbank_batch(audio, torch.tensor([8000, 5000]))
    with torch.no_grad():
        padded, frames = encoder.encoder_embed(features, lens)
        alone, _ = encoder.encoder_embed(features[1:, : int(lens[1])], lens[1:])
    last = int(frames[1])
    torch.testing.assert_close(padded[1, : last - 3], alone[0, : last - 3], atol=1e-5, rtol=1e-5)
    assert (padded[1, last - 3 : last] - alone[0, last - 3 :]).abs().amax(dim=1).min() > 1e-4


def test_audio_encoder_raises_data_error_when_audio_is_integers() -> None:
    with pytest.raises(DataError, match="must be floating, but is int16"):
        tiny_encoder()(torch.zeros(2, 8000, dtype=torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_audio_encoder_runs_with_weights_in_half_precision(dtype: torch.dtype) -> None:
    encoder = tiny_encoder()
    exact = run(encoder, tone(8000)).features
    rough = run(encoder.to(dtype), tone(8000)).features
    assert rough.dtype == dtype
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("changes", [{}, {"output_downsampling_factor": 2}, {"causal": True, "chunk_size": 8, "left_context_frames": 64}])
def test_saved_encoder_loads_with_the_same_numbers(tmp_path: Path, changes: dict[str, Any]) -> None:
    encoder = tiny_encoder(**changes)
    loaded = load_encoder(save(tmp_path / "model", encoder))
    assert not loaded.training
    assert torch.equal(run(loaded, tone(8000)).features, run(encoder, tone(8000)).features)


def test_saved_folder_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (save(tmp_path / name, tiny_encoder(), name="x") for name in "ab")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_saved_config_keeps_the_released_form(tmp_path: Path) -> None:
    config = read_json(save(tmp_path, tiny_encoder(), name="x", compute={"wall_s": 3}) / "config.json")
    assert config["encoder_dim"] == "32,48"
    assert config["query_head_dim"] == "8,8"
    assert config["model_type"] == "spear"
    assert config["frame_rate_hz"] == 50.0
    assert config["training"] == {"name": "x"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("model.") for name in file.keys())  # noqa: SIM118 - not a mapping


def test_saving_raises_checkpoint_error_when_a_weight_is_not_finite(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.encoder.mask_emb[3] = float("inf")
    with pytest.raises(CheckpointError, match="1 weights hold NaN or infinity: mask_emb"):
        save(tmp_path / "model", encoder)
    assert not (tmp_path / "model").exists()


def test_writing_raises_checkpoint_error_when_student_is_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be of type zipformer, .* to be exported, but is dict"):
        write_folder(tmp_path, tiny_encoder().encoder, {}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["", "model.", "model.model.", "module.model."])
def test_load_encoder_takes_released_names_and_drops_heads(tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder()
    folder = save(tmp_path, encoder)
    state = {prefix + key: value for key, value in encoder.encoder.state_dict().items()}
    heads = ("codebook_loss_net.linear2_bias", "codebook_loss_heads.0.linear1.weight", "audio_tagging_proj.1.bias")
    write_tensors(folder / "model.safetensors", {**state, **{prefix + name: torch.zeros(2) for name in heads}})
    with caplog.at_level("INFO"):
        loaded = load_encoder(folder)
    assert torch.equal(run(loaded, tone(8000)).features, run(encoder, tone(8000)).features)
    assert all(prefix + name in caplog.text for name in heads)


def test_load_encoder_reads_weights_in_several_files(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    folder = save(tmp_path, encoder)
    state = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(state), {}
    for part in range(2):
        chosen = names[part::2]
        save_file({name: state[name] for name in chosen}, folder / f"model-{part}.safetensors")
        index.update(dict.fromkeys(chosen, f"model-{part}.safetensors"))
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    assert torch.equal(run(load_encoder(folder), tone(8000)).features, run(encoder, tone(8000)).features)


def test_load_encoder_raises_checkpoint_error_and_lists_all_differences(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_encoder())
    state = read_tensors(folder / "model.safetensors")
    del state["model.mask_emb"]
    state["model.surprise"] = torch.zeros(1)
    state["model.encoder_embed.out.bias"] = torch.zeros(5)
    write_tensors(folder / "model.safetensors", state)
    with pytest.raises(
        CheckpointError,
        match=r"missing \(1\): mask_emb; left over \(1\): surprise; of another shape \(1\): encoder_embed.out.bias \(5,\) for \(32,\)",
    ):
        load_encoder(folder)


def test_load_encoder_raises_checkpoint_error_when_config_is_wrong(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_encoder())
    good = read_json(folder / "config.json")
    for change, match in (
        ({"model_type": "hubert"}, "`model_type` must be 'spear', but is 'hubert'"),
        ({"encoder_dim": None}, "lacks `encoder_dim`"),
        ({"encoder_dim": "32,wide"}, "`encoder_dim` must be whole numbers separated by commas, but is '32,wide'"),
    ):
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=match):
            load_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_encoder(folder)


def test_load_encoder_raises_checkpoint_error_when_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="none does not exist"):
        load_encoder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_encoder(tmp_path / "file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nobody/nothing is no folder and cannot be fetched") as caught:
        load_encoder("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_load_encoder_fetches_a_hugging_face_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder()
    folder = save(tmp_path / "model", encoder)
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = load_encoder("someone/model", revision="v2")
    assert asked == [("someone/model", "v2")]
    assert torch.equal(run(loaded, tone(4000)).features, run(encoder, tone(4000)).features)


def released(fixtures: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write the reference model of the fixtures as a released folder; returns the reference tensors."""
    with safe_open(fixtures / "zipformer_tiny.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    flat = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in config.items()}
    write_json(folder / "config.json", {"model_type": "spear", "architectures": ["SpearModel"], **flat, "chunk_size": 8, "left_context_frames": 128})
    save_file({"model." + name: value for name, value in tensors.items() if name.startswith("model.")}, folder / "model.safetensors")
    return tensors


def test_load_encoder_gives_the_numbers_of_the_released_code(fixtures: Path, tmp_path: Path) -> None:
    expected = released(fixtures, tmp_path)
    encoder = load_encoder(tmp_path)
    rows = [expected["in.audio.0"], expected["in.audio.1"]]
    lens = torch.tensor([len(row) for row in rows])
    audio = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        from_audio, from_features = encoder(audio, lens), encoder.forward_features(expected["in.x"], expected["in.x_lens"])
    for out in (from_audio, from_features):
        torch.testing.assert_close(out.features, expected["out.encoder_out"], atol=1e-4, rtol=0)
        assert out.lens.tolist() == expected["out.encoder_out_lens"].tolist()
        for layer, state in enumerate(out.hidden_states):
            torch.testing.assert_close(state, expected[f"out.layer.{layer}"], atol=1e-4, rtol=0)


def test_load_encoder_assumes_the_released_head_dims_where_config_names_none(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_encoder())
    config = read_json(folder / "config.json")
    for name in ("query_head_dim", "pos_head_dim", "value_head_dim", "conv_channels"):
        del config[name]
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"of another shape .*self_attn"):
        load_encoder(folder)
    fitting = save(tmp_path / "fitting", tiny_encoder(query_head_dim=32, value_head_dim=12))
    write_json(fitting / "config.json", config)
    assert load_encoder(fitting).student.stacks()[0].value_head_dim == 12
