"""What the report measures and says: against direct computation, and on constructed numbers."""

import dataclasses

import pytest
import torch
from helpers import hook_count, make, parity
from report_helpers import hostile_model, numbered

from tl_looped import InputError
from tl_looped.engine.schedule import CORE
from tl_looped.lens.measures import kl_divergence
from tl_looped.report import Prompt, built_in, collect, report_page
from tl_looped.report import data as data_module
from tl_looped.report.data import choose_attention, spread
from tl_looped.report.words import answer_in_words, convergence_in_words, model_in_words
from tl_looped.training.variable_chains import solve

# Numbers.


@pytest.mark.parametrize("family", ["huginn", "ouro-gqa", "retrofit-llama"])
def test_numbers_equal_direct_computation(family: str):
    model, n_loops = parity(family), 3
    ids = (5, 9, 2, 30, 7)
    (reading,) = collect(model, [numbered(*ids, answer="11")], n_loops=n_loops).readings
    tokens = torch.tensor([ids])
    _, cache = model.run_with_cache(tokens, n_loops=n_loops)
    states = [cache["state_init"][0], *cache.stack("state_post")[:, 0]]
    final = model(tokens, n_loops=n_loops)[0].softmax(-1)
    for t in range(n_loops):
        probs = model(tokens, n_loops=t + 1)[0].softmax(-1)  # a run that ends with this loop, not a read-out
        torch.testing.assert_close(reading.top_probs[t], probs.topk(5).values)
        assert torch.equal(reading.top_ids[t], probs.topk(5).indices)
        entropy = -(probs * probs.log()).sum(-1)
        torch.testing.assert_close(reading.entropy[t], entropy, atol=1e-5, rtol=1e-4)
        kl = (final * (final / probs).log()).sum(-1)
        torch.testing.assert_close(reading.kl_to_final[t], kl, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reading.answer_prob[t], probs[-1, 11])
        assert reading.answer_rank[t] == probs[-1].argsort(descending=True).tolist().index(11)
        step = (states[t + 1] - states[t]).norm(dim=-1) / states[t + 1].norm(dim=-1)
        torch.testing.assert_close(reading.step[t], step)
        torch.testing.assert_close(reading.cosine[t], torch.cosine_similarity(states[t + 1], states[t], dim=-1))
    assert float(reading.kl_to_final[-1].abs().max()) == 0


def test_attention_is_that_of_every_layer_and_loop():
    model = hostile_model(n_core=3)
    (reading,) = collect(model, [numbered(1, 2, 3, 4)]).readings
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3, 4]]), names_filter=lambda name: "pattern" in name)
    assert [layer.name for layer in reading.attention] == [
        "prelude layer 0", "core layer 0", "core layer 1", "core layer 2", "coda layer 0",
    ]  # fmt: skip
    for layer in reading.attention:
        if layer.stack == CORE:
            assert layer.loops == (0, 1, 2, 3)
            assert torch.equal(layer.pattern, cache.stack("pattern", layer.layer)[:, 0])
        else:
            assert layer.loops == (None,)
            assert torch.equal(layer.pattern[0], cache[f"{layer.stack}.pattern", 0][0])
    assert reading.attention_note == ""


def test_what_was_run_is_recorded():
    model = parity("huginn")
    data = collect(model, [numbered(1, 2), numbered(3)], n_loops=2, seed=4, name="mine")
    assert (data.model_name, data.n_loops, data.seed, len(data.readings)) == ("mine", 2, 4, 2)
    assert [reading.initial_state for reading in data.readings] == ["seed 4", "seed 4"]
    assert data.n_parameters == sum(weight.numel() for weight in model.parameters())
    assert hook_count(model) == 0


def test_a_drawn_state_has_a_seed_and_it_matters():
    model = parity("huginn")
    default, again, other = (collect(model, [numbered(1, 2, 3)], seed=seed) for seed in (None, 0, 1))
    assert default.seed == 0
    assert torch.equal(default.readings[0].step, again.readings[0].step)
    assert not torch.equal(default.readings[0].step, other.readings[0].step)
    assert collect(parity("ouro"), [numbered(1)]).seed is None


