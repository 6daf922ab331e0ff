"""Stage evaluate on a tiny run with real parts: student, teacher, quantizer, manifests."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from spear.data.corpora import CorpusConfig
from spear.data.sources import CutsSource
from spear.errors import ArtifactError, ConfigError, DataError
from spear.evaluation.config import EvaluationConfig
from spear.evaluation.scoring import ordered
from spear.evaluation.tasks.frames import FramesConfig
from spear.evaluation.tasks.segments import SegmentsConfig
from spear.evaluation.tasks.utterances import UtterancesConfig
from spear.evaluation.tasks.verification import VerificationConfig
from spear.export import save_encoder
from spear.files import make_folder, read_json, write_json
from spear.models.zipformer.config import ZipformerConfig
from spear.objectives.layer_distillation import LayerDistillationConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.quantizers.kmeans import KMeans, KMeansConfig
from spear.recipe import Recipe, Run
from spear.stages.artifact import Artifact
from spear.stages.evaluate import Evaluator, build_untrained, example_cuts, run
from spear.stages.manifests import manifest_path
from spear.teachers.logmel import LogMelConfig
from tests.data.cuts import cut_of, save, tone, write_cuts

STUDENT = ZipformerConfig(
    downsampling_factor=(1, 2),
    num_encoder_layers=1,
    encoder_dim=(16, 24),
    encoder_unmasked_dim=(16, 16),
    feedforward_dim=(32, 32),
    num_heads=2,
    cnn_module_kernel=(7, 7),
    conv_channels=(4, 4, 8),
    query_head_dim=4,
    pos_head_dim=2,
    value_head_dim=4,
    pos_dim=8,
)
EVALUATION: dict[str, Any] = {
    "seeds": [0, 1],
    "learning_rates": [0.03],
    "weight_decays": [0.0],
    "steps": 30,
    "resamples": 20,
    "tasks": {
        "tones": FramesConfig(domain="speech"),
        "words": SegmentsConfig(domain="speech"),
        "speakers": VerificationConfig(domain="speech", num_trials=20),
        "events": UtterancesConfig(domain="audio"),
    },
}
RATE = 16000


def make_cut(folder: Path, name: str, domain: str, number: int, split: str) -> Any:
    """0.6 s: two tones in an order and at a level that the number decides."""
    rng = np.random.default_rng(number)
    first = number % 2
    tones = [np.sin(2 * np.pi * (400, 2500)[i] * np.arange(4800) / RATE) for i in (first, 1 - first)]
    audio = 0.2 * (1 + number % 3) * np.concatenate(tones) + 0.01 * rng.normal(size=9600)
    soundfile.write(make_folder(folder) / f"{name}.flac", audio, RATE)
    cut = Recording.from_file(folder / f"{name}.flac", recording_id=name).to_cut()
    cut.id, cut.custom = name, {"domain": domain, "corpus": domain}
    alignment = None
    if domain == "speech":
        tier = [AlignmentItem(("low", "high")[i], start, 0.3) for i, start in ((first, 0.0), (1 - first, 0.3))]
        alignment = {"phone": tier, "word": tier}
    speaker = f"{split}{number % 3}" if domain == "speech" else None
    cut.supervisions = [SupervisionSegment(name, name, 0.0, 0.6, speaker=speaker, custom={"label": f"level{number % 3}"}, alignment=alignment)]
    return cut


def finish(folder: Path, kind: str) -> None:
    with Artifact(folder, kind=kind, config={}, inputs={}).making():
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of two corpora and the quantizer of one teacher."""
    data = tmp_path_factory.mktemp("data")
    for domain in ("speech", "audio"):
        for split, count in (("train", 9), ("valid", 6), ("test", 6)):
            cuts = [make_cut(data / "audio", f"{domain}-{split}-{i}", domain, i, split) for i in range(count)]
            CutSet.from_cuts(cuts).to_file(make_folder(data / "manifests") / f"{domain}_cuts_{split}.jsonl.gz")
    KMeans(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) - 8).save(make_folder(data / "quantizers" / "mel"))
    write_json(data / "quantizers" / "mel" / "card.json", {"perplexity": [6.5], "active_entries": [8], "codebook_size": 8, "bits_per_frame": 3})
    finish(data / "quantizers" / "mel", "quantizers")
    return data


