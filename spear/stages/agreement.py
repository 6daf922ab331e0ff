"""Whether what earlier stages made is of the teachers, quantizers and domains that the recipe and the corpora name today."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from spear.config import to_json
from spear.data.shards import index_path
from spear.errors import ArtifactError
from spear.files import read_json
from spear.quantizers.base import QuantizerConfig
from spear.stages.artifact import DONE, differences, read_artifact
from spear.teachers.base import TeacherConfig

if TYPE_CHECKING:
    from spear.data.corpora import CorpusConfig
    from spear.recipe import Run

LOCATION = ("model", "weights", "code", "revision")
"""Keys of a teacher that say where it lies, not what it is: that is its fingerprint."""


def teacher_settings(run: Run, teachers: Iterable[str]) -> dict[str, Any]:
    """The recipe's settings of some teachers, by name."""
    return {name: to_json(run.recipe.teachers[name], TeacherConfig) for name in teachers if name in run.recipe.teachers}


def without_location(config: dict[str, Any]) -> dict[str, Any]:
    """The config of an artifact with ``teachers``, without the keys that say where these lie."""
    teachers: dict[str, Any] = config.get("teachers") or {}
    return {**config, "teachers": {name: _bare(settings) for name, settings in teachers.items()}}


def _bare(settings: Any) -> Any:
    return {key: value for key, value in settings.items() if key not in LOCATION} if isinstance(settings, Mapping) else settings


def check_teachers(run: Run, artifact: dict[str, Any], teachers: Iterable[str], fingerprints: Mapping[str, str]) -> None:
    """Check that tokens or shards were made by the teachers that the recipe names today.

    A teacher that lies elsewhere now is loaded, and its fingerprint compared.

    Args:
        artifact: record of a finished folder with ``config.teachers``. teachers: names to compare.
        fingerprints: of the teachers that the folder was made by, where they are known.
    Raises:
        ArtifactError: a teacher's settings or weights differ; names the first difference.
        ConfigError: a teacher is named at another place, where it cannot be had.
    """
    made_by = artifact["config"].get("teachers", {})
    for name, settings in teacher_settings(run, teachers).items():
        changes = list(differences(_bare(made_by.get(name)), _bare(settings), f"teachers.{name}"))
        moved = not changes and made_by[name] != settings and name in fingerprints
        if moved and run.recipe.teachers[name].build(run.data).fingerprint() != fingerprints[name]:
            changes = list(differences(made_by[name], settings, f"teachers.{name}"))
        if changes:
            raise ArtifactError(f"the {artifact['kind']} were made by another teacher {name}: {changes[0]}; make the stages from `features` on again")


def check_quantizer(run: Run, name: str, made_with: str | None = None) -> None:
    """Check that the quantizer of a teacher in ``DATA/quantizers`` has the recipe's settings; nothing where there is no finished one.

    Args:
        made_with: fingerprint of the quantizer that tokens at hand were made with; it must be this one.
    Raises:
        ArtifactError: a setting differs, or the tokens are of another quantizer; names key and values, and what to do.
    """
    folder = run.data / "quantizers" / name
    if name not in run.recipe.quantizers or not (folder / DONE).exists():
        return
    record = read_artifact(folder)
    fitted = record["config"].get("quantizer")
    if fitted is not None:
        now = to_json(run.recipe.quantizers[name], QuantizerConfig)
        known = {key: value for key, value in now.items() if key in fitted}  # a record may be older than a key
        changes = list(differences(fitted, known, f"quantizers.{name}"))
        if changes:
            raise ArtifactError(
                f"{folder} was fitted with other settings: {changes[0]}; set that back, or remove {folder} and what was made with it, then run the "
                "stages from `quantizers` on again"
            )
    if made_with and made_with != record["fingerprint"]:
        raise ArtifactError(
            f"the tokens of {name} were made with another quantizer than {folder}: remove {run.data / 'tokens' / name} and the shards with "
            "them, then run the stages from `tokens` on again"
        )


def check_shards(run: Run, corpus: CorpusConfig) -> None:
    """Check that the finished shards of a corpus are of its domain, and their tokens of the recipe's teachers and quantizers.

    Raises:
        ArtifactError: they are not, or the folder is missing or unfinished. ConfigError: see `check_teachers`.
    """
    folder = run.data / "shards" / corpus.name
    record = read_artifact(folder)
    domain = record["config"].get("domain", corpus.domain)
    if domain != corpus.domain:
        raise ArtifactError(
            f"{folder} was made of a corpus whose `domain` was {domain}, is {corpus.domain}: set that back, or remove the data and run all stages "
            "again"
        )
    if run.recipe.tokens.source != "stored":
        return
    index = index_path(folder / "train").with_suffix(".json")
    specs: dict[str, Any] = read_json(index)["tokens"] if index.exists() else {}
    labels = run.labels(corpus.domain)
    check_teachers(run, record, labels, {name: spec["teacher_fingerprint"] for name, spec in specs.items()})
    for name in labels:  # a quantizer that was fitted anew after the end does not matter to a finished run
        finished = (run.exp / DONE).exists()
        check_quantizer(run, name, None if finished or name not in specs else specs[name]["quantizer_fingerprint"])
