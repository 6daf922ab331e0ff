"""Run an export under HEAR, X-ARES and S3PRL on small tasks, beside an untrained encoder and log-mel: ``python tools/clients/run.py EXPORT CORPUS``.

Each harness gets its own environment in ``build/clients`` (or ``$SPEAR_CLIENTS``), on top of the one that runs this script. CORPUS is a folder
with ``cuts_train.jsonl.gz``, ``cuts_valid.jsonl.gz`` and ``cuts_test.jsonl.gz``, whose cuts have a custom field ``label``. Prints the accuracies and
writes them to ``results.json`` there; the output of the harnesses is in ``*.log`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from functools import partial
from pathlib import Path

import torch
from tasks import write_hear, write_keywords, write_xares

from spear import load_encoder
from spear.export import save_encoder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = Path(os.environ.get("SPEAR_CLIENTS", ROOT / "build" / "clients"))
NAME = "small_sounds"
PACKAGES: dict[str, list[list[str]]] = {
    "hear": [
        ["--ignore-requires-python", "hearvalidator==2021.0.6", "heareval==2021.1.3", "pytorch-lightning==1.9.5", "torchmetrics", "pandas"],
        ["lightning-utilities", "setuptools<80", "more-itertools", "torchinfo", "python-slugify", "text-unidecode", "sed-eval", "dcase-util"],
        ["intervaltree", "schema", "dill", "python-dateutil", "six", "future", "validators", "titlecase", "colorama", "python-magic", "pydot-ng"],
        ["librosa", "lazy_loader", "decorator", "pooch", "soxr", "msgpack", "platformdirs"],
    ],
    "xares": [
        ["xares==0.1.3", "loguru", "webdataset", "braceexpand", "jiwer", "rapidfuzz", "torchmetrics", "lightning-utilities", "pytorch_ignite"],
        ["pandas", "python-dateutil", "requests", "certifi", "idna", "charset-normalizer", "torchaudio==2.8.0"],
    ],
    "s3prl": [
        ["wheel", "setuptools<80", "omegaconf", "requests", "certifi", "idna", "charset-normalizer", "protobuf", "tensorboardX", "torchaudio==2.8.0"],
        ["--no-build-isolation", "s3prl==0.4.18", "antlr4-python3-runtime==4.9.3"],
    ],
}
"""What `pip install --no-deps` gets, call by call: the harnesses pin versions that no longer install."""


def build(name: str) -> Path:
    """Make the environment of one harness; returns its interpreter."""
    folder = BUILD / f"env_{name}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == json.dumps(PACKAGES[name]):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    (site / "base.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    for packages in PACKAGES[name]:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *packages], check=True)
    for library in site.glob("tor*io/lib/*.so"):  # torchaudio and torio were built for another torch; their Python parts do without
        library.unlink()
    ready.write_text(json.dumps(PACKAGES[name]))
    return python


def call(log: str, arguments: list[str | Path], cwd: Path, **variables: str) -> str:
    """Run one program, append its output to a log and return it; ends this script where it fails."""
    path = os.pathsep.join(map(str, (HERE / "stubs", HERE, cwd)))
    environment = os.environ | {"PYTHONPATH": path, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"} | variables
    done = subprocess.run(arguments, check=False, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with (BUILD / f"{log}.log").open("a") as file:
        file.write(f"$ {' '.join(map(str, arguments))}\n{done.stdout}\n")
    if done.returncode:
        sys.exit(f"{log} failed, see {BUILD / log}.log:\n{done.stdout[-2000:]}")
    return done.stdout


def hear(corpus: Path, models: dict[str, str]) -> dict[str, float]:
    """Validator and one heareval task; accuracy of each model."""
    python, folder = build("hear"), BUILD / "hear"
    write_hear(corpus, folder / "tasks", NAME)
    scores = {}
    for name, export in models.items():
        module = ["spear.evaluation.hear", "--model", export] if export else ["logmel"]
        if "Looks good!" not in call("hear", [python.parent / "hear-validator", *module, "-d", "cpu"], folder):
            sys.exit(f"hear-validator finds fault with {name}, see {BUILD / 'hear.log'}")
        path, mark, layer = export.partition("#")
        if mark:  # the runner takes nothing but an existing path
            module = [module[0], "--model", path, "--model-options", json.dumps({"layer": layer})]
        call("hear", [python, "-m", "heareval.embeddings.runner", *module, "--tasks-dir", "tasks", "--embeddings-dir", name], folder)
        (task,) = (folder / name).glob(f"*/{NAME}-v1-small")
        call("hear", [python, "-m", "heareval.predictions.runner", task, "--grid-points", "8", "--grid", "fast"], folder)
        found = json.loads((task / "test.predicted-scores.json").read_text())
        scores[name] = found["test"]["test_top1_acc"]
    return scores


def xares(corpus: Path, models: dict[str, str]) -> dict[str, tuple[float, float]]:
    """One X-ARES task; accuracy of MLP and kNN of each model."""
    python, scores = build("xares"), {}
    for name, export in models.items():
        folder = BUILD / "xares" / name
        write_xares(corpus, folder, NAME)
        encoder = "spear/evaluation/xares_encoder.py" if export else "logmel.py"
        out = call("xares", [python, "-m", "xares.run", "--max-jobs", "0", encoder, f"{NAME}_task.py"], folder, SPEAR_EXPORT=export)
        row = re.search(rf"^\s*{NAME}\s+([\d.]+)\s+([\d.]+)", out, re.MULTILINE)
        if row is None:
            sys.exit(f"X-ARES gives no score for {name}, see {BUILD / 'xares.log'}")
        scores[name] = (float(row[1]), float(row[2]))
    return scores


def s3prl(models: dict[str, str]) -> dict[str, float]:
    """Keyword spotting of SUPERB on spoken words; accuracy of each model."""
    python, folder, scores = build("s3prl"), BUILD / "s3prl", {}
    write_keywords(folder, ROOT / "egs" / "mini" / "local" / "espeak.py")
    for name, export in models.items():
        if "#" in export:  # it gets all layers anyway
            continue
        upstream = ["-u", "spear", "-k", export] if export else ["-u", "fbank"]
        train = ["-m", "train", "-n", name, "-d", "speech_commands", "-c", HERE / "ks.yaml", *upstream]
        call("s3prl", [python, HERE / "s3prl_today.py", *train, "--device", "cpu"], folder)
        best = folder / "result" / "downstream" / name / "dev-best.ckpt"
        out = call("s3prl", [python, HERE / "s3prl_today.py", "-m", "evaluate", "-e", best, "--device", "cpu"], folder)
        scores[name] = float(re.findall(r"test acc: ([\d.]+)", out)[-1])
    return scores


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="finished export folder")
    parser.add_argument("corpus", type=Path, help="folder of labelled cuts")
    parser.add_argument("--only", choices=("hear", "xares", "s3prl"), help="one harness instead of all")
    options = parser.parse_args()
    names = [options.only] if options.only else ["hear", "xares", "s3prl"]
    for name in names:
        shutil.rmtree(BUILD / name, ignore_errors=True)
        (BUILD / f"{name}.log").unlink(missing_ok=True)
        (BUILD / name).mkdir(parents=True)
    encoder = load_encoder(options.export)
    torch.manual_seed(0)
    save_encoder(BUILD / "untrained", encoder.student.build(), encoder.student)
    export, untrained = str(options.export.resolve()), str(BUILD / "untrained")
    models = {"export": export, "export_all": f"{export}#all", "untrained": untrained, "logmel": ""}
    run = {"hear": partial(hear, options.corpus), "xares": partial(xares, options.corpus), "s3prl": s3prl}
    file = BUILD / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        results[name] = run[name](models)
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
