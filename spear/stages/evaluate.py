"""Stage 7, evaluate: encoder and labelled cuts -> scores and report."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lhotse import CutSet
from torch import Tensor

from spear.config import to_json
from spear.data.audio import load_audio
from spear.data.corpora import CorpusConfig
from spear.errors import ConfigError
from spear.evaluation.analysis import ChangedClips, choose_cuts, compare_layers, retrieval
from spear.evaluation.collect import AudioCache, Plan
from spear.evaluation.config import with_suite
from spear.evaluation.embedders import Embedder, Encoded, LogMel, OtherModel, TeacherCodes, TeacherFrames
from spear.evaluation.examples import Labeller, choose_example, make_example, write_examples
from spear.evaluation.facts import ANALYSIS, FOLDER, SIZES, keep_data_facts
from spear.evaluation.report import write_report
from spear.evaluation.scoring import PARTIAL, SIZE, Model, score_models
from spear.evaluation.selection import keep_cuts
from spear.evaluation.tasks.base import SPLITS, Split, Task, TaskConfig
from spear.evaluation.tasks.frames import FramesConfig
from spear.export import AudioEncoder, load_encoder
from spear.files import read_json, seed_from, sha256, sha256_file, write_json
from spear.models.base import StudentConfig
from spear.models.masking import draw_masks
from spear.quantizers import load_quantizer
from spear.quantizers.base import Quantizer
from spear.recipe import Run
from spear.stages.artifact import DONE, Artifact, fingerprint_of
from spear.stages.manifests import find_manifest, manifest_path
from spear.teachers.base import Teacher, TeacherConfig, extract
from spear.types import EncoderOutput

logger = logging.getLogger(__name__)


def run(run: Run, *, suite: str | None = None) -> None:
    """Score the exported student beside its teachers and the baselines; write ``EXP/evaluate``.

    Args:
        suite: its tasks instead of the recipe's, into ``EXP/evaluate_<suite>``.

    Raises:
        ArtifactError: the export, a manifest or a quantizer is missing. ConfigError: a task names no corpus of the run.
        DataError: a task finds no labels.
    """
    folder = run.exp / FOLDER
    if suite is not None:
        run = replace(run, recipe=replace(run.recipe, evaluation=with_suite(run.recipe.evaluation, suite, run.corpora)))
        folder = run.exp / f"{FOLDER}_{suite}"
    recipe = run.recipe
    corpora = {name: corpora_of(name, config, run.corpora) for name, config in recipe.evaluation.tasks.items()}
    artifact = Artifact(folder, kind="evaluate", config=identity(run), inputs=inputs_of(run, corpora))
    report = folder / "report.html"
    if artifact.is_done():
        if not report.exists() or report.stat().st_mtime_ns < (folder / DONE).stat().st_mtime_ns:  # killed before it knew its own cost
            write_report([run.exp], report, folder.name)
        return
    logger.info("evaluate: %d tasks", len(corpora))
    with artifact.making() as record:
        evaluator = Evaluator(run)
        load = AudioCache(load_audio)
        tasks = recipe.evaluation.build(recipe.seed, evaluator.device)
        plan = Plan.make(tasks, read_cuts(run, corpora, tasks), recipe.evaluation.batch_s)
        plan.memory_bytes = recipe.evaluation.memory_mb << 20
        models = evaluator.models()
        domains = {name: domain_of(found) for name, found in corpora.items()}
        scores = score_models(models, plan, domains, load, folder)
        write_json(folder / "scores.json", scores)
        write_json(folder / ANALYSIS, evaluator.analysis(corpora, load))
        write_json(folder / SIZES, model_sizes(models, folder))
        write_examples(folder, [evaluator.example(domain, cut, load) for domain, cut in example_cuts(run).items()])
        keep_data_facts(run.data, folder)
        cuts = [cut for split in SPLITS for batch in plan.batches[split] for cut in batch]
        record.counts.update(tasks=len(corpora), models=len(models), cuts=len(cuts))
        record.audio_s = sum(cut.duration for cut in cuts)
    # last, as the cost of this stage is known now
    write_report([run.exp], report, folder.name)


class Evaluator:
    """Makes the models of a run, each when it is needed and once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def models(self) -> list[Model]:
        """Baselines first, then teachers, other models and students: the order of the report."""
        config = self.run.recipe.evaluation
        found = self.baselines() if config.baselines else []
        found += [Model(f"beside_{name}", functools.partial(self.other, name)) for name in config.beside]
        if config.untrained:
            found.append(Model("untrained", self.untrained))
        found.append(Model("student", self.student))
        return found

    def baselines(self) -> list[Model]:
        """Log-mels and teachers."""
        config = self.run.recipe.evaluation
        found = [Model("logmel", LogMel)]
        if config.context_frames:
            found.append(Model(f"logmel_{config.context_frames}", functools.partial(LogMel, context=config.context_frames)))
        for name in self.run.recipe.teachers:
            found.append(Model(f"teacher_{name}", functools.partial(self.teacher_frames, name, rebuilt=False)))
            if name not in self.run.recipe.quantizers:
                continue
            if config.reconstruction:
                found.append(Model(f"tokens_{name}", functools.partial(self.teacher_frames, name, rebuilt=True)))
            found.append(Model(f"codes_{name}", functools.partial(self.teacher_codes, name), codes=True))
        return found

    def teacher_frames(self, name: str, *, rebuilt: bool) -> Embedder:
        """A teacher's frames, or those frames rebuilt from their tokens."""
        if name not in self.run.recipe.quantizers:
            beside = self.run.recipe.teachers[name].build(self.run.data).to(self.device)
            frames = TeacherFrames(name, beside, _Remembering(beside, self.device), quantizer=None)
            frames.num_parameters = parameters_of(beside)
            return frames
        teacher, take, quantizer = self.labeller(name)
        embedder = TeacherFrames(name, teacher, take, quantizer=quantizer if rebuilt else None)
        embedder.num_parameters = parameters_of(teacher)
        return embedder

    def other(self, name: str) -> Embedder:
        """A model of ``evaluation.beside``."""
        model = self.run.recipe.evaluation.beside[name].build(self.run.data).to(self.device)
        embedder = OtherModel(name, model, lambda audios: extract(model, audios, torch.device(self.device)))
        embedder.num_parameters = parameters_of(model)
        return embedder

    def teacher_codes(self, name: str) -> Embedder:
        """A teacher's tokens."""
        found = self.labeller(name)
        loaded = load_quantizer(self.run.data / "quantizers" / name)
        return TeacherCodes(name, found.teacher, found.extract, found.quantizer, loaded.num_codebooks, loaded.codebook_size)

    @functools.cache  # noqa: B019 - lives as long as the stage
    def labeller(self, name: str) -> Labeller:
        """Teacher and quantizer by the teacher's name."""
        teacher = self.run.recipe.teachers[name].build(self.run.data)
        teacher.to(self.device)
        quantizer = load_quantizer(self.run.data / "quantizers" / name)
        return Labeller(teacher, _Remembering(teacher, self.device), _OnCpu(quantizer))

    def student(self) -> Embedder:
        """The exported student."""
        return _encoded("student", load_encoder(self.run.exp / "export", self.device))

    def untrained(self) -> Embedder:
        """The student's network with seeded fresh weights."""
        return _encoded("untrained", build_untrained(self.run.recipe.student, self.run.recipe.seed).to(self.device))

    def analysis(self, corpora: dict[str, list[CorpusConfig]], load: AudioCache) -> dict[str, Any]:
        """Similarity of student and teachers, and retrieval of changed clips: domain -> see `spear.evaluation.analysis`."""
        config, seed = self.run.recipe.evaluation, self.run.recipe.seed
        if config.analysis_cuts == 0:
            return {}
        student = self.student()
        teachers = {name: self.teacher_frames(name, rebuilt=False) for name in self.run.recipe.teachers}
        found = {}
        for domain in sorted({corpus.domain for known in corpora.values() for corpus in known}):
            names = sorted({corpus.name for known in corpora.values() for corpus in known if corpus.domain == domain})
            paths = [find_manifest(self.run.data, name, "test") for name in names]
            cuts = choose_cuts((cut for path in paths for cut in CutSet.from_jsonl_lazy(path)), config.analysis_cuts, seed)
            about = compare_layers(student, teachers, cuts, load, config.batch_s)
            models = [LogMel(), *teachers.values(), student]
            clips = ChangedClips(cuts, load, seed)
            recall = {model.label: {"kind": model.kind, **retrieval(model, clips, config.batch_s)} for model in models}
            found[domain] = {**about, "retrieval": recall, "clips": len(cuts), "models": [model.label for model in models]}
        return found

    def example(self, domain: str, cut: Any, load: AudioCache) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One example for the report, with the teachers that label its domain."""
        recipe = self.run.recipe
        generator = torch.Generator().manual_seed(seed_from(recipe.seed, "example", cut.id))

        def draw_mask(frames: int) -> Tensor:
            return draw_masks(recipe.masking, torch.tensor([frames]), frames, 128, generator)[0][0]

        tier = next((config.tier for config in recipe.evaluation.tasks.values() if isinstance(config, FramesConfig)), "phone")
        labellers = {name: self.labeller(name) for name in self.run.labels(domain)}
        return make_example(cut, domain, load, labellers, draw_mask, tier)


class _OnCpu:
    """A quantizer that is handed and returns CPU tensors."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """See `QuantizerLike`."""
        return self._quantizer.encode(frames).cpu()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """See `QuantizerLike`."""
        return self._quantizer.decode(codes).cpu()


class _Remembering:
    """A teacher's frames, the first `limit_bytes` of which are kept: its tokens are made of the same frames."""

    def __init__(self, teacher: Teacher, device: str, limit_bytes: int = 512 * 2**20) -> None:
        self._teacher, self._device, self._left = teacher, torch.device(device), limit_bytes
        self._kept: dict[str, Tensor] = {}

    def __call__(self, audios: list[Tensor]) -> list[Tensor]:
        keys = [sha256(audio.numpy().tobytes()) for audio in audios]
        missing = {key: audio for key, audio in zip(keys, audios) if key not in self._kept}
        found = dict(zip(missing, extract(self._teacher, list(missing.values()), self._device))) if missing else {}
        for key, frames in found.items():
            size = frames.numel() * frames.element_size()
            if size <= self._left:
                self._left -= size
                self._kept[key] = frames
        return [self._kept[key] if key in self._kept else found[key] for key in keys]


