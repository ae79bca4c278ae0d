"""Tokens per second while text is generated: with and without the key-value cache, and against transformers.

The yardstick is transformers' own most-probable-token generation, with its cache, of a feedforward Llama of the same
realised depth and width. Where the looped model's layers are Llama's, the Llama has the same weights, layer by layer in
every loop, and both must write the same text; else its weights are random.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from common import SHAPES, Race, Shape, machine, make, parser, print_table, race
from forward import llama_of
from transformers import LlamaForCausalLM

from tl_looped import LoopedConfig, LoopedModel

LLAMA = Shape(
    LoopedConfig(d_model=512, n_heads=8, d_head=64, d_mlp=1376, d_vocab=8192, n_ctx=512, n_core=2, n_loops=4),
    batch=1,
    pos=64,
    rounds=3,
)
N_NEW = {"llama": 12, "tiny": 32, "tiny-batch": 16, "small": 6}  # 16 for others; more would take longer than a minute
COLUMNS = [
    "shape",
    "new tokens",
    "tokens/s",
    "without cache",
    "cache is faster by",
    "transformers",
    "our time to theirs",
]


def feedforward(model: LoopedModel) -> LlamaForCausalLM:
    """A Llama of the model's realised depth and width, with the looped layers' weights in every loop."""
    cfg, depth = model.cfg, model.schedule.depth
    plain = LoopedConfig(
        d_model=cfg.d_model, n_heads=cfg.n_heads, d_head=cfg.d_head, d_mlp=cfg.d_mlp, d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx, n_core=depth, n_loops=1, eps=cfg.eps, rotary=cfg.rotary,
    )  # fmt: skip
    flat = LoopedModel.from_config(plain, seed=0, device=model.device, dtype=model.dtype)
    if is_llama(cfg):
        ours, theirs = model.transformer, flat.transformer
        for d, block in enumerate(theirs.blocks):
            block.load_state_dict(ours.blocks[d % cfg.n_core].state_dict())
        for name in ("embed", "ln_final", "unembed"):
            getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    llama = llama_of(flat)
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    return llama


def is_llama(cfg: LoopedConfig) -> bool:
    """Whether a run of the model is one of a Llama with repeated layers."""
    return cfg == LoopedConfig(
        **{name: getattr(cfg, name) for name in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")},
        n_core=cfg.n_core, n_loops=cfg.n_loops,
    )  # fmt: skip


def measure(shape: Shape, n_new: int, device: torch.device, dtype: torch.dtype, rounds: int) -> Race:
    """All three, for the same prompt."""
    model, tokens = make(shape, device, dtype)
    llama, mask = feedforward(model), torch.ones_like(tokens)

    def ours(cache: bool) -> torch.Tensor:
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": cache}
        return model.generate(tokens, n_new, **options)

    def theirs() -> torch.Tensor:
        options = {"attention_mask": mask, "max_new_tokens": n_new, "do_sample": False, "use_cache": True}
        return llama.generate(tokens, **options)

    sides = {"cache": lambda: ours(True), "no cache": lambda: ours(False), "transformers": theirs}
    texts = {name: side() for name, side in sides.items()}
    if dtype == torch.float32:  # in less, two tokens may be equally probable
        for name in ("no cache", "transformers") if is_llama(shape.cfg) else ("no cache",):
            if not torch.equal(texts["cache"], texts[name]):
                raise AssertionError(f"{name} writes another text: a benchmark of two different things says nothing")
    return race(sides, rounds, device)


def row(name: str, shape: Shape, n_new: int, result: Race) -> list[str]:
    """Tokens per second of each, and the ratios of times in the same round: median and quartiles."""

    def speed(side: str) -> str:
        return f"{shape.batch * n_new / result.time(side):.0f}"

    def ratio(side: str, base: str) -> str:
        low, middle, high = result.ratio(side, base)
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    rates = [speed("cache"), speed("no cache"), ratio("no cache", "cache")]
    return [f"{name}: {shape.describe()}", str(n_new), *rates, speed("transformers"), ratio("cache", "transformers")]


def main() -> None:
    """Print the table."""
    options = parser(__doc__, ["tiny", "tiny-batch", "small"]).parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    shapes = {"llama": LLAMA, **{name: replace(SHAPES[name], rounds=LLAMA.rounds) for name in options.shape}}
    rows = []
    for name, shape in shapes.items():
        n_new = N_NEW.get(name, 16)
        result = measure(shape, n_new, options.device, dtype, options.rounds or shape.rounds)
        rows.append(row(name, shape, n_new, result))
    print_table(f"Generation ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
