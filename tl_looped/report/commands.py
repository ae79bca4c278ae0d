"""What the commands do; `tl_looped.__main__` reads their options."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_looped.adapters.convert import convert
from tl_looped.claims import paper_claims, study_architectures
from tl_looped.dynamics.limits import FEWEST_LOOPS
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.files import check_output, write_whole
from tl_looped.model import LoopedModel
from tl_looped.report.analyses import loop_analyses
from tl_looped.report.checking import check
from tl_looped.report.data import collect
from tl_looped.report.patching import chain_patching
from tl_looped.report.prompts import CHAIN_MODELS, CHAIN_TO_PATCH, Prompt, built_in
from tl_looped.report.readouts import readout_sections
from tl_looped.report.sections import report_page
from tl_looped.report.study import architectures_page


def claims_of_model(options: argparse.Namespace) -> int:
    """Run `tl-looped claims`."""
    target = None if options.out is None else check_output(options.out)
    prompts = options.prompts
    if len(prompts) == 1 and Path(prompts[0]).is_file():
        prompts = Path(prompts[0])
    baseline = None if options.baseline is None else LoopedModel.from_pretrained(options.baseline, dtype="float32")
    model = LoopedModel.from_pretrained(options.model, dtype="float32")
    found = paper_claims(model, prompts, options.n_loops, baseline=baseline, null_seeds=options.null_seeds)
    table = found.to_dataframe()
    shown = table[["claim", "effect", "value", "low", "high", "null", "verdict"]]
    print(shown.to_string(index=False, float_format="%.3g"))
    if target is not None:
        print(f"Wrote {write_whole(target, table.to_csv(index=False))}")
    return 0


def convert_checkpoint(options: argparse.Namespace) -> int:
    """Run `tl-looped convert`."""
    folder = convert(options.source, options.out, options.config)
    print(f"Wrote {folder}: LoopedModel.from_pretrained({str(folder)!r})")
    return 0


def study_untrained(options: argparse.Namespace) -> int:
    """Run `tl-looped study architectures`."""
    folder = Path(options.out)
    scales = [_scale(text) for text in options.input_scale]
    kept = folder / "architectures.safetensors"
    study = study_architectures(
        options.layers, options.seeds, options.n_loops, options.init, input_scales=scales, out=kept
    )
    contents = study.to_dataframe().to_csv(index=False), architectures_page(study, options.command)
    for name, scale in study.starts():
        inputs = "" if scale is None else f", inputs of scale {scale:g}"
        print(f"\nInitialisation {name}{inputs}\n{study.claims(name, scale).to_string(index=False)}")
    print(f"\nWhat decides\n{study.decides().to_string(index=False)}")
    for kind, content in zip(("csv", "html"), contents, strict=True):
        target = write_whole(folder / f"architectures.{kind}", content)
        print(f"Wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def _scale(text: str) -> float | None:
    try:
        return None if text == "own" else float(text)
    except ValueError as error:
        raise InputError(f"--input-scale must be own or a number above 0, got {text!r}.") from error


def report(options: argparse.Namespace) -> int:
    """Run `tl-looped report`."""
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


def check_model(options: argparse.Namespace) -> int:
    """Run `tl-looped check`."""
    results = check(LoopedModel.from_pretrained(options.model), progress=True)
    for result in results:
        print(f"{'pass' if result.passed else 'FAIL'}  {result.name}: {result.measured}")
    failed = sum(not result.passed for result in results)
    print(f"{options.model}: {len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0
