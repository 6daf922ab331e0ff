"""The ``spear`` command: eight stages and a few tools, each a thin call into the package."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from spear import __version__
from spear.errors import SpearError, StopRequested

OK, USER_ERROR, STOPPED = 0, 1, 3
STAGES = {
    "manifests": "audio -> checked Lhotse cuts, DATA/manifests",
    "features": "a seeded sample of frozen teacher frames, enough to fit a quantizer, DATA/features/<teacher>",
    "quantizers": "one fitted quantizer per teacher, with its card, DATA/quantizers/<teacher>",
    "tokens": "audio -> teacher -> codes in one pass, DATA/tokens/<teacher>/<corpus>/<split>",
    "shards": "audio and tokens of every cut as Lhotse Shar, DATA/shards/<corpus>",
    "pretrain": "train the student on masked log-mels; checkpoints and metrics.jsonl in EXP",
    "export": "averaged encoder as a Hugging Face folder, EXP/export",
    "evaluate": "frozen-encoder probes, scores.json and report.html, EXP/evaluate",
}
EPILOG = "exit codes: 0 done, 1 something you can fix (one line says what), 2 wrong usage, 3 stopped on a signal after saving"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    A process that an error leaves joined with others does not return but ends here, see `spear.training.process_group`.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        code = _run(options)
    except BaseException:
        if not _is_joined():
            raise
        traceback.print_exc()
        code = USER_ERROR
    finally:
        signal.signal(signal.SIGTERM, previous)
    if _is_joined():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the group's destructors would wait for the other processes
    return code


def _run(options: argparse.Namespace) -> int:
    """Exit code of a command; tells in one line what went wrong."""
    try:
        code = options.action(options)
        return OK if code is None else int(code)
    except (StopRequested, KeyboardInterrupt) as stop:
        print(f"spear: stopped: {stop or 'interrupted'}; run the same command again to go on", file=sys.stderr)
        return STOPPED
    except SpearError as error:
        print(f"spear: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(f"spear: error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return USER_ERROR


def _is_joined() -> bool:
    """Whether this process still belongs to a group of processes; torch is not imported for it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and bool(dist.is_initialized())


