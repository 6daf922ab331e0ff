"""A run: the recipe (what is trained), the corpora (on what) and its two folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spear.config import closest, load_config
from spear.data.corpora import CorporaConfig, CorpusConfig, ManifestsConfig
from spear.data.mixing import MixingConfig
from spear.data.sampler import SamplingConfig
from spear.data.shards import ShardsConfig
from spear.errors import ConfigError
from spear.evaluation.config import EvaluationConfig
from spear.export.config import ExportConfig
from spear.models.base import StudentConfig
from spear.models.masking import MaskConfig
from spear.objectives.base import ObjectiveConfig
from spear.quantizers.base import QuantizerConfig
from spear.teachers.base import TeacherConfig
from spear.teachers.extraction import FeaturesConfig, TokensConfig
from spear.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is trained. It names no corpus and no path."""

    student: StudentConfig
    """The network that learns."""
    objective: ObjectiveConfig
    """What it learns, and which teacher labels which domain."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Name -> frozen model."""
    quantizers: dict[str, QuantizerConfig] = field(default_factory=dict)
    """Teacher's name -> how its features become tokens."""
    seed: int = 0
    """Seed of everything random."""
    init_from: str | None = None
    """Where the student's encoder starts: an export folder (relative to the run's data folder, or a path), a released SPEAR folder, an icefall
    ``.pt`` checkpoint or a Hugging Face id. All its weights are needed, and the same sizes as `student`; none: random weights."""
    manifests: ManifestsConfig = field(default_factory=ManifestsConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    masking: MaskConfig = field(default_factory=MaskConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        frames = self.objective.frame_teachers()
        for teacher in [*self.objective.teachers(), *frames]:
            if teacher not in self.teachers:
                raise ConfigError(f"`objective` reads teacher {teacher!r}, but `teachers` has {', '.join(sorted(self.teachers)) or 'none'}")
        for teacher in self.teachers:
            if teacher not in self.quantizers and teacher not in frames:
                raise ConfigError(f"`quantizers.{teacher}` is missing: every teacher needs a quantizer")
        for name in self.quantizers:
            if name not in self.teachers:
                raise ConfigError(f"`quantizers.{name}` has no teacher of that name; `teachers` has {', '.join(sorted(self.teachers)) or 'none'}")
        for name, domains in self.features.domains.items():
            if name not in self.teachers:
                known = f"`teachers` has {', '.join(sorted(self.teachers)) or 'none'}{closest(name, self.teachers)}"
                raise ConfigError(f"`features.domains.{name}` has no teacher of that name; {known}")
            for domain in domains:
                self._check_domain(domain, f"features.domains.{name}")
        for domain in self.mixing.domains:
            if domain not in MixingConfig().domains:  # the defaults fit recipes that lack one of them, too
                self._check_domain(domain, "mixing.domains")

    def _check_domain(self, domain: str, key: str) -> None:
        """Raise ConfigError where neither the objective nor the noise knows `domain`."""
        if domain in self.mixing.noise_domains:
            return
        try:
            self.objective.labels(domain)
        except ConfigError as error:
            known = sorted({*self.objective.domains(), *self.mixing.noise_domains})
            rule = f"must name domains of the objective ({', '.join(known)})"
            raise ConfigError(f"`{key}` {rule}, but has {domain!r}{closest(domain, known)}") from error


@dataclass(frozen=True)
class Run:
    """One recipe on one set of corpora, with the folder of its data and the folder of its results."""

    recipe: Recipe
    corpora: list[CorpusConfig]
    data: Path
    exp: Path

    def is_noise(self, domain: str) -> bool:
        """Whether cuts of `domain` are only mixed into others: a noise domain that the objective does not know."""
        if domain not in self.recipe.mixing.noise_domains:
            return False
        objective = self.recipe.objective
        try:
            return not (objective.labels(domain) or objective.frames(domain))
        except ConfigError:
            return True

    def labels(self, domain: str) -> list[str]:
        """Teachers whose tokens the objective reads for cuts of `domain`, sorted; none for noise.

        Raises:
            ConfigError: the objective does not know the domain.
        """
        return [] if self.is_noise(domain) else sorted(self.recipe.objective.labels(domain))

    def stored(self, domain: str) -> list[str]:
        """As `teachers_of`, but only teachers whose tokens are stored: none with ``tokens.source: online``."""
        return [] if self.recipe.tokens.source == "online" else self.teachers_of(domain)

    def teachers_of(self, domain: str) -> list[str]:
        """Teachers that label the cuts of `domain`, sorted: those of `labels`, or with ``tokens.pairs: all`` every teacher; none for noise.

        Raises:
            ConfigError: the objective does not know the domain.
        """
        needed = self.labels(domain)
        return sorted(self.recipe.teachers) if self.recipe.tokens.pairs == "all" and needed else needed


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with ``key=value`` overrides.

    Raises:
        ConfigError: one line with key path, rule and value.
    """
    return load_config(Recipe, path, overrides)


def load_run(recipe: Path, corpora: Path, data: Path, exp: Path, overrides: Sequence[str] = ()) -> Run:
    """Read everything a stage is given and check it against each other.

    Raises:
        ConfigError: a file is wrong, two corpora share a name, a weight is too large for a factor, or a domain is unknown to the recipe.
    """
    loaded = load_recipe(recipe, overrides)
    found = load_config(CorporaConfig, corpora).resolved(corpora.resolve().parent)
    run = Run(replace(loaded, sampling=found.sampling(loaded.sampling)), list(found.corpora), data, exp)
    for corpus in run.corpora:
        run.teachers_of(corpus.domain)
    return run
