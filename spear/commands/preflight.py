"""``spear preflight``: what would go wrong, and what it will take, before hours are spent."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from spear.commands.estimate import say_estimate
from spear.commands.measure import Measured, listen, measure_packing, measure_student
from spear.commands.preflight_labels import LabelCheck
from spear.data.corpora import CorpusConfig
from spear.data.fbank import SAMPLE_RATE
from spear.data.prepare import prepare
from spear.data.sampler import BatchPlan, Lengths
from spear.data.scan import Scan, repeated, scan
from spear.data.token_store import STORE
from spear.errors import ArtifactError, ConfigError, DataError, SpearError
from spear.files import read_json
from spear.quantizers import load_quantizer
from spear.quantizers.card import entry_counts
from spear.recipe import Run
from spear.stages.agreement import check_quantizer
from spear.stages.artifact import DONE, fingerprint_of, read_artifact
from spear.stages.pretrain import initial_encoder
from spear.stages.tokens import check_collapse, entropy_bits
from spear.teachers.base import Teacher, default_device
from spear.teachers.probe import first_frame_probe
from spear.types import FrameSpec, TokenSpec

SAMPLE_CUTS = 20
TOLERANCE_FRAMES = 0.75
"""Largest distance of the measured from the declared first frame, in frames."""
Say = Callable[[str], None]


@dataclass
class Findings:
    """What preflight found: problems stop a run, notes do not."""

    say: Say
    problems: int = 0
    measured: Measured = field(default_factory=Measured)
    scans: dict[str, list[Scan]] = field(default_factory=dict)
    """Corpus -> its splits, of corpora that were read to their end."""
    cuts: dict[str, list[Any]] = field(default_factory=dict)
    """Corpus -> prepared cuts of the sample."""

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

    def note(self, text: str) -> None:
        """Say what stops nothing."""
        self.say(f"note    {text}")


def preflight(run: Run, say: Say) -> int:
    """Check a run and estimate its time and disk; returns 1 if anything would stop it, else 0.

    Args:
        run: as for the stages; nothing is written. say: gets one line per finding.
    """
    found = Findings(say)
    labels = LabelCheck(run)
    for corpus in run.corpora:
        _check_corpus(run, corpus, labels, found)
    _note_domains(run, found)
    _note_shared_files(run, found)
    _note_shared_ids(found)
    for name in run.recipe.evaluation.tasks:
        with found.check(f"task {name}: its corpora have labels in every split"):
            labels.require(name)
    with found.check("export: the checkpoints it names will be there"):
        run.recipe.export.check(run.recipe.training.max_steps, run.recipe.training.save_every)
    with found.check("sampling: every batch can be drawn"):
        _check_sampling(run, found)
    specs, frames = _check_teachers(run, found)
    if run.recipe.init_from is not None:
        with found.check(f"init_from {run.recipe.init_from}: holds the weights of this student"):
            initial_encoder(run)
    with found.check("student: one batch of the largest size, forward and backward, of the longest and of the shortest cuts"):
        measure_student(run, {name: specs[name] for name in run.recipe.objective.teachers() if name in specs}, frames, found.measured)
    found.problems += say_estimate(run, found.scans, specs, found.measured, say)
    say("nothing was found that would stop this run" if not found.problems else f"{found.problems} problems")
    return 1 if found.problems else 0


def _check_corpus(run: Run, corpus: CorpusConfig, labels: LabelCheck, found: Findings) -> None:
    """Look at all cuts of a corpus and decode a sample of them."""
    name, scans = corpus.name, []
    with found.check(f"corpus {name}: ids are unique over its splits, and a sample of {SAMPLE_CUTS} files decodes"):
        for split in corpus.source.splits():
            look = labels.looker(corpus, split)
            scans.append(scan(split, corpus.source.entries(split), SAMPLE_CUTS, look))
        if not sum(part.cuts for part in scans):
            raise DataError(f"corpus {name} has no cuts", cause="empty")
        _require_unique(corpus, scans)
        _decode(run, corpus, scans, found)
        labels.splits[name] = [part.split for part in scans]
        found.scans[name] = scans
    if name not in found.scans:
        return
    seconds = np.concatenate([part.seconds for part in scans])
    low, high = corpus.limits_s(run.recipe.manifests)
    splits = ", ".join(f"{part.split} {part.cuts} cuts {part.hours:.1f} h" for part in scans)
    rates = Counter[int]()
    for part in scans:
        rates.update(part.rates)
    found.note(f"corpus {name}: {splits}; {', '.join(f'{rate} Hz' for rate, _ in rates.most_common(4)) or 'unknown rates'}")
    if len(seconds):
        quantiles = np.quantile(seconds, (0, 0.5, 1))
        short, long = int((seconds < low - 1e-6).sum()), int((seconds > high + 1e-6).sum())
        fate = "split" if run.recipe.manifests.long == "split" else "left out"
        text = f"{quantiles[0]:.2f} to {quantiles[2]:.2f} s, median {quantiles[1]:.2f} s"
        found.note(f"corpus {name}: cuts of {text}; {short} shorter than {low:g} s will be left out, {long} longer than {high:g} s {fate}")


def _require_unique(corpus: CorpusConfig, scans: list[Scan]) -> None:
    """Raise DataError where an id occurs twice; equal hashes are looked up once more."""
    doubtful = repeated(part.ids for part in scans)
    if not doubtful:
        return
    first: dict[str, str] = {}
    for part in scans:
        for entry in corpus.source.entries(part.split):
            if hash(entry.id) not in doubtful:
                continue
            if entry.id in first:
                raise DataError(f"the cut {entry.id} is in {first[entry.id]} and in {part.split}", cause="duplicate_id")
            first[entry.id] = part.split


def _decode(run: Run, corpus: CorpusConfig, scans: list[Scan], found: Findings) -> None:
    """Prepare the sample as `spear manifests` would, and note how fast."""
    audio_s, wall_s, left = 0.0, 0.0, SAMPLE_CUTS
    for part in scans:
        for entry in part.sample[: max(1, min(left, SAMPLE_CUTS // len(scans) + 1))]:
            start = time.monotonic()
            made = prepare(entry.load(), corpus, run.recipe.manifests)
            wall_s += time.monotonic() - start
            if made.failures:
                raise DataError(made.failures[0]["message"], cause=made.failures[0]["cause"])
            audio_s += sum(cut.duration for cut in made.cuts)
            found.cuts.setdefault(corpus.name, []).extend(made.cuts)
            left -= 1
    if audio_s:
        speed = audio_s / max(wall_s, 1e-6)
        found.measured.read = min(found.measured.read or speed, speed)
        measure_packing(found.cuts[corpus.name][:5], found.measured)


def _note_domains(run: Run, found: Findings) -> None:
    """Say how much of each domain there is, and which ones the recipe knows but no corpus has."""
    hours: dict[str, float] = {}
    for corpus in run.corpora:
        own = sum(part.hours for part in found.scans.get(corpus.name, ()) if part.split == "train")
        hours[corpus.domain] = hours.get(corpus.domain, 0.0) + own
    for domain, amount in sorted(hours.items()):
        use = "noise only"
        if not run.is_noise(domain):
            use = f"teachers {', '.join([*run.teachers_of(domain), *run.recipe.objective.frames(domain)]) or 'none'}"
        found.note(f"domain {domain}: {amount:.1f} h to train on, {use}")
    unused = sorted(set(run.recipe.objective.domains()) - set(hours))
    if unused:
        found.note(f"the recipe knows {', '.join(unused)}, but no corpus has that domain")


def _note_shared_files(run: Run, found: Findings) -> None:
    """Say where audio files are both trained on and held out."""
    held = [part.files for scans in found.scans.values() for part in scans if part.split != "train"]
    kept = np.unique(np.concatenate([np.zeros(0, np.int64), *held]))
    for name, scans in found.scans.items():
        for part in scans:
            shared = np.intersect1d(part.files, kept) if part.split == "train" else kept[:0]
            if len(shared):
                known = set(shared.tolist())
                corpus = next(corpus for corpus in run.corpora if corpus.name == name)
                example = next((entry.origin.decode() for entry in corpus.source.entries("train") if hash(entry.origin) in known), "?")
                found.note(f"corpus {name}: {len(shared)} audio files of train are in valid or test of a corpus, too, such as {example}")


def _note_shared_ids(found: Findings) -> None:
    """Say where two corpora have cuts of one id; every corpus must be free of that in itself (see `_require_unique`)."""
    ids = {name: np.unique(np.concatenate([part.ids for part in scans])) for name, scans in found.scans.items()}
    doubtful = np.array(sorted(repeated(ids.values())), np.int64)
    shared = {name: int(np.isin(own, doubtful, assume_unique=True).sum()) for name, own in ids.items()}
    if len(doubtful):
        named = ", ".join(f"{name} {count}" for name, count in shared.items() if count)
        found.note(f"cuts of several corpora share their ids ({named}): they are kept apart by their corpus, but reports name ids only")


def _check_sampling(run: Run, found: Findings) -> None:
    """Plan the batches from the durations, as training will, and find one in the middle of the run."""
    config, mixing, lengths = run.recipe.sampling, run.recipe.mixing, []
    for corpus in run.corpora:
        (train,) = [part for part in found.scans.get(corpus.name, ()) if part.split == "train"] or [Scan("train")]
        low, high = corpus.limits_s(run.recipe.manifests)
        seconds = train.seconds[train.seconds >= low]
        if run.is_noise(corpus.domain) or not len(seconds):
            continue
        windows = np.ceil(seconds / high - 1e-6).astype(np.int64)
        seconds = np.repeat(seconds / windows, windows) if run.recipe.manifests.long == "split" else seconds[windows == 1]
        samples = np.maximum(1, np.rint(seconds * SAMPLE_RATE)).astype(np.int64)
        lengths.append(Lengths(corpus.name, samples, corpus.weight, mixing.growth_s(corpus.domain)))
    if not lengths:
        return
    start = time.monotonic()
    plan = BatchPlan(lengths, config, run.recipe.seed)
    planned, start = time.monotonic() - start, time.monotonic()
    training = run.recipe.training
    batches = training.max_steps * training.accumulation
    plan.batch(batches // 2)
    epochs = batches / plan.batches_per_epoch
    found.note(
        f"sampling: {plan.batches_per_epoch} batches an epoch, {epochs:.2f} epochs on one process; planned in {planned:.2f} s, "
        f"batch {batches // 2} found in {1000 * (time.monotonic() - start):.0f} ms"
    )


def _check_teachers(run: Run, found: Findings) -> tuple[dict[str, TokenSpec], dict[str, FrameSpec]]:
    """Load and measure every teacher and its quantizer."""
    specs: dict[str, TokenSpec] = {}
    frames: dict[str, FrameSpec] = {}
    for name, config in run.recipe.teachers.items():
        teacher: Teacher | None = None
        with found.check(f"teacher {name}: loads, and rate, width and layers are as declared"):
            teacher = config.build(run.data).to(default_device())
        if teacher is None:
            continue
        with found.check(f"teacher {name}: its first frame lies where it is declared"):
            _check_first_frame(teacher, found)
        found.measured.dims[name] = teacher.dim
        if name in run.recipe.objective.frame_teachers():
            frames[name] = FrameSpec(teacher.dim, teacher.num_parts, teacher.frame_rate_hz, teacher.first_frame_s)
        quantizer: Any = None
        if name in run.recipe.quantizers:
            with found.check(f"quantizer {name}: takes frames of the teacher's width, and what is made already is of this teacher"):
                specs[name] = _spec(run, name, teacher)
                quantizer = _quantizer(run, name, teacher)
        with found.check(f"teacher {name}: hears a sample of its cuts, and no codebook has collapsed"):
            _check_codes(run, name, teacher, quantizer, found)
    return specs, frames


def _check_first_frame(teacher: Teacher, found: Findings) -> None:
    """Raise ConfigError where the first frame is measured elsewhere than declared."""
    measured = first_frame_probe(teacher, default_device())
    if measured is None:
        found.note(f"{teacher.name}: its frames hear far around themselves, the time of the first one cannot be measured")
        return
    if abs(measured - teacher.first_frame_s) * teacher.frame_rate_hz > TOLERANCE_FRAMES:
        raise ConfigError(f"the first frame of {teacher.name} must be centred at {teacher.first_frame_s:.4f} s, but is measured at {measured:.4f} s")


def _spec(run: Run, name: str, teacher: Teacher) -> TokenSpec:
    num_codebooks, codebook_size = run.recipe.quantizers[name].knowing(teacher.codebooks).sizes(teacher.dim)
    return TokenSpec(num_codebooks, codebook_size, teacher.frame_rate_hz, teacher.first_frame_s, teacher.fingerprint())


def _quantizer(run: Run, name: str, teacher: Teacher) -> Any:
    """The fitted quantizer of a teacher, None where there is none yet; features, quantizer and token stores must be of this teacher, the
    quantizer of the recipe's settings."""
    for kind in ("features", "quantizers"):
        folder = run.data / kind / name
        if (folder / DONE).exists() and read_artifact(folder)["inputs"].get("teacher") != teacher.fingerprint():
            raise ArtifactError(f"{folder} was made with another teacher than `teachers.{name}`: remove it and what was made from it")
    check_quantizer(run, name)
    folder = run.data / "quantizers" / name
    if not (folder / DONE).exists():
        return None
    fingerprint = fingerprint_of(folder)
    for store in sorted((run.data / "tokens" / name).glob(f"*/*/{STORE}")):
        made = read_json(store)
        if (made["teacher_fingerprint"], made["quantizer_fingerprint"]) != (teacher.fingerprint(), fingerprint):
            raise ArtifactError(f"{store.parent} was made with another teacher or quantizer than {folder}: remove it")
    quantizer: Any = load_quantizer(folder)
    return quantizer.to(default_device()) if isinstance(quantizer, torch.nn.Module) else quantizer


def _check_codes(run: Run, name: str, teacher: Teacher, quantizer: Any, found: Findings) -> None:
    """Measure a teacher on real audio; with a fitted quantizer look at the histogram of every codebook."""
    frames = run.recipe.objective.frames
    heard = [c for c in run.corpora if not run.is_noise(c.domain) and (name in run.teachers_of(c.domain) or name in frames(c.domain))]
    groups = itertools.zip_longest(*(found.cuts.get(corpus.name, []) for corpus in heard))
    cuts = [cut for group in groups for cut in group if cut is not None]
    found.measured.teachers[name], both, codes = listen(teacher, cuts, quantizer)
    if not codes:
        return
    found.measured.tokens[name] = both
    histogram = entry_counts(torch.cat(codes), int(quantizer.codebook_size))
    check_collapse(histogram, name)
    used, bits = [int(n) for n in (histogram > 0).sum(dim=1)], entropy_bits(histogram)
    found.note(f"codes of {name}: {int(histogram[0].sum())} frames, entries used {used}, entropy in bits {bits}")