def _stop(number: int, _: FrameType | None) -> None:
    raise StopRequested(signal.Signals(number).name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spear", description="One encoder for speech and sound, distilled from any number of frozen teachers.", epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"spear {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in STAGES.items():
        stage = _add(commands, name, text, _run_stage, stage=name)
        stage.description = f"{text}. Run again: it resumes, or says that there is nothing to do. See docs/stages.md."
        _run_options(stage)
        if name == "tokens":
            _tokens_options(stage)
        if name == "evaluate":
            stage.set_defaults(action=_evaluate)
            stage.add_argument("--suite", metavar="NAME", help="superb, hear or mini: its tasks, as far as the corpora allow, into EXP/evaluate_NAME")
        if name == "export":
            stage.add_argument("--format", choices=("hf", "icefall", "onnx", "torch"), help="short for --set export.format=...")
    _run_options(_add(commands, "preflight", "find what would go wrong, and estimate time and disk, before hours are spent", _preflight))
    _add(commands, "doctor", "what is installed, what is missing, and what each missing thing costs", _doctor)
    _add_encoder_tools(commands)
    _add_token_tools(commands)
    _add_explore(commands)
    _add_sweep(commands)
    return parser


def _add(commands: Any, name: str, text: str, action: Callable[[argparse.Namespace], int | None], **defaults: object) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EPILOG, allow_abbrev=False)
    parser.set_defaults(action=action, **defaults)
    return parser


def _add_encoder_tools(commands: Any) -> None:
    tool = _add(commands, "import", "released SPEAR folder or icefall checkpoint -> export folder", _import)
    tool.add_argument("src", type=Path, metavar="SRC", help="folder in the Hugging Face layout, Hugging Face id, or an icefall .pt checkpoint")
    tool.add_argument("out", type=Path, metavar="OUT", help="export folder to write")
    tool.add_argument("--weights", choices=("model", "model_avg"), help="of an icefall checkpoint; default: model where it is there")
    tool.add_argument("--keep-heads", action="store_true", help="keep the training heads in OUT/heads.safetensors instead of dropping them")
    _run_options(_add(commands, "finetune", "an encoder and a head on labelled cuts: export, scores.json and report.md in EXP", _finetune))
    tool = _add(commands, "sherpa", "fine-tuned CTC model -> files for sherpa-onnx, OUT", _sherpa)
    tool.add_argument("export", type=Path, metavar="EXPORT", help="EXP/export of `spear finetune` with a task of type ctc")
    tool.add_argument("out", type=Path, metavar="OUT", help="folder for model.onnx, model_int8.onnx and tokens.txt")
    tool = _add(commands, "push", "export folder -> Hugging Face hub, with checksums and licence", _push)
    tool.add_argument("export", type=Path, metavar="EXPORT", help="folder of `spear export`, `spear import` or `spear finetune`")
    tool.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub; made where it is not there")
    tool.add_argument("--dry-run", type=Path, metavar="DIR", help="write there what would be sent, and send nothing")
    tool.add_argument("--licence-file", type=Path, metavar="FILE", help="text of the weights' licence, sent as LICENSE")
    tool.add_argument("--private", action="store_true", help="make a new repository private")
    tool.add_argument("--force", action="store_true", help="send weights whose card names no licence")
    tool = _add(commands, "encode", "features of audio files, one .npz each; of folders and manifests, in batches", _encode)
    tool.add_argument("export", metavar="EXPORT", help="export folder or Hugging Face id")
    _audio_options(tool)
    tool.add_argument("--format", choices=("npz", "parquet", "shar"), default="npz", help="of folders and manifests (.jsonl.gz); default: npz")
    tool.add_argument("--batch", type=float, default=120.0, metavar="S", help="seconds of audio at a time, of folders and manifests; default: 120")
    tool.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of folders and manifests; default: a GPU where there is one")
    tool.add_argument(
        "--layer", default="last", metavar="N|all|last", help="hidden state to write (0 is the first layer); default: last, the encoder's output"
    )
    tool.add_argument(
        "--window", type=float, default=30.0, metavar="S", help="seconds of a window, for recordings of more than a minute; 0: never cut; default: 30"
    )
    tool = _add(commands, "tokenize", "codes of audio files from a teacher and its quantizer, one .npz each", _tokenize)
    tool.add_argument("--recipe", type=Path, metavar="R.yaml", help="recipe that names the teacher")
    tool.add_argument("--teacher", metavar="NAME", help="name of the teacher in the recipe")
    tool.add_argument("--teacher-dir", metavar="DIR", help="teacher folder or Hugging Face id, instead of a recipe")
    tool.add_argument("--layer", type=int, metavar="N", help="hidden state of --teacher-dir; default: its last output")
    tool.add_argument("--quantizer", type=Path, required=True, metavar="DIR", help="fitted quantizer, DATA/quantizers/<teacher>")
    tool.add_argument("--data", type=Path, metavar="DIR", help="folder that a recipe's relative model paths start from")
    _audio_options(tool)


def _add_token_tools(commands: Any) -> None:
    tool = _add(commands, "inspect", "what a token store holds; its codes as text or npz", _inspect)
    tool.add_argument("folder", type=Path, metavar="FOLDER", help="token store, or a folder above several, e.g. DATA/tokens")
    tool.add_argument("--rows", type=int, default=2, metavar="N", help="cuts whose first codes are shown; default: 2")
    tool.add_argument("--out", type=Path, metavar="DIR", help="also write the codes there, one stream per codebook")
    tool.add_argument("--format", choices=("text", "npz"), default="text", help="of the files in --out; default: text")
    tool.add_argument("--dedup", action="store_true", help="merge repeated codes of a stream and write their durations in frames")
    tool = _add(commands, "convert", "codes from Lhotse Shar to a token store, or from a token store to Shar", _convert)
    tool.add_argument("src", type=Path, metavar="SRC", help="folder of Shar, e.g. DATA/shards/<corpus>/<split>, or a token store")
    tool.add_argument("out", type=Path, metavar="OUT", help="folder to write: a token store, or Shar in OUT/shar")
    tool.add_argument("--field", metavar="NAME", help="of the codes in Shar; default: the only one that `spear shards` wrote")
    tool.add_argument("--manifest", type=Path, metavar="CUTS", help="of a token store: its cuts, DATA/manifests/<corpus>_cuts_<split>.jsonl.gz")
    tool.add_argument("--cuts", type=int, default=256, metavar="N", help="cuts in a block or shard; default: 256, as `spear tokens` has it")
    tool.add_argument("--codebook-size", type=int, metavar="K", help="of codes in Shar that another program wrote")
    tool.add_argument("--first-frame", type=float, metavar="S", help="centre of their first frame in seconds")
    tool = _add(commands, "compare", "the tokenizers of several recipes on the same audio: a table and a plot", _compare)
    tool.add_argument("recipes", nargs="+", type=Path, metavar="R.yaml", help="recipe whose quantizer of the teacher is compared")
    tool.add_argument("--teacher", required=True, metavar="NAME", help="name of the teacher in the recipes")
    tool.add_argument("--add", action="append", default=[], metavar="YAML", help="another quantizer for the first recipe's teacher; repeatable")
    tool.add_argument("--corpora", type=Path, required=True, metavar="C.yaml", help="on what")
    tool.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of manifests and features")
    tool.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for compare.json, compare.md and compare.svg")
    tool.add_argument("--cuts", type=int, default=40, metavar="N", help="valid cuts whose audio is changed; default: 40")
    tool = _add(commands, "report", "one HTML page, several runs side by side", _report)
    tool.add_argument("exp", nargs="+", type=Path, metavar="EXP", help="folder of a run that was evaluated")
    tool.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write; default: EXP/evaluate/report.html for one run, ./report.html for several"
    )


