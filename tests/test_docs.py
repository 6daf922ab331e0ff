"""What the documentation names exists: links, files, commands, options, recipe keys, snippets, and the tables of keys."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from spear.cli import _parser
from spear.config import load_config, to_json
from spear.data.corpora import CorporaConfig, CorpusConfig, SourceConfig
from spear.evaluation.tasks.base import TaskConfig
from spear.finetune.tasks import FinetuneTaskConfig
from spear.finetune.tasks.ctc import CTCConfig
from spear.finetune.tasks.speech import SpeechConfig
from spear.objectives.masked_prediction import MaskedPredictionConfig
from spear.recipe import Recipe, load_recipe
from spear.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("egs/*/README.md")])
CODE = re.compile(r"^```(\w*)(?: title=\S+)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TOP = ("spear", "tests", "recipes", "egs", "docs", "tools")
FOLDERS = "|".join(TOP)
NAMED = re.compile(rf"(?<![\w./-])(?:\.\./\.\./)?((?:{FOLDERS})/[\w./*-]*[\w*-])")
MADE = ("/data", "/exp")
"""Parts of paths that running an example makes."""
CONFIG_TABLES = {
    "Recipe": ["spear.recipe:Recipe"],
    "`manifests`": ["spear.data.corpora:ManifestsConfig"],
    "`teachers`": [
        "spear.teachers.huggingface:HuggingFaceConfig",
        "spear.teachers.layers:LayersConfig",
        "spear.teachers.spear:SpearTeacherConfig",
        "spear.teachers.logmel:LogMelConfig",
        "spear.teachers.logmel:MfccConfig",
        "spear.teachers.redimnet:ReDimNetConfig",
        "spear.teachers.beats:BEATsConfig",
        "spear.teachers.atst:ATSTConfig",
        "spear.teachers.dasheng_package:DashengConfig",
        "spear.teachers.python:PythonConfig",
    ],
    "`features`": ["spear.teachers.extraction:FeaturesConfig"],
    "`quantizers`": [
        "spear.quantizers.mvq_fit:MVQConfig",
        "spear.quantizers.kmeans:KMeansConfig",
        "spear.quantizers.residual:ResidualConfig",
        "spear.quantizers.product:ProductConfig",
        "spear.quantizers.random_projection:RandomProjectionConfig",
        "spear.quantizers.fsq:FSQConfig",
        "spear.quantizers.codec:CodecConfig",
        "spear.quantizers.dmel:DMelConfig",
    ],
    "`tokens`": ["spear.teachers.extraction:TokensConfig"],
    "`shards`": ["spear.data.shards:ShardsConfig"],
    "`student`": [
        "spear.models.zipformer.config:ZipformerConfig",
        "spear.models.conformer:ConformerConfig",
        "spear.models.transformer:TransformerConfig",
        "spear.models.conv_transformer:ConvTransformerConfig",
    ],
    "`masking`": ["spear.models.masking:MaskConfig"],
    "`mixing`": ["spear.data.mixing:MixingConfig", "spear.data.mixing:DomainMixing"],
    "`objective`": [
        "spear.objectives.masked_prediction:MaskedPredictionConfig",
        "spear.models.heads:CosineHeadConfig",
        "spear.objectives.balance:RunningConfig",
        "spear.objectives.balance:DropConfig",
        "spear.objectives.layer_distillation:LayerDistillationConfig",
        "spear.objectives.self_distillation:SelfDistillationConfig",
        "spear.objectives.ema:ExponentialDecay",
        "spear.objectives.ema:LinearDecay",
        "spear.objectives.regression:RegressionConfig",
    ],
    "`sampling`": ["spear.data.sampler:SamplingConfig"],
    "`training`": [
        "spear.training.config:TrainingConfig",
        "spear.training.optim.scaled_adam:ScaledAdamConfig",
        "spear.training.optim.adamw:AdamWConfig",
        "spear.training.optim.eden:EdenConfig",
        "spear.training.optim.eden:Eden2Config",
        "spear.training.optim.tristage:TristageConfig",
        "spear.training.optim.warmup:ConstantConfig",
        "spear.training.optim.warmup:LinearConfig",
        "spear.training.optim.warmup:CosineConfig",
    ],
    "`export`": ["spear.export.config:ExportConfig"],
    "`evaluation`": [
        "spear.evaluation.config:EvaluationConfig",
        "spear.evaluation.tasks.base:TaskConfig",
        "spear.evaluation.tasks.frames:FramesConfig",
        "spear.evaluation.tasks.segments:SegmentsConfig",
        "spear.evaluation.tasks.utterances:UtterancesConfig",
        "spear.evaluation.tasks.verification:VerificationConfig",
        "spear.evaluation.tasks.profiling:ProfilingConfig",
        "spear.evaluation.tasks.speaker_count:SpeakerCountConfig",
        "spear.evaluation.tasks.units:UnitsConfig",
        "spear.evaluation.tasks.abx:AbxConfig",
        "spear.evaluation.tasks.ctc:CtcConfig",
        "spear.evaluation.tasks.leakage:LeakageConfig",
    ],
    "Fine-tuning recipe": [
        "spear.finetune.config:FinetuneRecipe",
        "spear.finetune.config:StartConfig",
        "spear.finetune.lora:LoRAConfig",
        "spear.finetune.config:MixupConfig",
        "spear.finetune.tasks.ctc:CTCConfig",
        "spear.finetune.tasks.rnnt:RNNTConfig",
        "spear.finetune.tasks.tagging:TaggingConfig",
        "spear.finetune.tasks.classification:ClassificationConfig",
        "spear.finetune.tasks.verification:SpeakerConfig",
    ],
    "Corpora file": [
        "spear.data.corpora:CorporaConfig",
        "spear.data.corpora:CorpusConfig",
        "spear.data.sources:CutsSource",
        "spear.data.sources:FolderSource",
    ],
}
page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code_of(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, and inline code."""
    for _, block in CODE.findall(text):
        yield from block.splitlines()
    rest = CODE.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from (code for _, code in SPAN.findall(rest))


