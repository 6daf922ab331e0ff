"""ScaledAdam's gradient clipping: a limit set by the median of recent gradient norms.

Source: behaviour of icefall's ScaledAdam (Apache-2.0), the variant SPEAR trained with and the current one, rewritten from
a description of its arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from spear.errors import SpearError

Variant = Literal["fork", "master"]
"""``fork``: the code SPEAR (arXiv:2510.25955) trained with; ``master``: current icefall."""

EARLY_STEPS = (10, 20, 40)
"""Updates at which ``master`` makes a first guess at the limit, before a whole period has passed."""
TINY = 1e-20


def clip_state(period: int) -> dict[str, Any]:
    """The clipping memory of a parameter group: a ring of norms, the limit (None: none yet), updates clipped since it was set."""
    return {"norms": [0.0] * period, "norm_limit": None, "num_clipped": 0}


def clip_factor(group: dict[str, Any], norm: float, *, step: int, clipping_scale: float, variant: Variant) -> float:
    """Record a gradient norm and return the factor on the gradients of this update.

    The limit is `clipping_scale` times the median of the last ``len(norms)`` norms, renewed once in so many updates. Without
    a limit, the factor is 1. An infinite norm gives 0.

    Args:
        group: holds `clip_state`, which is changed. norm: of all gradients of the group, each weighted by its tensor's rms.
        step: updates done, 0-based. clipping_scale: limit over median. variant: see Variant.
    Raises:
        SpearError: the median norm is not finite (``master`` only).
    """
    if step == 0 or norm == 0.0:
        return 1.0
    ring: list[float] = group["norms"]
    period = len(ring)
    ring[step % period] = norm
    early = variant == "master" and step in EARLY_STEPS and step < period
    if step % period == 0 or early:
        recent = sorted(ring)[-step:] if early else sorted(ring)
        last = len(recent) - 1
        median = recent[min(last, 2 * (len(recent) // 4))] or recent[min(last, 4 * (len(recent) // 4))]
        if variant == "master" and not math.isfinite(median):
            raise SpearError(f"the median gradient norm is {median} at update {step}; the training has diverged")
        group["norm_limit"] = clipping_scale * median * (2.0 if early else 1.0)
        group["num_clipped"] = 0
    if math.isinf(norm):
        return 0.0
    limit: float | None = group["norm_limit"]
    if limit is None or (variant == "fork" and step < period):
        return 1.0
    factor = min(1.0, limit / (norm + TINY))
    group["num_clipped"] += factor < 1.0
    return factor
