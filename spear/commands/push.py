"""``spear push``: an export folder to the Hugging Face hub, checked and complete; or into a folder that holds exactly what would be sent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spear.errors import CheckpointError, ConfigError
from spear.export.encoder import load_encoder
from spear.files import make_folder, read_json, sha256_file, write_text, writing

logger = logging.getLogger(__name__)

SUMS, LICENCE, CARD = "SHA256SUMS", "LICENSE", "README.md"
SCORES = ("evaluate/scores.json", "scores.json")
"""Where a run's scores lie beside its export: of `spear evaluate`, of `spear finetune`."""
LEFT_OUT = ("artifact.json", "unfinished.json", ".lock")
"""A stage's own records: they say where and when, not what."""
OPEN = "license: other"
"""How a card says that nobody has chosen a licence yet."""


def push(
    export: Path,
    repo: str,
    out: Path | None,
    say: Callable[[str], None],
    *,
    licence_file: Path | None = None,
    private: bool = False,
    force: bool = False,
) -> None:
    """Send an export folder, with checksums, its licence, and in its card the scores of the run it belongs to.

    Args:
        export: folder of `spear export`, `spear import` or `spear finetune`. repo: ``owner/name`` on the hub. out: dry run: write the folder
        there and send nothing. licence_file: text of the weights' licence, sent as LICENSE. private: make a new repository private.
        force: send weights whose card names no licence.
    Raises:
        CheckpointError: the folder does not load, or its card names no licence. ConfigError: a bad name, or the hub refuses.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"`REPO` must be owner/name, but is {repo!r}")
    load_encoder(export)  # what does not load here does not load elsewhere
    card = export / CARD
    if not card.exists():
        raise CheckpointError(f"{export} has no {CARD}: it was not written by `spear export`")
    if not force and not names_licence(card.read_text()):
        raise CheckpointError(f"{card} names no licence: set `export.licence` and export again, or add `--force` to send the weights without one")
    folder = out if out is not None else export.resolve().with_name(f".{export.resolve().name}.push")
    files = gather(export, folder, licence_file)
    try:
        if out is not None:
            say(f"{out}: {len(files)} files, as they would go to {repo}; nothing was sent")
            return
        say(_upload(folder, repo, private))
    finally:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)


def names_licence(card: str) -> bool:
    """Whether the YAML head of a model card has a licence other than the open one."""
    head = card.split("---")[1] if card.startswith("---") else ""
    lines = [line.strip() for line in head.splitlines() if line.startswith("license:")]
    return bool(lines) and lines[0] != OPEN


def gather(export: Path, folder: Path, licence_file: Path | None) -> list[Path]:
    """Copy what is sent into an empty `folder`, with ``SHA256SUMS`` in the form of ``sha256sum``.

    Returns:
        the files.
    Raises:
        ConfigError: `folder` is not empty. CheckpointError: `licence_file` is not there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"`--dry-run` must be a folder that is empty or not there, but {folder} is neither")
    make_folder(folder)
    if licence_file is not None and not licence_file.is_file():
        raise CheckpointError(f"`--licence-file` {licence_file} does not exist")
    with writing(folder):
        for path in sorted(export.rglob("*")):
            if path.is_file() and path.name not in LEFT_OUT and not path.name.startswith("."):
                target = folder / path.relative_to(export)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        if licence_file is not None:
            shutil.copyfile(licence_file, folder / LICENCE)
    scores = next((export.parent / name for name in SCORES if (export.parent / name).exists()), None)
    if scores is not None and (folder / CARD).exists():
        write_text(folder / CARD, with_scores((folder / CARD).read_text(), read_json(scores)))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_text(folder / SUMS, "".join(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files))
    return [*files, folder / SUMS]


def with_scores(card: str, scores: Mapping[str, Any]) -> str:
    """The card with a table of scores before its section on the licence.

    Args:
        scores: ``scores.json`` of `spear finetune`, one score, or of `spear evaluate`: task -> embedder -> score.
    """
    if "metric" in scores:
        rows = [(scores["task"], "fine-tuned", scores)]
    else:
        rows = [(task, found.get("label", name), found) for task, by_name in scores.items() for name, found in by_name.items() if "value" in found]
    if not rows:
        return card
    lines = ["## Scores", "", "| task | features | metric | test |", "| --- | --- | --- | --- |"]
    lines += [f"| {task} | {label} | {found.get('metric', '')} | {_interval(found)} |" for task, label, found in rows]
    head, mark, tail = card.rpartition("## Licence")
    return "\n".join([*([head.rstrip("\n"), ""] if mark else [card.rstrip("\n"), ""]), *lines, "", *([mark + tail] if mark else [])])


def _interval(found: Mapping[str, Any]) -> str:
    text = f"{found['value']:.3f}"
    return f"{text} ({found['ci'][0]:.3f} to {found['ci'][1]:.3f})" if found.get("ci") else text


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Send a folder; returns where it lies now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Encoder exported by spear")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the hub did not take {repo}: {text}; log in with `hf auth login`, or see what would be sent with `--dry-run DIR`"
        ) from error
    return str(commit.commit_url)
