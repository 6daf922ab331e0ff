"""``spear finetune``: an encoder and a head on labelled cuts, scored on the test split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut

from spear.config import load_config, to_json
from spear.data.corpora import CorporaConfig, CorpusConfig
from spear.errors import DataError
from spear.export.config import ExportConfig
from spear.export.source import Source, fingerprint_source
from spear.files import read_tensors, seed_from, sha256_file, write_json
from spear.finetune.batch import Example, LabelledSet, LabelledSource, Mixup, Reads
from spear.finetune.config import FinetuneRecipe
from spear.finetune.lora import merge_adapters
from spear.finetune.model import FinetuneModule, make_module, save_finetuned, starting_encoder, starting_source
from spear.finetune.results import write_results
from spear.finetune.tasks.base import FinetuneTaskConfig, Inventory, Prediction
from spear.models.base import StudentConfig
from spear.models.zipformer.compiled import compile_layers
from spear.stages import manifests
from spear.stages.artifact import Artifact, Record
from spear.stages.export import choose
from spear.stages.manifests import manifest_path
from spear.training import Trainer, TrainingResult, World, process_group
from spear.training.checkpoint import MODEL, averaged_weights

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)
FREE = {"sampling": ("num_workers", "prefetch"), "training": ("device", "keep_checkpoints", "compile", "find_unused_parameters")}
"""Settings that change how a run goes, but not what comes out."""
LABELS = "labels.json"


@dataclass(frozen=True)
class FinetuneRun:
    """A recipe on a set of corpora, with the folders of its data and its results."""

    recipe: FinetuneRecipe
    corpora: list[CorpusConfig]
    data: Path
    exp: Path

    def teachers_of(self, domain: str) -> list[str]:
        """None: every domain will do."""
        del domain
        return []

    def cuts(self, split: str) -> list[tuple[int, Cut]]:
        """Number of the corpus and cut, of all corpora that have the split."""
        paths = [(i, manifest_path(self.data, corpus.name, split)) for i, corpus in enumerate(self.corpora)]
        return [(i, cut) for i, path in paths if path.exists() for cut in CutSet.from_jsonl_lazy(path)]


@dataclass(frozen=True)
class Labelled:
    """The labelled cuts of a run. test: with their labels as they stand. inventory: of the training labels. split: which one `test` is."""

    train: list[Example]
    train_labels: list[str]
    valid: list[Example]
    test: list[Example]
    labels: dict[str, str]
    inventory: Inventory
    split: str


def finetune(recipe: Path, corpora: Path, data: Path, exp: Path, overrides: Sequence[str] = ()) -> None:
    """Make ``DATA/manifests``, then train and score into ``EXP``; started by ``torchrun``, every process calls this.

    Raises:
        ConfigError: recipe or corpora file is wrong. DataError: labels are missing. CheckpointError: the encoder is not there.
        ArtifactError: EXP or the manifests were made from other inputs. StopRequested: a signal came and everything is saved.
    """
    found = load_config(CorporaConfig, corpora).resolved(corpora.resolve().parent)
    loaded = load_config(FinetuneRecipe, recipe, overrides)
    run = FinetuneRun(replace(loaded, sampling=found.sampling(loaded.sampling)), list(found.corpora), data, exp)
    with process_group(run.recipe.training.device) as world:
        with world.main_first():
            if world.is_main:
                manifests.run(cast("Run", run))
        source = starting_source(run.recipe.encoder, data)
        inputs = {path.name: sha256_file(path) for path in _manifests(run)}
        if source is not None:
            inputs["init_from"] = fingerprint_source(source)
        artifact = Artifact(exp, kind="finetune", config=_config(run), inputs=inputs)
        if artifact.is_done():
            return
        with artifact.making(world.size) if world.is_main else nullcontext(Record()) as record:
            labelled = read_labelled(run)
            module, _ = _make(run, source, labelled.inventory)
            if run.recipe.training.compile:
                compile_layers(module.student.encoder)
            result = _train(run, module, labelled, artifact.fingerprint, world)
            if world.is_main:
                device = next(module.parameters()).device
                module, student = _make(run, source, labelled.inventory)  # what was trained may hold a part of the weights only
                module.to(device)
                weights = _final_weights(run, module)
                facts = _facts(run, labelled, result, weights)
                info = {"name": run.recipe.name or exp.resolve().name, "checkpoint": {"step": result.steps, "weights": weights}}
                save_finetuned(exp / "export", module, student, run.recipe.task, labelled.inventory, info)
                scores = write_results(exp, module.objective, _predictions(run, module, labelled), facts)
                record.counts.update(train_cuts=len(labelled.train), valid_cuts=len(labelled.valid), test_cuts=len(labelled.test))
                record.audio_s, record.extra = result.hours * 3600, {"metric": scores["metric"], "value": scores["value"]}
                logger.info("finetune: %s %.4f on %s -> %s", scores["metric"], scores["value"], labelled.split, exp)


def read_labelled(run: FinetuneRun) -> Labelled:
    """The cuts that carry the task's label, as examples.

    Raises:
        DataError: a split has none, or two test cuts share an id.
    """
    recipe, task = run.recipe, run.recipe.task
    train = _with_labels(run, "train")
    if recipe.max_train_cuts is not None and len(train) > recipe.max_train_cuts:
        train = sorted(train, key=lambda item: seed_from(recipe.seed, "train cuts", item[1].id))[: recipe.max_train_cuts]
        train.sort(key=lambda item: item[1].id)
    inventory = task.inventory(label for _, _, label in train)
    split = "test" if any(manifest_path(run.data, corpus.name, "test").exists() for corpus in run.corpora) else "valid"
    tested = [item for item in _with_labels(run, split) if task.scorable(item[2], inventory)]
    if not tested:
        raise DataError(f"no {split} cut has a label that training has, too ({task.needs()})", cause="labels")
    _check_ids(run, split, tested)
    valid = _examples(task, "valid", _with_labels(run, "valid", needed=False), inventory)
    examples = _examples(task, "train", train, inventory)
    known = {(example.corpus, example.cut.id) for example in examples}
    return Labelled(
        examples,
        [label for corpus, cut, label in train if (corpus, cut.id) in known],
        valid,
        [Example(cut, np.asarray(0), corpus) for corpus, cut, _ in tested],
        {cut.id: label for _, cut, label in tested},
        inventory,
        split,
    )


def _with_labels(run: FinetuneRun, split: str, *, needed: bool = True) -> list[tuple[int, Cut, str]]:
    cuts = run.cuts(split)
    found = [(corpus, cut, label) for corpus, cut in cuts if (label := run.recipe.task.label(cut))]
    if needed and not found:
        raise DataError(f"no {split} cut is labelled ({run.recipe.task.needs()}), of {len(cuts)}", cause="labels")
    if len(found) < len(cuts):
        logger.warning(
            "finetune: %d of %d %s cuts have no label and are left out (%s)", len(cuts) - len(found), len(cuts), split, run.recipe.task.needs()
        )
    return found


def _check_ids(run: FinetuneRun, split: str, items: Sequence[tuple[int, Cut, str]]) -> None:
    """Results are told apart by the ids of the cuts."""
    first: dict[str, int] = {}
    for corpus, cut, _ in items:
        if cut.id in first:
            names = " and ".join(run.corpora[number].name for number in (first[cut.id], corpus))
            raise DataError(f"the id {cut.id!r} must be unique among the {split} cuts, but {names} have it", cause="duplicate_id")
        first[cut.id] = corpus


def _examples(task: FinetuneTaskConfig, split: str, items: Sequence[tuple[int, Cut, str]], inventory: Inventory) -> list[Example]:
    encoded = [(corpus, cut, task.encode(label, inventory)) for corpus, cut, label in items]
    found = [Example(cut, target, corpus) for corpus, cut, target in encoded if target is not None]
    if len(found) < len(items):
        left_out = next(cut.id for _, cut, target in encoded if target is None)
        logger.warning(
            "finetune: %d of %d %s cuts have a label that training lacks and are left out, e.g. %s",
            len(items) - len(found),
            len(items),
            split,
            left_out,
        )
    return found


def _make(run: FinetuneRun, source: Source | None, inventory: Inventory) -> tuple[FinetuneModule, StudentConfig]:
    """The module before its first update, and the network of its encoder."""
    recipe = run.recipe
    encoder, student = starting_encoder(recipe.encoder, source, recipe.seed)
    return make_module(recipe.encoder, encoder, recipe.masking, recipe.task, inventory, recipe.seed), student


def _train(run: FinetuneRun, module: FinetuneModule, labelled: Labelled, fingerprint: str, world: World) -> TrainingResult:
    recipe, reads = run.recipe, _reads(module)
    write_json(run.exp / LABELS, labelled.inventory)
    train = LabelledSource(
        labelled.train,
        [corpus.weight for corpus in run.corpora],
        recipe.sampling,
        seed_from(recipe.seed, "batches"),
        reads=reads,
        draws=recipe.task.draw_weights(labelled.train_labels),
        mixup=Mixup(recipe.mixup.prob, recipe.mixup.alpha),
    )
    valid = LabelledSet(labelled.valid, recipe.sampling, reads=reads) if labelled.valid else None
    milestones = _weights(recipe).milestones(recipe.training.max_steps)
    seed, settings = seed_from(recipe.seed, "training"), _config(run)
    trainer = Trainer(
        recipe.training, module, train, valid, run.exp, seed, fingerprint, world=world, description=settings, title="finetune", milestones=milestones
    )
    return trainer.run()


def _reads(module: FinetuneModule) -> Reads:
    return Reads(module.student.encoder.reads, module.student.encoder.num_mel_bins)


def _weights(recipe: FinetuneRecipe) -> ExportConfig:
    return ExportConfig(average_share=recipe.average_share) if recipe.average_share > 0 else ExportConfig(use="last")


def _final_weights(run: FinetuneRun, module: FinetuneModule) -> str:
    """Give the module the weights that are kept, adapters merged into them; says which they are."""
    choice = choose(run.exp, _weights(run.recipe))
    module.load_state_dict(averaged_weights(choice.end, choice.start) if choice.averaged else read_tensors(choice.end / MODEL))
    merge_adapters(module.student.encoder)
    module.eval()
    return choice.text()


def _predictions(run: FinetuneRun, module: FinetuneModule, labelled: Labelled) -> dict[str, tuple[list[Prediction], dict[str, str]]]:
    """Corpus -> predictions on its test cuts and their labels."""
    device = next(module.parameters()).device
    batches = LabelledSet(labelled.test, run.recipe.sampling, reads=_reads(module))
    found = [item for batch in batches.iterate(0, 1) for item in module.predict(batch.to(device))]
    corpus_of = {example.cut.id: run.corpora[example.corpus].name for example in labelled.test}
    by_corpus: dict[str, tuple[list[Prediction], dict[str, str]]] = {}
    for item in found:
        predictions, labels = by_corpus.setdefault(corpus_of[item.id], ([], {}))
        predictions.append(item)
        labels[item.id] = labelled.labels[item.id]
    return by_corpus


def _facts(run: FinetuneRun, labelled: Labelled, result: TrainingResult, weights: str) -> dict[str, Any]:
    start = run.recipe.encoder
    return {
        "split": labelled.split,
        "task": to_json(run.recipe.task, FinetuneTaskConfig)["type"],
        "encoder": "random" if start.random or start.init_from is None else "pre-trained",
        "train_cuts": len(labelled.train),
        "train_s": sum(example.cut.duration for example in labelled.train),
        "updates": result.steps,
        "hours_heard": result.hours,
        "weights": weights,
    }


def _config(run: FinetuneRun) -> dict[str, Any]:
    """The settings that the result depends on; the encoder's weights are an input by their fingerprint, wherever they lie."""
    settings = {key: value for key, value in to_json(run.recipe).items() if key not in ("manifests", "name")}
    for key, names in FREE.items():
        settings[key] = {name: value for name, value in settings[key].items() if name not in names}
    settings["encoder"] = {key: value for key, value in settings["encoder"].items() if key != "init_from"}
    return {**settings, "corpora": {corpus.name: corpus.weight for corpus in run.corpora}}


def _manifests(run: FinetuneRun) -> list[Path]:
    paths = [manifest_path(run.data, corpus.name, split) for corpus in run.corpora for split in ("train", "valid", "test")]
    return [path for path in paths if path.exists()]
