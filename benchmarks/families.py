"""Each family's forward against transformers' own code, with the very same weights, plain and with layers looped.

Looped: ours runs two layers three times, transformers a deeper model in which these layers stand three times. Families
whose code is not in transformers have no row: `forward.py` compares what they are made of with plain PyTorch.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from common import COLUMNS, machine, parser, print_table, race, same
from torch import nn

from tl_looped import LoopedModel

LAYERS, LOOPS, ROUNDS, POS = (2, 4), 3, 30, 64
SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 512, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "OLMo-2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 64}),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 64}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 512}),
    "ALBERT": ("AlbertConfig", "AlbertForMaskedLM", {"embedding_size": 128}),
    "HRM-Text": ("HrmTextConfig", "HrmTextForCausalLM", {"num_layers_per_stack": 3, "H_cycles": 2, "L_cycles": 2}),
}


def theirs(family: str) -> Any:
    """A model of transformers with random weights."""
    config, model, options = FAMILIES[family]
    kind = getattr(transformers, config)
    known = inspect.signature(kind.__init__).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known or "kwargs" in known}
    torch.manual_seed(0)
    return getattr(transformers, model)(kind(**{**sizes, **options})).eval()


def deeper(model: Any) -> Any:
    """The model with the looped layers in it again and again."""
    copied, (a, b) = copy.deepcopy(model), LAYERS
    base = copied.transformer if hasattr(copied, "transformer") else copied.model
    name = "h" if hasattr(base, "h") else "layers"
    layers = getattr(base, name)
    order = [*range(a), *list(range(a, b)) * LOOPS, *range(b, len(layers))]
    setattr(base, name, nn.ModuleList(copy.deepcopy(layers[i]) for i in order))
    copied.config.num_hidden_layers = len(order)
    if getattr(copied.config, "layer_types", None):
        copied.config.layer_types = [copied.config.layer_types[i] for i in order]
    return copied


def main() -> None:
    """Print the ratios."""
    options = parser(__doc__, []).parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(1, SIZES["vocab_size"], (1, POS), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(options.device)
    rows = []
    for family in FAMILIES:
        model = theirs(family).to(device=options.device, dtype=getattr(torch, options.dtype))
        cases = [("as it is", model, LoopedModel.from_model(model))]
        if cases[0][2].cfg.n_loops == 1:
            looped = LoopedModel.from_model(model, loop_layers=LAYERS, n_loops=LOOPS)
            cases.append((f"layers {LAYERS[0]} to {LAYERS[1] - 1}, {LOOPS} loops", deeper(model), looped))
        for what, their, our in cases:
            with torch.no_grad():
                same(our(tokens), their(tokens).logits)
            sides = {"tl_looped": lambda our=our: our(tokens), "transformers": lambda their=their: their(tokens)}
            result = race(sides, options.rounds or ROUNDS, options.device)
            rows.append(result.row(f"{family}, {what}", "tl_looped", "transformers"))
    print_table(f"Families, width 512, {POS} tokens ({machine(options.device)})", COLUMNS, rows)


if __name__ == "__main__":
    main()