def test_without_an_answer_the_final_top_token_is_tracked():
    model = hostile_model()
    (reading,) = collect(model, [Prompt("The square root of 16 is")]).readings
    top = int(model("The square root of 16 is")[0, -1].argmax())
    assert (reading.answer_id, reading.prompt.answer) == (top, None)
    assert reading.answer_rank[-1] == 0
    (given,) = collect(model, [Prompt("The square root of 16 is", answer=" 4")]).readings
    assert (given.answer_id, given.answer) == (6, " 4")
    assert given.tokens == ("The", " square", " root", " of", " 16", " is")


def test_of_a_long_prompt_the_last_positions_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_module, "READ_POSITIONS", 3)
    model = hostile_model()
    long, whole = numbered(*range(9)), model(torch.arange(9)[None])[0].softmax(-1)
    (reading,) = collect(model, [long]).readings
    assert reading.first_read == 6
    assert reading.step.shape == (4, 9)
    torch.testing.assert_close(reading.top_probs[-1], whole[-3:].topk(5).values)
    assert "The first 6 positions are left out." in report_page(collect(model, [long]))


def test_too_much_attention_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_module, "PATTERN_ENTRIES", 100)
    (reading,) = collect(hostile_model(), [numbered(*range(9))]).readings
    assert reading.attention == ()
    assert "with 9 positions, the 4 heads of a layer have 324 numbers" in reading.attention_note
    monkeypatch.setattr(data_module, "PATTERN_ENTRIES", 324 * 2)
    (reading,) = collect(hostile_model(), [numbered(*range(9))]).readings
    assert "core layers 1 of 2 in loops 0, 3 of 4" in reading.attention_note


@pytest.mark.parametrize("n_core", [1, 4, 24])
@pytest.mark.parametrize("n_loops", [1, 4, 32, 128])
@pytest.mark.parametrize("n_pos", [1, 20, 400])
def test_attention_stays_within_its_budget(n_core: int, n_loops: int, n_pos: int):
    model = make(n_core=1)
    cfg = dataclasses.replace(model.cfg, n_core=n_core, n_prelude=2, n_coda=1)
    for entries in (10_000, 100_000, 1_000_000):
        sites, note = choose_attention(cfg, n_loops, n_pos, entries)
        kept = sum(len(loops) for loops in sites.values())
        assert kept * cfg.n_heads * n_pos**2 <= entries
        whole = kept == n_core * n_loops + 3
        assert (note == "") == whole
        core = {layer: loops for (stack, layer), loops in sites.items() if stack == CORE}
        assert all(loops[-1] == n_loops - 1 for loops in core.values())
        assert not core or max(core) == n_core - 1


@pytest.mark.parametrize("size", [1, 2, 7, 128])
@pytest.mark.parametrize("most", [1, 2, 5, 200])
def test_spread(size: int, most: int):
    indices = spread(size, most)
    assert len(indices) == len(set(indices)) == min(size, most)
    assert indices == sorted(indices)
    assert indices[-1] == size - 1
    assert most == 1 or indices[0] == 0


def test_kl_divergence():
    p, q = torch.randn(2, 3, 7).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert torch.equal(kl_divergence(p, p), torch.zeros(3))


# Prompts.


@pytest.mark.parametrize("name", ["looped-hops", "looped-hops-settling"])
def test_built_in_chains_have_the_answers_that_following_them_gives(name: str):
    prompts = built_in(name)
    chains = [[*path, answer] for answer, path in (solve(prompt.name) for prompt in prompts)]
    assert [chain[-1] for chain in chains] == [prompt.answer for prompt in prompts]
    assert [len(chain) - 1 for chain in chains] == [1, 3, 5]
    for prompt, chain in zip(prompts, chains, strict=True):
        assert " → ".join(chain) in prompt.note
        defined = [one.strip()[0] for one in prompt.name.split(";")[:-1]]
        assert len(defined) == len(set(defined))
        values = [one.strip()[2] for one in prompt.name.split(";")[:-1]]
        assert sum(value.isdigit() for value in values) == 3  # three chains
        for place, value in enumerate(values):  # in order: a variable is defined before it is read
            assert value.isdigit() or value in defined[:place]