def _add_explore(commands: Any) -> None:
    tool = _add(commands, "explore", "one HTML page: a map of a folder of audio as an encoder hears it, to look at and listen to", _explore)
    tool.add_argument("export", metavar="EXPORT", help="export folder or Hugging Face id")
    tool.add_argument("audio", type=Path, metavar="AUDIO_DIR", help="folder with audio files, in it or below it")
    tool.add_argument("--out", type=Path, default=Path("explore.html"), metavar="FILE", help="page to write; default: ./explore.html")
    tool.add_argument("--max-clips", type=int, default=300, metavar="N", help="clips on the map; of more files, evenly spaced ones; default: 300")
    tool.add_argument("--max-mb", type=float, default=40.0, metavar="MB", help="sound in the page; default: 40")
    tool.add_argument("--method", choices=("tsne", "pca"), default="tsne", help="how clips are placed; default: tsne")
    tool.add_argument("--quantizer", type=Path, metavar="DIR", help="also show the tokens of this fitted quantizer, DATA/quantizers/<teacher>")
    tool.add_argument("--recipe", type=Path, metavar="R.yaml", help="recipe that names the quantizer's teacher")
    tool.add_argument("--teacher", metavar="NAME", help="name of the teacher in the recipe")
    tool.add_argument("--teacher-dir", metavar="DIR", help="teacher folder or Hugging Face id, instead of a recipe")
    tool.add_argument("--layer", type=int, metavar="N", help="hidden state of --teacher-dir; default: its last output")
    tool.add_argument("--data", type=Path, metavar="DIR", help="folder that a recipe's relative model paths start from")


def _add_sweep(commands: Any) -> None:
    tool = _add(commands, "sweep", "a recipe with a table of overrides, several seeds each; mean and deviation over seeds", _sweep)
    tool.add_argument("table", type=Path, metavar="TABLE.yaml", help="recipe, variants with their overrides, seeds; see docs/ablations.md")
    tool.add_argument("--corpora", type=Path, required=True, metavar="C.yaml", help="on what")
    tool.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of finished shards")
    tool.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the runs, sweep.json and sweep.md")
    tool.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, dealt out among the GPUs where there are any (default 1)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, metavar="R.yaml", help="what is trained")
    parser.add_argument("--corpora", type=Path, required=True, metavar="C.yaml", help="on what")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of manifests, features, quantizers, tokens, shards")
    parser.add_argument("--exp", type=Path, required=True, metavar="DIR", help="folder of this run: checkpoints, export, evaluation")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override one key of the recipe; repeatable")