def make_run(data: Path, exp: Path, **changes: Any) -> Run:
    """A run whose export is the student with fresh weights."""
    recipe = Recipe(
        student=STUDENT,
        objective=MaskedPredictionConfig(weights={"speech": {"mel": 1.0}, "audio": {"mel": 1.0}}),
        teachers={"mel": LogMelConfig(num_mel_bins=64, stack=2)},
        quantizers={"mel": KMeansConfig()},
        evaluation=EvaluationConfig(**{**EVALUATION, **changes}),
    )
    source = CutsSource(train="unused")
    corpora = [CorpusConfig(name=name, domain=name, source=source) for name in ("speech", "audio")]
    if not (exp / "export").exists():
        torch.manual_seed(1)
        save_encoder(exp / "export", STUDENT.build(), STUDENT)
        finish(exp / "export", "export")
    return Run(recipe, corpora, data, exp)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = make_run(data, tmp_path_factory.mktemp("exp"))
    run(found)
    return found


def test_evaluate_scores_every_model_on_every_task(finished: Run) -> None:
    scores = ordered(read_json(finished.exp / "evaluate" / "scores.json"))
    assert list(scores) == ["tones", "words", "speakers", "events"]
    for models in scores.values():
        assert list(models) == ["logmel", "logmel_3", "teacher_mel", "tokens_mel", "untrained", "student"]
    assert scores["tones"]["logmel"]["value"] > 0.95
    assert scores["events"]["teacher_mel"]["domain"] == "audio"
    assert set(scores["tones"]["student"]["by_layer"]) == {"layer 1", "layer 2", "output", "weighted sum"}
    assert scores["speakers"]["student"]["metric"] == "EER"


def test_evaluate_writes_a_report_with_examples_and_its_own_cost(finished: Run) -> None:
    page = (finished.exp / "evaluate" / "report.html").read_text()
    assert "speech-valid-" in page
    assert "audio-valid-" in page
    assert "Codebooks of mel" in page
    assert '<th scope="row">evaluate</th>' in page


