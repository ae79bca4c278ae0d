"""The paper's measures on small trained models: do states and attention come to rest, and what do loops repeat?

    python demos/what_the_paper_measures.py                             # the embedded models and those of demos/models
    python demos/what_the_paper_measures.py MODEL ... --figures FOLDER  # others; figures as HTML, for a browser
    python demos/what_the_paper_measures.py --claims                    # claim by claim, beside random weights

Questions of six hops for the embedded models, pieces of documentation held out from training for the text models; 128
loops. A feedforward model (one loop) has stages only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch

from tl_looped import LoopedModel
from tl_looped.attention import PATTERN_DISTANCE, attention_stability
from tl_looped.claims import paper_claims
from tl_looped.dynamics import (
    COSINE_TO_END,
    DISTANCE,
    convergence_of,
    cycle,
    jacobian_spectrum,
    limits_of,
    trajectory,
)
from tl_looped.observe import observe
from tl_looped.stages import STAGE_MEASURES, align_curves
from tl_looped.training import RECIPES
from tl_looped.training.corpus import documentation
from tl_looped.training.text import check_corpus
from tl_looped.training.variable_chains import draw_contexts

LOOPS, PROMPTS, HOPS, CHARACTERS = 128, 12, 6, 150
MODELS = sorted(str(path) for path in (Path(__file__).parent / "models").glob("docs-*"))


def prompts_for(name: str, model: LoopedModel) -> list[str]:
    """What the model was made to read."""
    if name in RECIPES:
        contexts = draw_contexts(np.random.default_rng(123), PROMPTS, 16, HOPS, RECIPES[name].shuffled)
        return [contexts.text(row, int(np.argmax(contexts.hops[row] == HOPS))) for row in range(PROMPTS)]
    corpus = documentation()
    check_corpus(name, corpus)
    return [text[:CHARACTERS] for text in corpus.held_out[:PROMPTS]]


def write(figure: go.Figure, path: Path) -> None:
    """A figure as a page for a browser."""
    figure.write_html(path, config={"displayModeBar": False})


def rest(model: LoopedModel, prompts: list[str], figures: Path | None) -> None:
    """Print whether states and attention come to rest."""
    measures, kept = [DISTANCE, COSINE_TO_END, PATTERN_DISTANCE], [DISTANCE.name, COSINE_TO_END.name]
    ends = observe(model, prompts, LOOPS, measures=measures, per_token=kept)
    verdict, limits = convergence_of(ends), limits_of(ends)
    for layer in range(model.cfg.n_core):
        share, loop = verdict.converged[layer].nanmean(), verdict.loop[layer].nanquantile(0.5)
        line = f"  core layer {layer}: {share:.1%} of tokens come to rest"
        if share > 0:
            factor = verdict.rate[layer].nanquantile(0.5).exp()
            line += f", at loop {loop:.0f} (median), by a factor of {factor:.3f} a loop (median)"
        shares = ", ".join(f"{name} {value:.1%}" for name, value in limits.shares(layer).items() if value)
        print(f"{line}; limit of directions: {shares}")
    ring = cycle(model, prompts, LOOPS, progress=False)
    smallest = ring.smallest[~ring.smallest.isnan()]
    cosine = f" (smallest cosine, median over tokens: {smallest.quantile(0.5):.3f})" if len(smallest) else ""
    print(f"  fixed points of the layers: {ring.verdict()}{cosine}")
    spectrum = jacobian_spectrum(model, prompts[0], k=4)
    print(f"  spectral radius of the loop at the end of the first prompt: {spectrum.radius:.3f}")
    heads = attention_stability(model, prompts[0], LOOPS, position=-1, progress=False)
    settled = heads.heads()["settles_at"]
    never = int(settled.isna().sum())
    print(f"  heads settle at loop {settled.median():.0f} (median), {never} of {len(settled)} never; last position")
    if figures is not None:
        write(ends.plot(DISTANCE.name, "layer", log=True), figures / "convergence.html")
        write(ends.plot(PATTERN_DISTANCE.name, "layer", log=True), figures / "patterns.html")
        write(heads.plot(), figures / "attention.html")
        write(limits.plot(), figures / "limits.html")
        write(trajectory(model, prompts[0], 32).plot(), figures / "trajectory.html")


def stages(model: LoopedModel, prompts: list[str], figures: Path | None) -> None:
    """Print how alike loops are in their stages."""
    found = observe(model, prompts, measures=STAGE_MEASURES)
    for measure in STAGE_MEASURES:
        curve = found.mean(measure.name).double()
        flat = curve.flatten(1).nanmean(1) if curve.ndim > 1 else curve
        ends = ", ".join(f"{float(value):.3f}" for value in flat[[0, len(flat) // 2, -1]])
        line = f"  {measure.name}: {ends} at the first, middle and last layer call"
        n_loops = found.schedule.n_loops()
        if n_loops > 1 and model.cfg.n_core > 2:
            by_loop = found.by_loop(measure.name)
            by_loop = by_loop.flatten(2).nanmean(-1) if by_loop.ndim > 2 else by_loop
            aligned = align_curves(by_loop[0], by_loop[-1])
            correlation = f"correlate at {aligned.correlation:.2f} (p {aligned.p_permutation:.2f})"
            line += f"; first and last loop {'are flat' if np.isnan(aligned.correlation) else correlation}"
        print(line)
        if figures is not None:
            write(found.plot(measure.name, "loop" if n_loops > 1 else "depth"), figures / f"{measure.name}.html")


def claims(name: str, model: LoopedModel, prompts: list[str]) -> None:
    """Print the paper's claims with intervals and nulls; text models have a feedforward model beside them."""
    control = [other for other in MODELS if name in MODELS and Path(other).name == "docs-feedforward"]
    baseline = LoopedModel.from_pretrained(control[0], device="cpu", dtype=torch.float32) if control else None
    table = paper_claims(model, prompts, baseline=baseline).to_dataframe()
    print(table.drop(columns="words").to_string(index=False, float_format="%.3g"))


def main() -> None:
    """Run all measures on every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*RECIPES, *MODELS], help="hub ids, folders or embedded names")
    parser.add_argument("--figures", type=Path, help="a folder for figures, one folder in it for each model")
    parser.add_argument("--claims", action="store_true", help="the paper's claims in place of its measures")
    options = parser.parse_args()
    for name in options.models:
        model = LoopedModel.from_pretrained(name, device="cpu", dtype=torch.float32)
        folder = None if options.figures is None else options.figures / Path(name).name
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        print(f"\n{Path(name).name}: {model.schedule.describe()}")
        prompts = prompts_for(name, model)
        if options.claims:
            if model.cfg.n_loops > 1:
                claims(name, model, prompts)
            continue
        if model.cfg.n_loops > 1:
            rest(model, prompts, folder)
        stages(model, prompts, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
