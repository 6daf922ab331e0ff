"""The README of an exported model, filled from what the run's artifacts say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spear.export.audio import min_samples
from spear.models.base import Encoder
from spear.models.zipformer.config import ZipformerConfig

TEMPLATE = "model_card.md.j2"
TEACHER = {"name": "", "type": None, "model": None, "layer": None}
CORPUS = {"name": "", "domain": None, "hours": None, "cuts": None}


def render_card(encoder: Encoder, info: Mapping[str, Any]) -> str:
    """Model card as Markdown with a YAML head.

    Args:
        encoder: tells sizes and rates.
        info: JSON values, all optional: ``name``, ``licence`` (an SPDX word), ``licence_notes`` (texts), ``source`` (a sentence),
            ``teachers`` (mappings with name, type, model, layer), ``corpora`` (name, domain, hours, cuts), ``checkpoint`` and
            ``compute`` (mappings that are listed as they are).
    """
    loader = PackageLoader("spear.export", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    corpora = [{**CORPUS, **corpus} for corpus in info.get("corpora", [])]
    text = environment.get_template(TEMPLATE).render(
        name=info.get("name") or "SPEAR encoder",
        licence=info.get("licence"),
        licence_notes=list(info.get("licence_notes", [])),
        source=info.get("source"),
        teachers=[{**TEACHER, **teacher} for teacher in info.get("teachers", [])],
        corpora=corpora,
        domains=" and ".join(sorted({str(corpus["domain"]) for corpus in corpora if corpus["domain"]})),
        checkpoint=dict(info.get("checkpoint", {})),
        compute=dict(info.get("compute", {})),
        parameters=f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
        layers=encoder.num_layers,
        dim=encoder.dim,
        rate=encoder.sample_rate,
        frame_rate=f"{encoder.frame_rate_hz:g}",
        first_frame=f"{encoder.first_frame_s:g}",
        shortest=f"{min_samples(encoder) / encoder.sample_rate:g}",
        context=_context(getattr(encoder, "config", None)),
    )
    return text.rstrip("\n") + "\n"


def _context(config: object) -> str:
    """What one frame may depend on."""
    if not isinstance(config, ZipformerConfig) or not config.causal or config.chunk_sizes[0] == -1:
        return "the whole utterance"
    chunk, left = config.chunk_sizes[0], config.left_contexts[0]
    return f"chunks of {chunk} frames at 50 Hz, {'everything' if left == -1 else f'{chunk * max(1, left // chunk)} frames'} before them"
