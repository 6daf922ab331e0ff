"""The shards stage: readable by Lhotse and by us, checked against the tokens, resumable to the same bytes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.features.io import NumpyFilesWriter
from lhotse.qa import validate

from spear.data.audio import load_audio
from spear.data.open_files import FILES
from spear.data.shards import ShardReader, ShardsConfig, write_shard
from spear.data.token_store import TokenStore
from spear.errors import ArtifactError, DataError
from spear.files import read_json, write_json
from spear.recipe import Run
from spear.stages import manifests, shards
from spear.stages.agreement import check_teachers, teacher_settings
from spear.teachers.logmel import LogMelConfig
from tests.data.cuts import AUDIO, SPEECH, cut_of, cuts_corpus, folder_corpus, make_run, make_shards, save, tone, write_cuts, write_tokens


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the record with its times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "artifact.json"}


def one_corpus(tmp_path: Path, domain: str = "audio", cuts: int = 6, **settings: Any) -> Run:
    for i in range(cuts):
        save(tmp_path / "in" / f"c{i}.wav", tone(1.0 + 0.1 * i))
    run = make_run(tmp_path, [folder_corpus(tmp_path / "in", "c", domain)], **settings)
    manifests.run(run)
    return run


def test_shards_are_read_by_lhotse_with_audio_and_tokens(tmp_path: Path) -> None:
    run = one_corpus(tmp_path)
    write_tokens(run)
    shards.run(run)
    folder = tmp_path / "shards" / "c" / "train"
    originals = {cut.id: cut for cut in CutSet.from_jsonl_lazy(manifests.manifest_path(tmp_path, "c", "train"))}
    stores = {teacher: TokenStore.open(tmp_path / "tokens" / teacher / "c" / "train") for teacher in ("speech", "audio")}
    found = list(CutSet.from_shar(in_dir=str(folder)))
    assert [cut.id for cut in found] == list(originals)
    for cut in found:
        assert np.array_equal(cut.load_audio()[0], load_audio(originals[cut.id]))  # 16-bit files come back bit for bit
        assert np.array_equal(cut.load_speech_tokens(), stores["speech"][cut.id])
        assert np.array_equal(cut.load_audio_tokens(), stores["audio"][cut.id])
        assert cut.custom["domain"] == "audio"
    assert len(list(folder.glob("recording.*.tar"))) == 2  # 6 cuts, 4 to a shard
    assert len(list(CutSet.from_shar(in_dir=str(folder), shuffle_shards=True, split_for_dataloading=True))) == 6


def test_shard_reader_finds_every_cut_at_random(tmp_path: Path) -> None:
    run = one_corpus(tmp_path)
    write_tokens(run)
    shards.run(run)
    reader = ShardReader(tmp_path / "shards" / "c" / "train")
    store = TokenStore.open(tmp_path / "tokens" / "audio" / "c" / "train")
    assert (len(reader), reader.corpus, reader.domain) == (6, "c", "audio")
    assert reader.specs == {"speech": SPEECH, "audio": AUDIO}
    for number in (5, 0, 3):
        item = reader[number]
        assert item.id == reader.id(number) == f"c{number}"
        assert len(item.audio) == reader.samples[number] == round((1.0 + 0.1 * number) * 16000)
        assert np.array_equal(item.tokens["audio"], store[item.id])
    assert list(ShardReader(reader.folder, ["audio"])[0].tokens) == ["audio"]


def test_shard_readers_share_the_files_that_stay_open(tmp_path: Path) -> None:
    folder, before = make_shards(tmp_path).data / "shards" / "voices" / "train", len(FILES)
    readers = [ShardReader(folder) for _ in range(3)]
    readers.append(pickle.loads(pickle.dumps(readers[0])))
    assert len({reader[0].audio.tobytes() for reader in readers}) == 1
    assert len(FILES) == before + 4 * 2  # audio and one teacher's tokens each
    del readers
    assert len(FILES) == before


def test_shards_holds_downmixed_resampled_audio_and_keeps_supervisions(tmp_path: Path) -> None:
    stereo = np.stack([tone(1.0, 8000, 300), tone(1.0, 8000, 900)], axis=1)
    speech = cut_of(save(tmp_path / "s.wav", tone(1.0)), speaker="anna", phones=[("ah", 0.1, 0.2)])
    save(tmp_path / "in" / "two.wav", stereo, 8000)
    corpora = [folder_corpus(tmp_path / "in", "c", "speech"), cuts_corpus("v", "speech", write_cuts(tmp_path / "t.jsonl", [speech]))]
    run = make_run(tmp_path, corpora)
    manifests.run(run)
    write_tokens(run)
    shards.run(run)
    (cut,) = CutSet.from_shar(in_dir=str(tmp_path / "shards" / "c" / "train"))
    assert set(np.argsort(np.abs(np.fft.rfft(load_audio(cut))))[-2:]) == {300, 900}
    (cut,) = CutSet.from_shar(in_dir=str(tmp_path / "shards" / "v" / "train"))
    assert cut.supervisions[0].speaker == "anna"
    assert cut.supervisions[0].alignment["phone"][0].symbol == "ah"


def test_shards_move_cuts_and_what_belongs_to_them_to_the_start(tmp_path: Path) -> None:
    recording = cut_of(save(tmp_path / "long.wav", np.stack([tone(6.0), tone(6.0, hz=900)], axis=1)), "long").recording
    with NumpyFilesWriter(str(tmp_path / "f0")) as writer:
        f0 = writer.store_array("long", np.arange(600, dtype=np.float32), frame_shift=0.01, temporal_dim=0, start=0.0)
    parts = [SupervisionSegment("p", "long", 0.5, 1.0, channel=1)]
    custom = {"f0": f0, "clean": recording, "prompt": recording, "prompt_unaligned": True, "session": 3}
    cuts = [
        MonoCut(name, start, 2.0, 1, recording=recording, supervisions=parts, custom=dict(custom)) for name, start in (("first", 0.0), ("last", 4.0))
    ]
    write_shard(tmp_path / "c", 0, cuts, {}, ShardsConfig())
    first, last = CutSet.from_shar(in_dir=str(tmp_path / "c"))
    validate(first)
    assert (last.start, last.channel, last.supervisions[0].channel, last.supervisions[0].start) == (0.0, 0, 0, 0.5)
    assert np.array_equal(last.load_f0(), np.arange(400, 600))
    assert np.array_equal(first.load_f0(), np.arange(200))
    assert set(first.custom) - set(last.custom) == {"clean"}
    assert set(custom) <= set(first.custom)


def test_shards_gives_noise_no_tokens(tmp_path: Path) -> None:
    run = make_shards(tmp_path, noise=2)
    reader = ShardReader(run.data / "shards" / "hiss" / "train")
    assert reader.specs == {}
    assert reader[0].tokens == {}


def test_shards_stopped_and_run_again_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_corpus(tmp_path, cuts=11)
    write_tokens(run)
    shards.run(run)
    expected = files_of(tmp_path / "shards")
    (tmp_path / "shards").rename(tmp_path / "once")
    write = shards.write_shard
    written: list[int] = []

    def stop_in_the_second(folder: Path, number: int, *rest: Any) -> dict[str, torch.Tensor]:
        written.append(number)
        part = write(folder, number, *rest)
        if number == 1:
            (folder / ".recording.000001.tar.x.tmp").write_text("left by a kill")
            raise KeyboardInterrupt
        return part

    monkeypatch.setattr(shards, "write_shard", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        shards.run(run)
    monkeypatch.setattr(shards, "write_shard", lambda folder, number, *rest: written.append(number) or write(folder, number, *rest))
    shards.run(run)
    assert written == [0, 1, 1, 2]  # the finished shard is not made again
    assert files_of(tmp_path / "shards") == expected
    shards.run(run)
    assert written == [0, 1, 1, 2]


def test_shards_raises_data_error_when_the_store_lacks_cuts(tmp_path: Path) -> None:
    run = one_corpus(tmp_path, "speech")
    write_tokens(run, skip=("c1", "c3"))
    with pytest.raises(DataError, match=r"the tokens of speech in .*tokens/speech/c/train lack 2 of 6 cuts: c1, c3") as error:
        shards.run(run)
    assert error.value.cause == "missing_tokens"


def test_shards_leaves_out_cuts_that_failed_in_tokens(tmp_path: Path) -> None:
    run = one_corpus(tmp_path, "speech")
    write_tokens(run, skip=("c1",))
    (tmp_path / "tokens" / "speech" / "c" / "train" / "failures.jsonl").write_text('{"id": "c1", "cause": "decode"}\n')
    shards.run(run)
    reader = ShardReader(tmp_path / "shards" / "c" / "train")
    assert [reader.id(i) for i in range(len(reader))] == ["c0", "c2", "c3", "c4", "c5"]
    assert read_json(tmp_path / "shards" / "c" / "artifact.json")["counts"]["train"]["failed_in_tokens"] == 1
    (tmp_path / "tokens" / "speech" / "c" / "train" / "failures.jsonl").write_text("")  # as after `spear tokens --retry-failed`
    with pytest.raises(ArtifactError, match=r"was made from other inputs: `inputs\.failures/speech/train` was .*, is None"):
        shards.run(run)


@pytest.mark.parametrize("extra", [-3, 3, 50])
def test_shards_raises_data_error_when_tokens_do_not_fit_the_audio(tmp_path: Path, extra: int) -> None:
    run = one_corpus(tmp_path, "speech", cuts=1)
    write_tokens(run, extra_frames=extra)
    match = rf"tokens of speech for cut c0: must have 50\.0 frames for 1\.000 s at 50 Hz .*, but have {50 + extra}"
    with pytest.raises(DataError, match=match):
        shards.run(run)


@pytest.mark.parametrize("extra", [-2, 2])
def test_shards_accepts_tokens_within_the_tolerance(tmp_path: Path, extra: int) -> None:
    run = one_corpus(tmp_path, "speech", cuts=1)
    write_tokens(run, extra_frames=extra)
    shards.run(run)
    assert len(ShardReader(tmp_path / "shards" / "c" / "train")[0].tokens["speech"]) == 50 + extra


def test_shards_raises_artifact_error_when_tokens_are_unfinished_or_changed(tmp_path: Path) -> None:
    run = one_corpus(tmp_path, "speech")
    with pytest.raises(ArtifactError, match=r"tokens/speech/c/train does not exist: run `spear tokens`"):
        shards.run(run)
    write_tokens(run)
    shards.run(run)
    write_json(tmp_path / "tokens" / "speech" / "c" / "train" / "artifact.json", {"fingerprint": "other", "config": {}})
    with pytest.raises(ArtifactError, match="`inputs.tokens/speech/train` was speech-0, is other"):
        shards.run(run)


def test_shard_reader_raises_when_shards_are_damaged(tmp_path: Path) -> None:
    run = one_corpus(tmp_path, "speech", cuts=2, shards=ShardsConfig())
    with pytest.raises(ArtifactError, match=r"train_index\.json does not exist"):
        ShardReader(tmp_path / "shards" / "c" / "train")
    write_tokens(run)
    shards.run(run)
    tar = tmp_path / "shards" / "c" / "train" / "recording.000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:40000])
    with pytest.raises(DataError, match=r"cut c1 in .*recording\.000000\.tar: the file is shorter than its index says"):
        ShardReader(tar.parent)[1]
    tar.write_bytes(whole[:1000] + bytes(20000) + whole[21000:])
    with pytest.raises(DataError, match=r"cut c0 in .*: (audio cannot be decoded|must hold 16000 samples)"):
        ShardReader(tar.parent)[0]
    tar.unlink()
    with pytest.raises(DataError, match=r"cut c0 in .*cannot be read: No such file"):
        ShardReader(tar.parent)[0]


def test_check_teachers_raises_artifact_error_when_the_recipe_names_another_teacher(tmp_path: Path) -> None:
    run = one_corpus(tmp_path, "speech", teachers={"speech": LogMelConfig(stack=2)})
    made = {"kind": "tokens", "config": {"teachers": teacher_settings(run, ["speech"])}}
    check_teachers(run, made, ["speech"], {})
    other = one_corpus(tmp_path, "speech", teachers={"speech": LogMelConfig(stack=4)})
    with pytest.raises(ArtifactError, match="the tokens were made by another teacher speech: `teachers.speech.stack` was 2, is 4"):
        check_teachers(other, made, ["speech"], {})
