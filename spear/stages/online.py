"""Teachers beside the student: which ones a run has, and what its training depends on through them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from spear.stages.tokens import load_tokenizer
from spear.teachers.online import Labeller, Target

if TYPE_CHECKING:
    from spear.recipe import Run

logger = logging.getLogger(__name__)


def make_labeller(run: Run, device: torch.device) -> Labeller | None:
    """What labels batches while the student trains: with ``tokens.source: online`` the teachers of its tokens, and always those of its frames.

    Args:
        device: where teachers and quantizers run.
    Returns:
        None where everything is read from shards.
    Raises:
        SpearError: a teacher cannot be had, or its quantizer is not finished or of another teacher.
    """
    recipe = run.recipe
    domains = {corpus.domain for corpus in run.corpora if not run.is_noise(corpus.domain)}
    targets: dict[str, Target] = {}
    if recipe.tokens.source == "online":
        for name in recipe.objective.teachers():
            tokenizer = load_tokenizer(run, name, device)
            heard = frozenset(domain for domain in domains if name in run.labels(domain))
            targets[name] = Target(tokenizer.teacher, heard, tokenizer.spec, tokenizer.encode)
    for name in recipe.objective.frame_teachers():
        teacher = recipe.teachers[name].build(run.data).to(device)
        targets[name] = Target(teacher, frozenset(domain for domain in domains if name in recipe.objective.frames(domain)))
    if not targets:
        return None
    logger.info("pretrain: %s run beside the student on %s", ", ".join(targets), device)
    batch_seconds = 60.0 if recipe.tokens.batch_seconds == "auto" else float(recipe.tokens.batch_seconds)
    return Labeller(targets, batch_seconds=batch_seconds, device=device)


def inputs_of(labeller: Labeller | None) -> dict[str, str]:
    """Fingerprints of teachers and quantizers that run beside the student."""
    found: dict[str, str] = {}
    for name, target in (labeller.targets if labeller is not None else {}).items():
        found[f"teachers/{name}"] = target.teacher.fingerprint()
        if target.spec is not None:
            found[f"quantizers/{name}"] = target.spec.quantizer_fingerprint
    return found