def commands() -> dict[str, argparse.ArgumentParser]:
    """Word -> its parser."""
    (found,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


@page
def test_docs_links_lead_to_files(path: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(path.read_text()) if "://" not in link]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    assert not missing


@page
def test_docs_named_files_exist(path: Path) -> None:
    named = {found for code in code_of(path.read_text()) if "://" not in code for found in NAMED.findall(code)}
    made = [name for name in named if any(f"{part}/" in f"{name}/" for part in MADE)]
    missing = sorted(name for name in named if name not in made and "WORD" not in name and not any(ROOT.glob(name)))
    assert not missing


@page
def test_docs_commands_and_options_exist(path: Path) -> None:
    known, problems = commands(), []
    for code in code_of(path.read_text()):
        for word, rest in re.findall(r"(?:^|-m |\s)spear ([a-z]+)((?: .*)?)$", code):
            if word not in known:
                problems.append(f"spear {word}")
                continue
            options = {option for action in known[word]._actions for option in action.option_strings}
            problems += [f"spear {word} {option}" for option in re.findall(r"(--[a-z-]+)", rest) if option not in options]
    assert not problems


@page
def test_docs_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for code in code_of(path.read_text()) for word in re.findall(r"^make ([a-z-]+)", code)}
    assert named <= targets


@pytest.mark.parametrize("path", sorted(ROOT.glob("egs/*/run.sh")), ids=lambda p: p.parent.name)
def test_docs_examples_have_their_recipe_corpora_and_readme(path: Path) -> None:
    recipe = re.search(r"^recipe=(\S+)$", path.read_text(), re.MULTILINE)
    assert recipe is not None
    missing = [name for name in (recipe[1], "conf/corpora.yaml", "README.md") if not (path.parent / name).exists()]
    assert not missing


def test_docs_every_command_is_explained() -> None:
    text = (ROOT / "docs" / "stages.md").read_text()
    stages = re.findall(r"^## [0-7] `([a-z]+)`", text, re.MULTILINE)
    tools = re.findall(r"^\| `spear ([a-z]+)", text, re.MULTILINE)
    assert [*stages, *tools] == list(commands())


def keys_of(config: type) -> set[str]:
    """Fields of a config; of a family those of all its variants."""
    if issubclass(config, Registry) and "TABLE" in config.__dict__:
        return {"type"}.union(*(keys_of(variant) for variant in config.get_known_choices().values()))
    return {item.name for item in fields(config)}


def section_type(section: str) -> Any:
    """The dataclass behind a key of a recipe; for a mapping that of its values."""
    hint = get_type_hints(Recipe)[section]
    return get_args(hint)[1] if get_args(hint) else hint


