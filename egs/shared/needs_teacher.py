"""Say whether a recipe has a teacher of a given folder: exit code 0 if it has, 1 if it has not, 2 where the recipe cannot be read.

python needs_teacher.py RECIPE teachers/speaker [a.b=c ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from spear.config.loader import apply_set, load_yaml
from spear.errors import ConfigError


def main() -> int:
    """Run the command; returns the exit code."""
    recipe, folder, *overrides = sys.argv[1:]
    try:
        teachers = apply_set(load_yaml(Path(recipe)), overrides).get("teachers") or {}
    except ConfigError as error:
        print(f"needs_teacher: error: {error}", file=sys.stderr)
        return 2
    models = [teacher.get("model") for teacher in teachers.values() if isinstance(teacher, dict)]
    return 0 if folder in models else 1


if __name__ == "__main__":
    sys.exit(main())
