"""Where is the query in its chain, and can its answer be steered? Probes and directions by loop, each beside a null.

    python demos/probes_and_steering.py [--prompts 1000]

Records the query's state after every loop of `looped-hops` on four-hop questions, and fits linear probes to which
variable of the chain it holds. The null shuffles the labels between prompts; a probe shared by all loops shows whether
they write a variable alike. Then the direction from all other answers to "7" is added at one loop at a time, beside
random directions of the same length. Needs scikit-learn: pip install 'tl_looped[probes]'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier

from tl_looped import LoopedModel
from tl_looped.record import Recorded, directions_of, probe, record, steering_sweep
from tl_looped.training.variable_chains import draw_contexts, solve

HOPS = 4


def draw(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Questions of four hops, and what the query passes on the way: four variables and the digit."""
    contexts = draw_contexts(np.random.default_rng(seed), count, 8, HOPS, shuffled=True)
    queries = [int(np.flatnonzero(hops == HOPS)[0]) for hops in contexts.hops]
    prompts = [contexts.text(row, query) for row, query in enumerate(queries)]
    return prompts, [[*path, answer] for answer, path in map(solve, prompts)]


def show_probes(recorded: Recorded, chains: list[list[str]]) -> None:
    """Print held-out accuracy by loop for every step of the chain."""
    print("accuracy of linear probes on held-out prompts, by loop; 95 % intervals reach 0.03 to either side at most")
    print("what the query holds      | " + "   ".join(f"loop {t}" for t in range(6)))
    order = np.random.default_rng(1).permutation(len(chains))
    for step in range(HOPS + 1):
        labels = [chain[step] for chain in chains]
        name = "the digit" if step == HOPS else f"variable {step} of the chain"
        rows = {
            name: probe(recorded, labels, estimator=RidgeClassifier()),
            "  one probe for all loops": probe(recorded, labels, by=["layer"], estimator=RidgeClassifier()),
            "  labels shuffled": probe(recorded, [labels[i] for i in order], estimator=RidgeClassifier()),
        }
        for row, found in rows.items():
            print(f"{row:25} | " + "   ".join(f"{value:6.2f}" for value in found.accuracy.flatten().tolist()))


def show_steering(model: LoopedModel, recorded: Recorded, chains: list[list[str]]) -> None:
    """Print what adding the direction to "7" at one loop does to the probability of 7 on questions not recorded."""
    seven = model.to_single_token("7")
    prompts, fresh = draw(200, seed=2)
    others = [prompt for prompt, chain in zip(prompts, fresh, strict=True) if chain[-1] != "7"][:100]

    def says_seven(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].softmax(-1)[:, seven]

    found = directions_of(recorded, [chain[-1] for chain in chains], "7")
    swept = steering_sweep(
        model,
        others,
        directions=found,
        metric=says_seven,
        strengths=[0.5, 1.0],
        draws=3,
        batch_size=100,
        progress=False,
    )
    print(f"\nprobability of 7 on {len(others)} questions with another answer: {swept.baseline.mean():.2f}")
    print("added | strength | length over the stream's | change of that probability | by random directions")
    for row in (swept.to_dataframe().round(2) + 0.0).itertuples():  # + 0.0: no "-0.00"
        null = f"{row.null_low:5.2f} to {row.null_high:.2f}"
        print(f"loop {row.loop:.0f} | {row.strength:8.1f} | {row.relative:24.2f} | {row.effect:26.2f} | {null}")


def main() -> None:
    """Record once, then probe and steer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is tiny
    model = LoopedModel.from_pretrained("looped-hops", device="cpu")
    prompts, chains = draw(options.prompts, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record"
        recorded = record(model, prompts, sites="state_post", positions="last", out=out, batch_size=100, progress=False)
        print(recorded, "\n")
        show_probes(recorded, chains)
        show_steering(model, recorded, chains)


if __name__ == "__main__":
    main()