@page
def test_docs_recipe_keys_exist(path: Path) -> None:
    sections, missing = {item.name for item in fields(Recipe)}, []
    for code in code_of(path.read_text()):
        for section, key in re.findall(r"(?<![\w./`])([a-z_]+)\.([a-z_]+)(?=[\s`=:.]|$)", code):
            if section not in sections or code.endswith("."):  # names of weights begin like sections
                continue
            found = section_type(section)
            named = section in ("teachers", "quantizers")
            if is_dataclass(found) and not named and key not in keys_of(found):
                missing.append(f"{section}.{key}")
    assert not missing


@page
def test_docs_yaml_loads(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    snippets = [block for language, block in CODE.findall(text) if language == "yaml"]
    snippets += [code for _, code in SPAN.findall(CODE.sub("", text)) if re.match(r"[a-z]+: \{.*\}$", code)]
    for snippet in snippets:
        if re.match(r"source: |seed: \d+\nsounds:", snippet):  # part of a corpus; what make_sounds.py reads
            continue
        value, file = yaml.safe_load(snippet), tmp_path / "snippet.yaml"
        if "corpora" in value:
            file.write_text(snippet)
            assert load_config(CorporaConfig, file).corpora
        elif set(value) <= {item.name for item in fields(Recipe)}:
            file.write_text(f"include: {ROOT / 'recipes' / 'spear_base.yaml'}\n{snippet}")
            assert load_recipe(file)
        else:
            pytest.fail(f"neither a recipe nor a corpora file: {snippet}")


def sections_of(text: str) -> dict[str, str]:
    """Title of every second-level heading -> what stands under it."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def rows_of(text: str) -> list[list[tuple[str, str]]]:
    """(key, default) of every table of keys."""
    tables = re.findall(r"\| key \| type \| default \| meaning \|\n\| --- [^\n]*\n((?:\|[^\n]*\n)+)", text)
    return [re.findall(r"^\| `(\w+)` \|[^|]*\| (`[^`]*`|[\w ]+) \|", table, re.MULTILINE) for table in tables]


def default_of(item: Any) -> Any:
    """JSON value of a field's default; MISSING where it has none."""
    if item.default is not MISSING:
        return to_json(item.default)
    return MISSING if item.default_factory is MISSING else to_json(item.default_factory())


@pytest.mark.parametrize("section", CONFIG_TABLES)
def test_docs_tables_of_keys_are_the_dataclasses(section: str) -> None:
    tables = rows_of(sections_of((ROOT / "docs" / "config.md").read_text())[section])
    targets = CONFIG_TABLES[section]
    assert len(tables) == len(targets)
    for rows, target in zip(tables, targets):
        module, _, name = target.partition(":")
        config = getattr(importlib.import_module(module), name)
        bases = [base for base in (TaskConfig, SpeechConfig) if issubclass(config, base) and config not in (base, CTCConfig)]
        common = {item.name for base in bases for item in fields(base)}
        own = {item.name: item for item in fields(config) if item.name not in common}
        assert [key for key, _ in rows] == list(own), name
        for key, shown in rows:
            expected = default_of(own[key])
            if shown == "required":
                assert expected is MISSING, f"{name}.{key}"
            elif shown.startswith("`"):
                found = yaml.safe_load(shown.strip("`"))
                found = float(found) if isinstance(expected, float) else found
                if isinstance(found, dict) and "type" in found:
                    expected = {"type": expected["type"]}
                assert found == expected, f"{name}.{key}"
            else:
                assert shown in ("see below", "see text"), f"{name}.{key}"


def test_docs_tables_cover_every_variant() -> None:
    listed = {target for targets in CONFIG_TABLES.values() for target in targets}
    families = [section_type(item.name) for item in fields(Recipe)]
    families = [family for family in families if isinstance(family, type) and issubclass(family, Registry)]
    families += [TaskConfig, FinetuneTaskConfig, SourceConfig, get_type_hints(CorpusConfig)["source"]]
    missing = sorted({target for family in families for target in family.TABLE.values()} - listed)
    assert not missing


def test_docs_default_weights_are_the_recipe_s() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    shown = re.search(r"\| `weights` \| table \|.*Default: `([^`]*)`", text)
    assert shown is not None
    assert yaml.safe_load(shown[1]) == MaskedPredictionConfig().weights


def test_docs_hold_no_machine_paths() -> None:
    found = [f"{path.name}: {hit}" for path in PAGES for hit in re.findall(r"(?<![\w.}])/(?:home|work|root|tmp|mnt|data)/[\w/]+", path.read_text())]
    assert not found
