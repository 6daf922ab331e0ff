"""Any export as an upstream of S3PRL and SUPERB: `UpstreamExpert`, the names of ``hubconf``, and a runner that knows them."""

from __future__ import annotations

from spear.evaluation.s3prl.expert import UpstreamExpert

__all__ = ["UpstreamExpert"]
