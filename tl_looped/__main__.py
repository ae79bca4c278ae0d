"""The command line: `tl-looped` or `python -m tl_looped`. What takes seconds to import waits until a command runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module

Commands = argparse._SubParsersAction  # argparse has no public name for it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when all is well; 1 when a check failed; 2 for bad input, with one line on stderr that says what is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["tl-looped", *arguments])
    from tl_looped.engine.errors import LoopedError

    try:
        return getattr(import_module("tl_looped.report.commands"), options.run)(options)
    except LoopedError as error:
        print(f"tl-looped: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-looped", description="Looped language models in TransformerLens: look inside every loop."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_report, _add_claims, _add_check, _add_convert, _add_study):
        add(commands)
    return parser


def _add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write an HTML page on how a model reads prompts, loop by loop",
        description="Write one self-contained HTML page: the model, and for every prompt the read-out after every "
        "loop, the attention in every loop, and how the state converges.",
    )
    command.add_argument(
        "--model",
        default="looped-hops",
        metavar="ID_OR_FOLDER",
        help="hub id, folder or embedded model (looped-hops)",
    )
    command.add_argument(
        "--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="what to read (built-in prompts)"
    )
    command.add_argument(
        "--tokens", nargs="+", action="extend", default=[], metavar="IDS", help="prompts as token ids, such as 1,15,2"
    )
    command.add_argument(
        "--answer",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="the token that should come next, one for each prompt in order (the model's own top token is tracked)",
    )
    command.add_argument(
        "--n-loops", type=int, metavar="N", help="loops to run (as many as the model was trained with)"
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="seed of the initial state, for models that draw one at random (0)"
    )
    command.add_argument(
        "--long-run",
        type=int,
        default=128,
        metavar="N",
        help="loops after which a state counts as its end, for convergence and limits (128)",
    )
    command.add_argument("--out", default="report.html", metavar="FILE", help="the file to write (report.html)")
    command.set_defaults(run="report")


def _add_claims(commands: Commands) -> None:
    command = commands.add_parser(
        "claims",
        help="test the claims of arXiv 2604.11791 on a model, beside random weights",
        description="Test claims 1 to 6 of arXiv 2604.11791 on a looped model: of each an effect with its interval "
        "over prompts, the same effect of models with random weights, and what that supports.",
    )
    command.add_argument("model", metavar="ID_OR_FOLDER", help="hub id, folder or embedded model")
    command.add_argument(
        "--prompts", nargs="+", required=True, metavar="TEXT_OR_FILE", help="four texts, or a file of them"
    )
    command.add_argument("--baseline", metavar="ID_OR_FOLDER", help="the feedforward model beside it")
    command.add_argument("--n-loops", type=int, default=128, metavar="N", help="loops to run (128)")
    command.add_argument("--null-seeds", type=int, default=3, metavar="N", help="models with random weights (3)")
    command.add_argument("--out", metavar="FILE.csv", help="where to write the table as well")
    command.set_defaults(run="claims_of_model")


def _add_check(commands: Commands) -> None:
    command = commands.add_parser(
        "check",
        help="check that every loop of a model can be read and written",
        description="Check that every site fires as the schedule says, that patterns sum to one, that edits change the "
        "output, and that runs can be stopped, started and read out. Exits with 1 when a check fails.",
    )
    command.add_argument("model", metavar="ID_OR_FOLDER", help="hub id, folder or embedded model")
    command.set_defaults(run="check_model")


def _add_convert(commands: Commands) -> None:
    command = commands.add_parser(
        "convert",
        help="turn a pickled checkpoint of a training run into a folder that loads",
        description="Turn a pickled checkpoint (.pt, .pth, .bin, .ckpt) into a folder of safetensors and config.json. "
        "It is read in a process of its own, with torch's weights-only reading, which refuses all but tensors.",
    )
    command.add_argument("source", metavar="FILE_OR_FOLDER", help="the checkpoint, or the folder that it is in")
    command.add_argument("out", metavar="NEW_FOLDER", help="the folder to make")
    command.add_argument("--config", metavar="FILE", help="the model's config, JSON or YAML (what lies beside it)")
    command.set_defaults(run="convert_checkpoint")


def _add_study(commands: Commands) -> None:
    command = commands.add_parser(
        "study",
        help="study what kinds of looped models do before any training",
        description="Studies that need no trained model.",
    )
    studies = command.add_subparsers(title="studies", metavar="STUDY", required=True)
    one = studies.add_parser(
        "architectures",
        help="which norms have fixed points, with and without input injection",
        description="Run randomly initialised cores of three norms, with and without input injection, for many loops; "
        "write their distances to the last loop and a verdict on each as FOLDER/architectures.csv and "
        "FOLDER/architectures.html. A run that was interrupted goes on from FOLDER/architectures.safetensors.",
    )
    one.add_argument("--layers", type=int, nargs="+", default=[4, 12, 16], metavar="N", help="core sizes (4 12 16)")
    one.add_argument("--seeds", type=int, default=3, metavar="N", help="random initialisations of each kind (3)")
    one.add_argument("--n-loops", type=int, default=128, metavar="N", help="loops to run (128)")
    names = ["huginn", "fan_in", "normal"]
    one.add_argument("--init", nargs="+", default=names, choices=names, help=f"how to initialise ({' '.join(names)})")
    one.add_argument(
        "--input-scale",
        nargs="+",
        default=["own", "1"],
        metavar="RMS",
        help="how large embedding and state are; own: as initialised (own 1)",
    )
    one.add_argument("--out", default=".", metavar="FOLDER", help="where to write (the current folder)")
    one.set_defaults(run="study_untrained")


if __name__ == "__main__":
    raise SystemExit(main())