def _encoded(kind: Literal["student", "untrained"], encoder: AudioEncoder) -> Encoded:
    device = next(encoder.parameters()).device

    def forward(audio: Tensor, lens: Tensor) -> EncoderOutput:
        output: EncoderOutput = encoder(audio.to(device), lens.to(device))
        return output

    embedder = Encoded(
        kind,
        forward,
        num_layers=encoder.num_layers,
        frame_rate_hz=encoder.frame_rate_hz,
        first_frame_s=encoder.first_frame_s,
        sample_rate=encoder.sample_rate,
    )
    embedder.num_parameters = parameters_of(encoder)
    return embedder


def parameters_of(model: object) -> int:
    """Number of trained values of a model."""
    return sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0


def build_untrained(config: StudentConfig, seed: int) -> AudioEncoder:
    """A fresh encoder in eval mode whose weights depend on `seed` only; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "untrained"))
        return AudioEncoder(config.build(), config).eval()


def model_sizes(models: list[Model], folder: Path) -> list[dict[str, Any]]:
    """Label, kind and number of parameters of every model that was scored, in the order of the report."""
    paths = [folder / PARTIAL / model.name / SIZE for model in models]
    return [{"name": model.name, **read_json(path)} for model, path in zip(models, paths) if path.exists()]


def corpora_of(name: str, config: TaskConfig, corpora: list[CorpusConfig]) -> list[CorpusConfig]:
    """The corpora a task reads.

    Raises:
        ConfigError: it names a corpus that the run lacks, or no corpus has its domain.
    """
    known = {corpus.name for corpus in corpora}
    for wanted in config.corpora:
        if wanted not in known:
            raise ConfigError(f"`evaluation.tasks.{name}.corpora` names {wanted!r}, but the run has {', '.join(sorted(known))}")
    found = [corpus for corpus in corpora if corpus.name in (config.corpora or known) and config.domain in (None, corpus.domain)]
    if not found:
        raise ConfigError(f"`evaluation.tasks.{name}.domain` is {config.domain!r}, but no corpus of the task has that domain")
    return found


def domain_of(corpora: list[CorpusConfig]) -> str:
    """The domain of corpora, several joined by "+"."""
    return "+".join(sorted({corpus.domain for corpus in corpora}))


def read_cuts(run: Run, corpora: Mapping[str, Sequence[CorpusConfig]], tasks: Mapping[str, Task]) -> dict[str, dict[Split, list[Any]]]:
    """Cuts of every task and split that the task may choose; every manifest is read once, and tasks on the same corpora share the objects.

    Args:
        corpora: task -> corpora it reads, in the order of the run's. tasks: name -> task.
    """
    names = {corpus.name for found in corpora.values() for corpus in found}
    users = {corpus.name: [task for task, found in corpora.items() if corpus in found] for corpus in run.corpora if corpus.name in names}
    return keep_cuts(tasks, users, lambda corpus, split: CutSet.from_jsonl_lazy(find_manifest(run.data, corpus, split)))


def example_cuts(run: Run) -> dict[str, Any]:
    """One valid cut of the first corpus of each domain that teachers label or that a task reads."""
    chosen: dict[str, Any] = {}
    tasks = run.recipe.evaluation.tasks.items()
    judged = {corpus.domain for name, config in tasks for corpus in corpora_of(name, config, run.corpora)}
    for corpus in run.corpora:
        if corpus.domain not in judged and not run.labels(corpus.domain):
            continue
        path = manifest_path(run.data, corpus.name, "valid")
        if corpus.domain not in chosen and path.exists():
            cuts = [cut for cut, _ in zip(CutSet.from_jsonl_lazy(path), range(1000))]
            if cuts:
                chosen[corpus.domain] = choose_example(cuts)
    return chosen


def identity(run: Run) -> dict[str, Any]:
    """The settings that scores depend on."""
    recipe = run.recipe
    return {
        "evaluation": to_json(recipe.evaluation),
        "seed": recipe.seed,
        "student": to_json(recipe.student, StudentConfig),
        "masking": to_json(recipe.masking),
        "teachers": {name: to_json(config, TeacherConfig) for name, config in recipe.teachers.items()},
        "domains": {corpus.name: corpus.domain for corpus in run.corpora},
    }


def inputs_of(run: Run, corpora: dict[str, list[CorpusConfig]]) -> dict[str, str]:
    """Fingerprints of the export, of every manifest a task reads, of models beside it, of quantizers, which vouch for their teachers, and of the
    other teachers.
    """
    inputs = {"export": fingerprint_of(run.exp / "export")}
    for corpus in {corpus.name: corpus for found in corpora.values() for corpus in found}.values():
        for split in SPLITS:
            inputs[f"manifests/{corpus.name}/{split}"] = sha256_file(find_manifest(run.data, corpus.name, split))
    for name, config in run.recipe.evaluation.beside.items():
        inputs[f"beside/{name}"] = config.build(run.data).fingerprint()
    for name in run.recipe.quantizers:
        inputs[f"quantizers/{name}"] = fingerprint_of(run.data / "quantizers" / name)
    for name in sorted(set(run.recipe.teachers) - set(run.recipe.quantizers)):
        inputs[f"teachers/{name}"] = run.recipe.teachers[name].build(run.data).fingerprint()
    return inputs