def _tokens_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_tokens)
    parser.add_argument("--num-shards", type=int, default=1, metavar="M", help="machines (or jobs) that share the work; default: 1")
    parser.add_argument("--shard", type=int, default=0, metavar="K", help="which of them this is, 0 to M - 1")
    parser.add_argument("--retry-failed", action="store_true", help="make blocks in which cuts failed again, also of a finished store")


def _audio_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("audio", nargs="+", type=Path, metavar="AUDIO", help="audio file of any rate; channels are averaged")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the .npz files")


def _load(options: argparse.Namespace) -> Any:
    from spear.recipe import load_run

    overrides = list(options.overrides)
    if getattr(options, "format", None) is not None:
        overrides.append(f"export.format={options.format}")
    return load_run(options.recipe, options.corpora, options.data, options.exp, overrides)


def _run_stage(options: argparse.Namespace) -> None:
    from spear.stages import run_stage

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_stage(options.stage, _load(options))


def _tokens(options: argparse.Namespace) -> None:
    from spear.stages import run_stage

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_stage("tokens", _load(options), num_shards=options.num_shards, shard=options.shard, retry_failed=options.retry_failed)


def _evaluate(options: argparse.Namespace) -> None:
    from spear.stages import run_stage

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_stage("evaluate", _load(options), suite=options.suite)


def _preflight(options: argparse.Namespace) -> int:
    from spear.commands.preflight import preflight

    return preflight(_load(options), print)


def _doctor(_: argparse.Namespace) -> int:
    from spear.commands.doctor import doctor

    return doctor(print)


def _import(options: argparse.Namespace) -> None:
    from spear.commands.import_ import import_model

    import_model(options.src, options.out, options.weights, keep_heads=options.keep_heads)


def _finetune(options: argparse.Namespace) -> None:
    from spear.commands.finetune import finetune

    finetune(options.recipe, options.corpora, options.data, options.exp, options.overrides)


def _sherpa(options: argparse.Namespace) -> None:
    from spear.commands.sherpa import write_sherpa

    write_sherpa(options.export, options.out)


def _push(options: argparse.Namespace) -> None:
    from spear.commands.push import push

    how = {"licence_file": options.licence_file, "private": options.private, "force": options.force}
    push(options.export, options.repo, options.dry_run, print, **how)


def _encode(options: argparse.Namespace) -> None:
    from spear.commands.encode import encode_files

    layer = options.layer if options.layer in ("all", "last") else _whole("--layer", options.layer)
    if options.format != "npz" or any(path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz")) for path in options.audio):
        from spear.commands.encode_many import BulkOptions, encode_many

        how = BulkOptions(layer=layer, form=options.format, batch_s=options.batch, window_s=options.window, device=options.device)
        encode_many(options.export, options.audio, options.out, how)
        return
    encode_files(options.export, options.audio, options.out, layer, options.window)


def _tokenize(options: argparse.Namespace) -> None:
    from spear.commands.tokenize import tokenize_files

    tokenize_files(options)


def _inspect(options: argparse.Namespace) -> None:
    from spear.commands.inspect_ import inspect_tokens

    inspect_tokens(options, print)


def _convert(options: argparse.Namespace) -> None:
    from spear.commands.convert import convert_tokens

    convert_tokens(options)


def _compare(options: argparse.Namespace) -> None:
    from spear.commands.compare import compare_tokenizers

    print(compare_tokenizers(options), end="")


def _report(options: argparse.Namespace) -> None:
    from spear.commands.report import write_report

    print(write_report(options.exp, options.out))


def _explore(options: argparse.Namespace) -> None:
    from spear.commands.explore import explore

    tokenizer = None
    if options.quantizer is not None:
        from spear.commands.tokenize import tokenizer_of

        tokenizer = tokenizer_of(options)
    settings = {"max_clips": options.max_clips, "max_mb": options.max_mb, "method": options.method, "tokenizer": tokenizer}
    print(explore(options.export, options.audio, options.out, **settings))


def _sweep(options: argparse.Namespace) -> None:
    from spear.commands.sweep import sweep

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(sweep(options.table, options.corpora, options.data, options.out, options.jobs), end="")


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise SpearError(f"`{name}` must be a layer number, all or last, but is {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
