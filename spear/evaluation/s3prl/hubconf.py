"""Names of the upstreams: for `torch.hub`, and for a copy of this folder under ``s3prl/upstream/``."""

from __future__ import annotations

from typing import Any

from spear.evaluation.s3prl.expert import UpstreamExpert as _UpstreamExpert

dependencies = ["torch", "spear"]


def spear_local(ckpt: str, model_config: str | None = None, **options: Any) -> _UpstreamExpert:
    """The export at `ckpt` as an upstream; arguments and errors as of `UpstreamExpert`."""
    return _UpstreamExpert(ckpt, model_config, **options)


def spear(ckpt: str | None = None, model_config: str | None = None, **options: Any) -> _UpstreamExpert:
    """The same; without `ckpt` the export that the environment variable ``SPEAR_EXPORT`` names."""
    return _UpstreamExpert(ckpt, model_config, **options)
