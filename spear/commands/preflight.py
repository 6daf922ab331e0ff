"""``spear preflight``: what would go wrong, and what it will take, before hours are spent."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhotse.cut import Cut

from spear.data.corpora import SPLITS, CorpusConfig
from spear.data.prepare import prepare
from spear.errors import DataError, SpearError
from spear.models.student import Student
from spear.objectives import PretrainModule
from spear.recipe import Run
from spear.stages.evaluate import corpora_of
from spear.stages.pretrain import initial_encoder
from spear.teachers.base import Teacher, default_device, extract
from spear.types import Batch, TokenSpec

SAMPLE_CUTS = 20
FLAC_BYTES_PER_S = 20_000
Say = Callable[[str], None]


@dataclass
class Findings:
    """What preflight found: problems stop a run, notes do not."""

    say: Say
    problems: int = 0
    speeds: dict[str, float] = field(default_factory=dict)
    """Step -> seconds of audio per second on this machine."""

    @contextmanager
    def check(self, title: str) -> Iterator[None]:
        """Say whether a block ran; a SpearError in it is a problem."""
        try:
            yield
        except SpearError as error:
            self.problems += 1
            self.say(f"PROBLEM {title}: {error}")
        else:
            self.say(f"ok      {title}")


def preflight(run: Run, say: Say) -> int:
    """Check a run and estimate its time and disk; returns 1 if anything would stop it, else 0.

    Args:
        run: as for the stages; nothing is written. say: gets one line per finding.
    """
    found = Findings(say)
    labels = LabelCheck(run)
    hours = {corpus.name: _corpus_hours(run, corpus, labels, found) for corpus in run.corpora}
    for name in run.recipe.evaluation.tasks:
        with found.check(f"task {name}: its corpora have labels in every split"):
            labels.require(name)
    with found.check("export: the checkpoints it names will be there"):
        run.recipe.export.check(run.recipe.training.max_steps, run.recipe.training.save_every)
    teachers: dict[str, Teacher] = {}
    for name, config in run.recipe.teachers.items():
        with found.check(f"teacher {name}: loads, and rate, width and layers are as declared"):
            teachers[name] = config.build(run.data).to(default_device())
            found.speeds[f"teacher {name}"] = _teacher_speed(teachers[name])
    specs: dict[str, TokenSpec] = {}
    for name, teacher in teachers.items():
        with found.check(f"quantizer {name}: takes frames of the teacher's width"):
            specs[name] = _spec(run, name, teacher)
    if run.recipe.init_from is not None:
        with found.check(f"init_from {run.recipe.init_from}: holds the weights of this student"):
            initial_encoder(run)
    with found.check("student: one batch of the largest size, forward and backward"):
        found.speeds["pretrain"] = _student_speed(run, specs)
    _estimate(run, hours, specs, found)
    say("nothing was found that would stop this run" if not found.problems else f"{found.problems} problems")
    return 1 if found.problems else 0


class LabelCheck:
    """Which splits of which corpora have cuts with the labels that the tasks of the evaluation read."""

    def __init__(self, run: Run) -> None:
        self.run, self.tasks = run, run.recipe.evaluation.build(run.recipe.seed)
        self.splits: dict[str, list[str]] = {}
        """Of every corpus that was read to its end; what another one lacks is not known."""
        self.labelled: set[tuple[str, str, str]] = set()

    def see(self, corpus: CorpusConfig, split: str, cut: Cut) -> None:
        """Take note of a cut as it comes from its source."""
        for name, task in self.tasks.items():
            key = (name, corpus.name, split)
            if key not in self.labelled and task.wants(cut):
                self.labelled.add(key)

    def require(self, name: str) -> None:
        """Check a task once all cuts were seen.

        Raises:
            ConfigError: it names a corpus or domain that the run lacks.
            DataError: a corpus of the task lacks a split, or no cut of a split has the task's labels.
        """
        corpora = corpora_of(name, self.run.recipe.evaluation.tasks[name], self.run.corpora)
        if any(corpus.name not in self.splits for corpus in corpora):
            return
        for corpus, split in itertools.product(corpora, SPLITS):
            if split not in self.splits[corpus.name]:
                raise DataError(f"task `{name}` reads the {split} split, which the corpus {corpus.name} lacks", cause="manifest")
        for split in SPLITS:
            if not any((name, corpus.name, split) in self.labelled for corpus in corpora):
                where = ", ".join(corpus.name for corpus in corpora)
                raise DataError(f"task `{name}` finds no labelled cut in the {split} split of {where} ({self.tasks[name].needs()})")


def _corpus_hours(run: Run, corpus: CorpusConfig, labels: LabelCheck, found: Findings) -> float:
    """Hours of a corpus; decodes a sample of its cuts, and looks at the labels of all."""
    name = corpus.name
    seconds, sampled = 0.0, 0
    ids: dict[str, str] = {}
    with found.check(f"corpus {name}: ids are unique over its splits, and a sample of {SAMPLE_CUTS} files decodes"):
        for split in corpus.source.splits():
            for item in corpus.source.files(split):
                if item.id in ids:
                    raise DataError(f"the cut {item.id} is in {ids[item.id]} and in {split}", cause="duplicate_id")
                ids[item.id] = split
                if item.cut is not None:
                    seconds += item.cut.duration
                    labels.see(corpus, split, item.cut)
                if sampled < SAMPLE_CUTS:
                    failures = prepare(item, corpus, run.recipe.manifests).failures
                    if failures:
                        raise DataError(failures[0]["message"], cause=failures[0]["cause"])
                    sampled += 1
        if not ids:
            raise DataError(f"corpus {name} has no cuts", cause="empty")
        labels.splits[name] = corpus.source.splits()
    return seconds / 3600


def _spec(run: Run, name: str, teacher: Teacher) -> TokenSpec:
    num_codebooks, codebook_size = run.recipe.quantizers[name].sizes(teacher.dim)
    return TokenSpec(
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        frame_rate_hz=teacher.frame_rate_hz,
        first_frame_s=teacher.first_frame_s,
    )


def _teacher_speed(teacher: Teacher) -> float:
    """Seconds of audio per second on a few utterances of ten seconds."""
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(10 * teacher.sample_rate, generator=generator)]
    extract(teacher, audio)
    start = time.monotonic()
    extract(teacher, audio)
    return 10 / max(time.monotonic() - start, 1e-6)


def _student_speed(run: Run, specs: dict[str, TokenSpec]) -> float:
    """Seconds of audio per second of a batch of ``sampling.max_batch_s`` with random tokens."""
    recipe, device = run.recipe, default_device()
    torch.manual_seed(recipe.seed)
    encoder = recipe.student.build()
    module = PretrainModule(Student(encoder, recipe.masking), recipe.objective.build(encoder, specs)).to(device)
    module.train()
    length_s = min(recipe.manifests.max_duration_s, recipe.sampling.max_batch_s)
    items = max(1, int(recipe.sampling.max_batch_s / length_s))
    frames = int(length_s * 100)
    domains = [corpus.domain for corpus in run.corpora if not run.is_noise(corpus.domain)]
    if not domains:
        raise DataError("there is nothing to train on: all corpora only give noise", cause="empty")
    batch = Batch(
        ids=[str(i) for i in range(items)],
        domains=[domains[i % len(domains)] for i in range(items)],
        features=torch.randn(items, frames, encoder.num_mel_bins),
        feature_lens=torch.full((items,), frames),
        seconds=items * length_s,
        tokens={
            name: torch.randint(spec.codebook_size, (items, int(length_s * spec.frame_rate_hz), spec.num_codebooks)) for name, spec in specs.items()
        },
        token_lens={name: torch.full((items,), int(length_s * spec.frame_rate_hz)) for name, spec in specs.items()},
    ).to(device)
    start = time.monotonic()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        output = module(batch, torch.Generator().manual_seed(0))
    (output.loss / output.count.clamp(min=1)).backward()  # type: ignore[no-untyped-call]
    if not torch.isfinite(output.loss):
        raise SpearError(f"the loss of a first batch is {output.loss.item()}")
    return batch.seconds / max(time.monotonic() - start, 1e-6)


def _estimate(run: Run, hours: dict[str, float], specs: dict[str, TokenSpec], found: Findings) -> None:
    """Say predicted hours and bytes per stage; too little disk is a problem."""
    total_bytes = 0.0
    for name, spec in specs.items():
        labelled = sum(hours[corpus.name] for corpus in run.corpora if name in run.teachers_of(corpus.domain))
        size = labelled * 3600 * spec.frame_rate_hz * spec.num_codebooks * (1 if spec.codebook_size <= 256 else 2)
        total_bytes += 2 * size  # token store and shards
        took = labelled / found.speeds[f"teacher {name}"]
        found.say(f"note    tokens of {name}: {labelled:.1f} h of audio, about {took:.2f} h here, {size / 1e9:.2f} GB")
    audio_bytes = sum(hours.values()) * 3600 * FLAC_BYTES_PER_S
    total_bytes += audio_bytes
    found.say(f"note    shards: {sum(hours.values()):.1f} h of audio, about {audio_bytes / 1e9:.2f} GB of FLAC")
    if "pretrain" in found.speeds:
        recipe = run.recipe
        audio_h = recipe.training.max_steps * recipe.training.accumulation * recipe.sampling.max_batch_s / 3600
        took = audio_h / found.speeds["pretrain"]
        found.say(f"note    pretrain: {recipe.training.max_steps} updates, {audio_h:.1f} h of audio, about {took:.2f} h here on one process")
    existing = next(path for path in (run.data, *run.data.resolve().parents, Path()) if path.exists())
    free = shutil.disk_usage(existing).free
    found.say(f"note    {total_bytes / 1e9:.2f} GB needed for tokens and shards, {free / 1e9:.0f} GB free in {existing}")
    if total_bytes > free:
        found.problems += 1
        found.say(f"PROBLEM the disk of {existing} has {free / 1e9:.1f} GB free, but tokens and shards need {total_bytes / 1e9:.1f} GB")
