"""The command line: `tl-looped` or `python -m tl_looped`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tl_looped.claims import study_architectures
from tl_looped.claims.architectures import INITIALISATION_WORDS, LAYERS
from tl_looped.dynamics.limits import FEWEST_LOOPS
from tl_looped.dynamics.tokens import N_LOOPS
from tl_looped.engine.errors import InputError, LoopedError, check_count
from tl_looped.engine.files import check_output, write_whole
from tl_looped.model import LoopedModel
from tl_looped.report.analyses import LONG_RUN, loop_analyses
from tl_looped.report.checking import check
from tl_looped.report.data import collect
from tl_looped.report.patching import chain_patching
from tl_looped.report.prompts import CHAIN_MODELS, CHAIN_TO_PATCH, Prompt, built_in
from tl_looped.report.readouts import readout_sections
from tl_looped.report.sections import report_page
from tl_looped.report.study import architectures_page

DEFAULT_MODEL = "looped-hops"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when all is well; 1 when a check failed; 2 for bad input, with one line on stderr that says what is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["tl-looped", *arguments])
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except LoopedError as error:
        print(f"tl-looped: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-looped", description="Looped language models in TransformerLens: look inside every loop."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_report, _add_check, _add_study):
        add(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="write an HTML page on how a model reads prompts, loop by loop",
        description="Write one self-contained HTML page: the model, and for every prompt the read-out after every "
        "loop, the attention in every loop, and how the state converges.",
    )
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="ID_OR_FOLDER",
        help=f"hub id, folder or embedded model ({DEFAULT_MODEL})",
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
        default=LONG_RUN,
        metavar="N",
        help=f"loops after which a state counts as its end, for convergence and limits ({LONG_RUN})",
    )
    command.add_argument("--out", default="report.html", metavar="FILE", help="the file to write (report.html)")
    command.set_defaults(run=_report)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "check",
        help="check that every loop of a model can be read and written",
        description="Check that every site fires as the schedule says, that patterns sum to one, that edits change the "
        "output, and that runs can be stopped, started and read out. Exits with 1 when a check fails.",
    )
    command.add_argument("model", metavar="ID_OR_FOLDER", help="hub id, folder or embedded model")
    command.set_defaults(run=_check)


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
        "FOLDER/architectures.html.",
    )
    one.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), metavar="N", help="core sizes (4 12 16)")
    one.add_argument("--seeds", type=int, default=3, metavar="N", help="random initialisations of each kind (3)")
    one.add_argument("--n-loops", type=int, default=N_LOOPS, metavar="N", help=f"loops to run ({N_LOOPS})")
    names = list(INITIALISATION_WORDS)
    one.add_argument("--init", nargs="+", default=names, choices=names, help=f"how to initialise ({' '.join(names)})")
    one.add_argument("--out", default=".", metavar="FOLDER", help="where to write (the current folder)")
    one.set_defaults(run=_study_architectures)


def _study_architectures(options: argparse.Namespace) -> int:
    folder = Path(options.out)
    targets = [check_output(folder / f"architectures.{kind}") for kind in ("csv", "html")]
    study = study_architectures(options.layers, options.seeds, options.n_loops, options.init)
    contents = study.to_dataframe().to_csv(index=False), architectures_page(study, options.command)
    for name in options.init:
        print(f"\nInitialisation {name}\n{study.claims(name).to_string(index=False)}")
    for target, content in zip(targets, contents, strict=True):
        write_whole(target, content)
        print(f"Wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def _report(options: argparse.Namespace) -> int:
    # What is quick to find wrong comes first: a model may take minutes to load.
    check_count("--long-run", options.long_run, minimum=FEWEST_LOOPS)
    if options.n_loops is not None:
        check_count("--n-loops", options.n_loops)
    if options.seed is not None:
        check_count("--seed", options.seed, minimum=0)
    asked = [{"text": text} for text in options.prompt] + [{"token_ids": _ids(text)} for text in options.tokens]
    if options.answer and len(options.answer) != len(asked):
        raise InputError(
            f"{len(asked)} prompts but {len(options.answer)} answers: give one --answer for each --prompt and "
            "--tokens, in order, or none."
        )
    target = check_output(options.out)
    answers = options.answer or [None] * len(asked)
    prompts = [Prompt(**prompt, answer=answer) for prompt, answer in zip(asked, answers, strict=True)]
    model = LoopedModel.from_pretrained(options.model)
    folder = Path(options.model)
    name = folder.resolve().name if folder.is_dir() else options.model
    data = collect(model, prompts or _built_in(model, name), options.n_loops, options.seed, name, progress=True)
    chains = not prompts and name in CHAIN_MODELS
    extra = readout_sections(model, data)
    if model.cfg.n_loops > 1:
        extra += loop_analyses(model, data, options.long_run, progress=True)
    extra += [chain_patching(model, CHAIN_TO_PATCH, options.n_loops)] if chains else []
    write_whole(target, report_page(data, options.command, extra))
    print(f"Wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--tokens must be integers with commas between, such as 1,15,2, got {text!r}.") from error


def _built_in(model: LoopedModel, name: str) -> tuple[Prompt, ...]:
    prompts = built_in(model.cfg.model_name if name not in CHAIN_MODELS else name)
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't read the built-in prompts: give --tokens 1,15,2.")
    try:
        for prompt in prompts:
            model.to_tokens(prompt.name)
    except InputError as error:
        raise InputError(f"the built-in prompts do not suit this model, so give --prompt: {error}") from error
    return prompts


def _check(options: argparse.Namespace) -> int:
    results = check(LoopedModel.from_pretrained(options.model), progress=True)
    for result in results:
        print(f"{'pass' if result.passed else 'FAIL'}  {result.name}: {result.measured}")
    failed = sum(not result.passed for result in results)
    print(f"{options.model}: {len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0
