"""The tables of ablations of the examples: every variant loads and differs from the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear.commands.sweep import SweepConfig, _jobs
from spear.config import load_config
from tests.conftest import ROOT

TABLES = sorted((ROOT / "egs").glob("*/conf/ablations.yaml"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parts[-3])
def test_table_of_ablations_has_variants_that_load_and_differ(table: Path, tmp_path: Path) -> None:
    config = load_config(SweepConfig, table)
    jobs = _jobs(config, table, table.parent / "corpora.yaml", tmp_path / "data", tmp_path / "out")
    assert len(jobs) == len(config.runs()) == len({(job.name, job.seed) for job in jobs})
    recipes = {job.name: job.run.recipe for job in jobs if job.seed == config.seeds[0]}
    assert list(recipes) == list(config.variants)
    assert len({repr(recipe) for recipe in recipes.values()}) == len(recipes)
    own = {job.name for job in jobs if job.run.data != tmp_path / "data"}
    first = next(iter(recipes.values()))
    assert own == {name for name, recipe in recipes.items() if recipe.quantizers != first.quantizers}
