"""Settings of the evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spear.bounds import above, at_least
from spear.data.corpora import CorpusConfig
from spear.errors import ConfigError
from spear.evaluation.suites import tasks_of
from spear.evaluation.tasks.base import Settings, Task, TaskConfig
from spear.files import seed_from
from spear.teachers.base import TeacherConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What the frozen encoder is asked, and beside whom it stands."""

    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name of the task, as the report shows it -> its settings. The first task of a domain speaks for it in the report."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the probes and of the verification trials; scores are their mean."""
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.03])
    """Tried per layer with the first seed; the best on the valid split is kept."""
    weight_decays: list[float] = field(default_factory=lambda: [0.0, 0.3])
    """Decoupled weight decays, tried with every learning rate."""
    steps: int = 400
    """Adam steps of a probe."""
    batch_size: int = 512
    """Items per step; a smaller train split is used whole."""
    max_train_frames: int = 50_000
    """Frames a frame task trains on, drawn evenly from all cuts."""
    max_test_frames: int = 50_000
    """Frames a frame task uses of the valid and of the test split."""
    resamples: int = 500
    """Bootstrap draws behind a 95 % interval."""
    context_frames: int = 3
    """Neighbours on each side in the second log-mel baseline; 0 leaves it out."""
    reconstruction: bool = True
    """Also score each teacher rebuilt from its tokens: what the student could learn at most."""
    untrained: bool = True
    """Also score the student before any training."""
    baselines: bool = True
    """Also score log-mels and the teachers, which are the same for all students on the same data."""
    beside: dict[str, TeacherConfig] = field(default_factory=dict)
    """Name -> another model to score, written as a teacher: one layer of a Hugging Face model, of another export (``type: spear``), of your code."""
    batch_s: float = 60.0
    """Seconds of audio per embedding batch, padding included."""
    analysis_cuts: int = 30
    """Test cuts per domain for the figures that need no label: similarity of student and teachers, retrieval of changed clips; 0: none."""
    memory_mb: int = 2048
    """Items of one model that are held in memory; what is more lies in files of the evaluation's folder while the model is scored."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            if not NAME.fullmatch(name):
                raise ConfigError(f"`tasks` names must be letters, digits, '_', '-' and '.', but one is {name!r}")
        for name in self.beside:
            if not NAME.fullmatch(name):
                raise ConfigError(f"`beside` names must be letters, digits, '_', '-' and '.', but one is {name!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"`seeds` must be at least one and all different, but is {self.seeds}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"`learning_rates` must be at least one and all positive, but is {self.learning_rates}")
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise ConfigError(f"`weight_decays` must be at least one and none negative, but is {self.weight_decays}")
        for key in ("steps", "batch_size", "max_train_frames", "max_test_frames", "resamples"):
            at_least(key, getattr(self, key), 1)
        for key in ("context_frames", "memory_mb", "analysis_cuts"):
            at_least(key, getattr(self, key), 0)
        above("batch_s", self.batch_s, 0)

    def settings(self, seed: int, device: str = "cpu") -> Settings:
        """What the tasks share; `seed` is the run's."""
        return Settings(
            seed=seed_from(seed, "evaluation"),
            seeds=tuple(self.seeds),
            max_train_frames=self.max_train_frames,
            max_test_frames=self.max_test_frames,
            learning_rates=tuple(self.learning_rates),
            weight_decays=tuple(self.weight_decays),
            steps=self.steps,
            batch_size=self.batch_size,
            resamples=self.resamples,
            device=device,
        )

    def build(self, seed: int, device: str = "cpu") -> dict[str, Task]:
        """The tasks by name."""
        settings = self.settings(seed, device)
        return {name: config.build(name, settings) for name, config in self.tasks.items()}


def with_suite(config: EvaluationConfig, suite: str, corpora: Sequence[CorpusConfig]) -> EvaluationConfig:
    """The same settings with the tasks of a suite (see `spear.evaluation.suites`) instead of their own.

    Raises:
        ConfigError: there is no such suite, or the corpora allow none of its tasks.
    """
    return replace(config, tasks=tasks_of(suite, corpora))
