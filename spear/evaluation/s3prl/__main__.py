"""``s3prl.run_downstream`` with the upstreams of this project, without a change to S3PRL.

python -m spear.evaluation.s3prl -u spear -k EXPORT -m train -d TASK -c CONFIG -n NAME
"""

from __future__ import annotations

import importlib
import runpy
from typing import Any

from spear.evaluation.s3prl import hubconf


def register(hub: Any) -> None:
    """Add ``spear`` and ``spear_local`` to `hub`, the module ``s3prl.hub``."""
    for name in ("spear", "spear_local"):
        setattr(hub, name, getattr(hubconf, name))


if __name__ == "__main__":
    register(importlib.import_module("s3prl.hub"))
    runpy.run_module("s3prl.run_downstream", run_name="__main__")