def test_evaluate_does_nothing_the_second_time(finished: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = (finished.exp / "evaluate" / "artifact.json").read_bytes()
    run(finished)
    assert "nothing to do" in caplog.text
    assert (finished.exp / "evaluate" / "artifact.json").read_bytes() == before


def test_evaluate_resumes_to_the_same_bytes(finished: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = make_run(data, tmp_path / "exp")
    calls: list[str] = []
    from spear.evaluation import scoring

    def stop(path: Path, value: Any) -> None:
        calls.append(path.name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(scoring, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        run(again)
    assert not (again.exp / "evaluate" / "artifact.json").exists()
    monkeypatch.undo()
    run(again)
    for name in ("scores.json", "examples.json", "examples.safetensors", "cards.json"):
        assert (again.exp / "evaluate" / name).read_bytes() == (finished.exp / "evaluate" / name).read_bytes()


def test_evaluate_scores_other_models_beside_the_student(finished: Run, data: Path, tmp_path: Path) -> None:
    beside = {"plain": LogMelConfig(num_mel_bins=64, stack=2)}
    task = {"tones": FramesConfig(domain="speech")}
    found = make_run(data, tmp_path / "exp", tasks=task, beside=beside, baselines=False, untrained=False, analysis_cuts=0)
    run(found)
    scores = read_json(found.exp / "evaluate" / "scores.json")["tones"]
    assert set(scores) == {"beside_plain", "student"}
    assert scores["beside_plain"]["label"] == "plain"
    assert scores["beside_plain"]["kind"] == "other"
    teacher = read_json(finished.exp / "evaluate" / "scores.json")["tones"]["teacher_mel"]
    assert scores["beside_plain"]["value"] == teacher["value"]
    assert read_json(found.exp / "evaluate" / "artifact.json")["inputs"]["beside/plain"] == beside["plain"].build().fingerprint()


SUITE_CORPORA = {
    "superb": {"voxceleb1_verification": "speech", "speech_commands": "audio"},
    "hear": {"esc50": "audio"},
}


@pytest.mark.parametrize(
    ("suite", "tasks"),
    [
        ("superb", {"keyword_spotting", "speaker_verification"}),
        ("hear", {"esc50"}),
    ],
)
def test_evaluate_of_a_suite_lies_beside_the_run_s_own(finished: Run, suite: str, tasks: set[str]) -> None:
    """Corpora with the names of the suite, made of what there is."""
    names = SUITE_CORPORA[suite]
    for (name, domain), split in itertools.product(names.items(), ("train", "valid", "test")):
        shutil.copy(manifest_path(finished.data, domain, split), manifest_path(finished.data, name, split))
    corpora = [CorpusConfig(name=name, domain=domain, source=CutsSource(train="unused")) for name, domain in names.items()]
    own = (finished.exp / "evaluate" / "scores.json").read_bytes()
    evaluation = replace(finished.recipe.evaluation, baselines=False, untrained=False, analysis_cuts=0)
    run(replace(finished, corpora=corpora, recipe=replace(finished.recipe, evaluation=evaluation)), suite=suite)
    folder = finished.exp / f"evaluate_{suite}"
    scores = read_json(folder / "scores.json")
    assert set(scores) == tasks
    assert all(set(models) == {"student"} for models in scores.values())
    assert all(task in (folder / "report.html").read_text() for task in tasks)
    assert (finished.exp / "evaluate" / "scores.json").read_bytes() == own


def test_evaluate_raises_artifact_error_when_settings_changed(finished: Run, data: Path) -> None:
    with pytest.raises(ArtifactError, match="`config.evaluation.steps` was 30, is 31"):
        run(make_run(data, finished.exp, steps=31))


def test_evaluate_raises_artifact_error_when_the_export_is_missing(finished: Run, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="export does not exist"):
        run(Run(finished.recipe, finished.corpora, data, tmp_path))


def test_evaluate_raises_artifact_error_when_a_split_is_missing(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="speech_cuts_train.jsonl.gz does not exist: run `spear manifests` first"):
        run(Run(finished.recipe, finished.corpora, tmp_path, finished.exp))


@pytest.mark.parametrize(
    ("task", "error", "match"),
    [
        (UtterancesConfig(domain="music"), ConfigError, "`evaluation.tasks.x.domain` is 'music', but no corpus of the task has that domain"),
        (UtterancesConfig(corpora=["esc"]), ConfigError, "`evaluation.tasks.x.corpora` names 'esc', but the run has audio, speech"),
        (FramesConfig(domain="audio"), DataError, "task `x` finds no labelled cut in the train split"),
    ],
)
def test_evaluate_raises_an_error_when_a_task_has_no_data(data: Path, tmp_path: Path, task: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(make_run(data, tmp_path / "exp", tasks={"x": task}))


def test_example_cuts_show_a_domain_that_only_a_task_reads(tmp_path: Path) -> None:
    """A task without a domain reads all of them, also those that no teacher labels."""
    write_cuts(manifest_path(tmp_path, "bells", "valid"), [cut_of(save(tmp_path / "bell.wav", tone(1.0)))])
    run_ = SimpleNamespace(
        recipe=SimpleNamespace(evaluation=EvaluationConfig(tasks={"x": UtterancesConfig()})),
        corpora=[SimpleNamespace(name="bells", domain="music")],
        labels=lambda domain: [],
        data=tmp_path,
    )
    assert {domain: cut.id for domain, cut in example_cuts(cast(Any, run_)).items()} == {"music": "bell"}


def test_teachers_without_a_quantizer_have_no_tokens_to_judge(data: Path, tmp_path: Path) -> None:
    found = make_run(data, tmp_path, reconstruction=True)
    objective = LayerDistillationConfig(layers=[1], weights={"speech": {"mel": 1.0}, "audio": {"mel": 1.0}})
    plain = replace(found.recipe, quantizers={}, objective=objective)
    names = [model.name for model in Evaluator(replace(found, recipe=plain)).models()]
    assert [name for name in names if "mel" in name] == ["logmel", "logmel_3", "teacher_mel"]
    assert {"tokens_mel", "codes_mel"} <= {model.name for model in Evaluator(found).models()}


def test_build_untrained_depends_on_the_seed_only() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_untrained(STUDENT, 3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = build_untrained(STUDENT, 3).state_dict(), build_untrained(STUDENT, 4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
