"""What hook points cost where nobody hooks: our forward against plain models of the same weights.

The yardstick is transformers' own Llama with our weights, against ours run as a feedforward model of one loop.
"""

from __future__ import annotations

import torch
from common import COLUMNS, SHAPES, Race, Shape, machine, make, parser, print_table, race, same
from plain import Plain
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import LoopedConfig, LoopedModel

LLAMA = Shape(
    LoopedConfig(d_model=512, n_heads=8, d_head=64, d_mlp=1376, d_vocab=8192, n_ctx=512, n_core=6, n_loops=1),
    batch=1,
    pos=64,
    rounds=30,
)


def against_plain(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int | None) -> Race:
    """Our forward, and the plain one with the same weights and the same initial state."""
    model, tokens = make(shape, device, dtype)
    plain, state, n_loops = Plain.of(model, shape.pos), model.batch(tokens).state, shape.cfg.n_loops
    given = state if shape.cfg.draws_state else None
    with torch.no_grad():
        same(model(tokens, initial_state=given), plain(tokens, n_loops, state))
    sides = {
        "tl_looped": lambda: model(tokens, initial_state=given),
        "plain PyTorch": lambda: plain(tokens, n_loops, state),
    }
    return race(sides, rounds or shape.rounds, device)


def llama_of(model: LoopedModel) -> LlamaForCausalLM:
    """Transformers' Llama with the weights of a model of one loop."""
    cfg, ours = model.cfg, model.transformer
    config = LlamaConfig(
        hidden_size=cfg.d_model, num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.d_head,
        intermediate_size=cfg.d_mlp, vocab_size=cfg.d_vocab, num_hidden_layers=cfg.n_core, rms_norm_eps=cfg.eps,
        max_position_embeddings=cfg.n_ctx, rope_theta=cfg.rotary.base, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).to(device=model.device, dtype=model.dtype).eval()
    pairs = [
        (llama.model.embed_tokens, ours.embed), (llama.model.norm, ours.ln_final), (llama.lm_head, ours.unembed),
    ]  # fmt: skip
    for theirs, block in zip(llama.model.layers, ours.blocks, strict=True):
        pairs += [(theirs.input_layernorm, block.ln1), (theirs.post_attention_layernorm, block.ln2)]
        pairs += [(getattr(theirs.self_attn, f"{name}_proj"), getattr(block.attn, name)) for name in "qkvo"]
        pairs += [(getattr(theirs.mlp, f"{name}_proj"), getattr(block.mlp, name)) for name in ("gate", "up", "down")]
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.weight.copy_(mine.weight)
    return llama


def main() -> None:
    """Print the ratios."""
    options = parser(__doc__, ["tiny", "tiny-batch", "small", "ouro-1.4b-2layers"]).parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    rows = []
    for name in options.shape:
        shape = SHAPES[name]
        result = against_plain(shape, options.device, dtype, options.rounds)
        rows.append(result.row(f"{name}: {shape.describe()}", "tl_looped", "plain PyTorch"))
    model, tokens = make(LLAMA, options.device, dtype)
    llama = llama_of(model)
    with torch.no_grad():
        same(model(tokens), llama(tokens).logits)
    result = race(
        {"tl_looped": lambda: model(tokens), "transformers": lambda: llama(tokens)},
        options.rounds or LLAMA.rounds,
        options.device,
    )
    rows.append(result.row(f"Llama: {LLAMA.describe()}", "tl_looped", "transformers"))
    print_table(f"Forward without hooks ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