def test_other_models_read_the_illustrations_of_the_paper():
    assert [prompt.name for prompt in built_in("ByteDance/Ouro-1.4B")] == [
        "Hello! I've been well. I hope that you're doing well.",
        "The square root of 16 is",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is not of the form"),
        ("a=b; b=a; ? a", "goes in a circle"),
        ("b=1; ? a", "'a' has no value"),
    ],
)
def test_what_is_no_chain_can_not_be_followed(text: str, message: str):
    with pytest.raises(InputError, match=message):
        solve(text)


def test_a_prompt_is_text_or_tokens():
    with pytest.raises(InputError, match="either text or token ids"):
        Prompt()
    with pytest.raises(InputError, match="either text or token ids"):
        Prompt("a", (1,))


@pytest.mark.parametrize(
    ("family", "prompt", "message"),
    [
        ("ouro", Prompt("a=4"), "no tokenizer, so it can't read text: give token ids"),
        ("ouro", numbered(1, answer="four"), "an answer must be a token id below"),
        ("ouro", numbered(1, answer="100000"), "an answer must be a token id below"),
        ("ouro", numbered(100000), "token id 100000 is out of the vocabulary"),
        ("ouro", numbered(), "prompt 1 is empty, so there is nothing to run"),
    ],
)
def test_prompts_that_can_not_be_read(family: str, prompt: Prompt, message: str):
    ran = []
    model = parity(family)
    with model.hooks([("hook_embed", lambda x, hook: ran.append(1))]), pytest.raises(InputError, match=message):
        collect(model, [numbered(1), prompt])
    assert ran == []  # the good prompt before it was not run either


def test_a_report_needs_a_prompt():
    with pytest.raises(InputError, match="at least one prompt"):
        collect(parity("ouro"), [])


# Words.


@pytest.fixture
def reading() -> data_module.Reading:
    return collect(hostile_model(), [Prompt("The square root", answer=" 4")]).readings[0]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([0, 0, 0, 0], "is the top token after every loop, from loop 0 on"),
        ([9, 0, 0, 0], "is the top token after loop 1 and every later one"),
        ([0, 4, 0, 0], "is the top token after loop 2 and every later one"),
        ([3, 2, 2, 0], "becomes the top token only after the last loop, loop 3"),
        ([3, 0, 0, 2], "was the top token after loop 2, and lost that place"),
        ([3, 3, 3, 1234], "rank 1,234; the top token is"),
    ],
)
def test_the_answer_in_words(reading: data_module.Reading, ranks: list[int], said: str):
    words = answer_in_words(dataclasses.replace(reading, answer_rank=torch.tensor(ranks)))
    assert said in words
    assert words.startswith("“·4”")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([1.0, 0.5, 0.1, 0.05], "still moves 5% of its length in the last loop, the median position 5%."),
        ([1.0, 0.5, 0.6, 0.05], "The last position’s largest step after loop 0 was 60%, in loop 2."),
        ([1.0, 0.01, 0.02, 0.05], "That is the last position’s largest step after loop 0."),
        ([1.0, 0.1, 0.01, 0.00002], "has all but stopped: the last loop moves it by 0.002% of its length"),
        ([1.0, 0.0, 0.0, 0.0], "has all but stopped: the last loop moves it by 0% of its length"),
    ],
)
def test_convergence_in_words(reading: data_module.Reading, steps: list[float], said: str):
    words = convergence_in_words(dataclasses.replace(reading, step=torch.tensor(steps)[:, None].expand(4, 3)))
    assert said in words


def test_a_single_loop_is_not_compared_with_another():
    (reading,) = collect(hostile_model(), [numbered(1, 2)], n_loops=1).readings
    assert "largest" not in convergence_in_words(reading)
    assert "loop 1" not in answer_in_words(reading)


def test_every_choice_of_a_config_has_words():
    choices = {
        "norm_placement": ["pre", "residual_sandwich", "output_sandwich", "output"],
        "loop_norm": ["none", "each", "last"],
        "state_init": ["prelude", "zeros", "normal", "truncated_normal"],
    }
    for field, values in choices.items():
        seen = set()
        for value in values:
            data = collect(make(injection="add", **{field: value}), [numbered(1)])
            seen.add(tuple(model_in_words(data)))
        assert len(seen) == len(values)
    for injection in ("none", "add", "concat_linear"):
        assert "injection" in dict(model_in_words(collect(make(injection=injection), [numbered(1)])))
