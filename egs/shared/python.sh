# Which Python egs/ runs: PYTHON if it is set, else the repository's .venv, else python3. Source it by its path; it sets PYTHON.

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
