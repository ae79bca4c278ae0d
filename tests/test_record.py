"""Recorded activations: to the bit those of a run, whatever their form, and read back in every way."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, make, noise_like, tiny
from torch import Tensor
from torch.utils.data import DataLoader

from tl_looped import HookSite, LoopedModel
from tl_looped.record import Recorded, record

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7, 7, 8], [2], [2, 7, 1, 8]]
LOOPS = 3
SITES = ["resid_post", "state_post", "pattern", "attn_scores", "embed", "v", "z"]


def make_record(model: LoopedModel, out: Path, sites: Any = SITES, prompts: Any = PROMPTS, **options: Any) -> Recorded:
    return record(model, prompts, LOOPS, sites=sites, out=out, progress=False, **options)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def alone(model: LoopedModel, prompt: list[int], names: list[str], **options: Any) -> Any:
    return model.run_with_cache(torch.tensor([prompt]), LOOPS, names_filter=names, **options)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TINY)
def test_a_record_is_the_cache_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family, dtype)
    recorded = make_record(model, tmp_path / "r", batch_size=1, shard_bytes=3000)
    assert len(list((tmp_path / "r").glob("*.safetensors"))) > 2
    names = list(recorded.places)
    assert len(names) == (4 * model.cfg.n_core + 1) * LOOPS + 1 + model.cfg.n_core * LOOPS
    for i, prompt in enumerate(PROMPTS):
        expected, read = alone(model, prompt, names), recorded.cache(model, [i])
        at = recorded.rows.query(f"prompt == {i}").index.tolist()
        assert recorded.rows.token[at].tolist() == prompt and recorded.rows.pos[at].tolist() == list(range(len(prompt)))
        for name in names:
            assert read[name].dtype == expected[name].dtype
            assert torch.equal(bits(read[name]), bits(expected[name])), name
        rows = recorded.tensor("resid_post", 1, -1, rows=at)
        assert torch.equal(bits(rows), bits(expected["resid_post", 1, LOOPS - 1][0]))
    assert torch.equal(read.run.tokens, torch.tensor([PROMPTS[-1]])) and read.run.n_loops == LOOPS
    if read.run.state is not None:
        assert torch.equal(read.run.state, expected.run.state)


def test_prompts_of_one_length_run_together_and_keep_their_places(tmp_path: Path) -> None:
    model = tiny("llama")
    recorded = make_record(model, tmp_path / "r", "state_post", batch_size=2)
    together = model.run_with_cache(torch.tensor([PROMPTS[0], PROMPTS[2]]), LOOPS, names_filter="hook_state_post")[1]
    read = recorded.cache(model, [0, 2])
    assert torch.equal(read["state_post", 1], together["state_post", 1]) and read.run.tokens.tolist() == [
        PROMPTS[0],
        PROMPTS[2],
    ]
    assert [tokens.tolist() for tokens in recorded.tokens] == PROMPTS


@pytest.mark.parametrize(("positions", "expected"), [("last", [[2], [4]]), ([0, -1], [[0, 2], [0, 4]])])
def test_some_positions(positions: Any, expected: list[list[int]], tmp_path: Path) -> None:
    model = tiny("ouro")
    prompts = PROMPTS[:2]
    options = {"positions": positions, "loops": [0, -1], "layers": [-1]}
    recorded = make_record(model, tmp_path / "r", ["resid_post", "exit_gate", "pattern"], prompts, **options)
    assert recorded.grid("resid_post").loops == (0, 2) and recorded.grid("resid_post").layers == (1,)
    assert recorded.rows.groupby("prompt").pos.apply(list).tolist() == expected
    for i, at in enumerate(expected):
        full, read = alone(model, prompts[i], list(recorded.places)), recorded.cache(model, [i])
        assert torch.equal(read["pattern", 1, 2], full["pattern", 1, 2][:, :, at])
        assert torch.equal(read["exit_gate", 2], full["exit_gate", 2][:, at])
        assert torch.equal(read["resid_post", 1, 0], full["resid_post", 1, 0][:, at])


def test_one_place_by_its_full_name_and_layers_that_run_once(tmp_path: Path) -> None:
    model = tiny("huginn")
    names = ["blocks.1.loop.2.attn.hook_z", "coda.resid_post", "prelude.0.hook_mlp_out"]
    recorded = make_record(model, tmp_path / "r", names)
    assert list(recorded.places) == [names[0], "coda.0.hook_resid_post", names[2]]
    full = alone(model, PROMPTS[1], list(recorded.places))
    assert torch.equal(recorded.cache(model, [1])["coda.resid_post", 0], full["coda.resid_post", 0])
    assert recorded.tensor("coda.resid_post", 0).shape == (16, 16)


def test_hooks_options_and_states_act(tmp_path: Path) -> None:
    model = make(**TINY["huginn"])
    prompts = torch.tensor([PROMPTS[0], PROMPTS[2]])
    state = noise_like(torch.empty(2, 3, 16))
    recorded = make_record(model, tmp_path / "state", "state_post", prompts, initial_state=state)
    full = model.run_with_cache(prompts, LOOPS, initial_state=state)[1]
    assert torch.equal(recorded.tensor("state_post", loop=1), full["state_post", 1].flatten(0, 1))
    seeded = make_record(model, tmp_path / "seed", "state_post", prompts, seed=5)
    full = model.run_with_cache(prompts, LOOPS, seed=5)[1]
    assert torch.equal(seeded.cache(model, [0, 1])["state_post", 2], full["state_post", 2])
    assert torch.equal(seeded.cache(model, [0, 1]).run.state, full.run.state)
    model.add_hook("blocks.0.loop.1.hook_mlp_out", lambda x, hook: 0 * x)
    hooked = make_record(model, tmp_path / "hook", "resid_post", prompts)
    assert torch.equal(
        hooked.tensor("resid_post", 0, 1), model.run_with_cache(prompts, LOOPS)[1]["resid_post", 0, 1].flatten(0, 1)
    )


def test_numpy_a_dataset_and_a_copy(tmp_path: Path) -> None:
    model = tiny("llama", torch.bfloat16)
    recorded = make_record(model, tmp_path / "r", ["resid_post", "state_post"])
    array = recorded.numpy("state_post", loop=1)
    assert array.dtype == np.float32
    assert torch.equal(torch.from_numpy(array), recorded.tensor("state_post", loop=1).float())
    batches = list(DataLoader(recorded, batch_size=5, num_workers=0))
    assert len(recorded) == 16 and [len(batch["pos"]) for batch in batches] == [5, 5, 5, 1]
    for name in recorded.places:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), recorded.tensor(name))
    assert torch.cat([batch["prompt"] for batch in batches]).tolist() == recorded.rows.prompt.tolist()
    assert recorded[-1]["token"] == PROMPTS[-1][-1]
    copied = Recorded.load(recorded.save(tmp_path / "copy"))
    assert torch.equal(copied.tensor("resid_post", 0, 0), recorded.tensor("resid_post", 0, 0))


def test_what_is_read_may_be_edited_and_the_file_stays(tmp_path: Path) -> None:
    recorded = make_record(tiny("llama"), tmp_path / "r", "state_post")
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    values = recorded.tensor("state_post", loop=0)
    values.zero_()
    assert bool(recorded.tensor("state_post", loop=0).any())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}


def test_table_picture_and_words(tmp_path: Path) -> None:
    recorded = make_record(tiny("llama"), tmp_path / "r", ["resid_post", "embed"])
    table = recorded.to_dataframe()
    assert table.name.tolist() == list(recorded.places) and table["shape"].tolist() == [(16,)] * 7
    assert table.loop.dropna().tolist() == [0, 1, 2] * 2 and {HookSite.parse(name).name for name in table.name}
    figure = recorded.plot("resid_post")
    rms = recorded.tensor("resid_post", 1, 2).square().mean().sqrt().item()
    assert [line.name for line in figure.data] == ["layer 0", "layer 1"] and figure.data[1].y[2] == pytest.approx(
        rms, 1e-4
    )
    assert "16 rows of 5 prompts at 7 places" in repr(recorded)
    assert "Recorded" in recorded._repr_html_()


def test_a_second_call_runs_nothing(tmp_path: Path) -> None:
    model = make()
    first = make_record(model, tmp_path / "r")
    model.transformer.forward = None  # pyright: ignore[reportAttributeAccessIssue] - a run would raise
    assert len(make_record(model, tmp_path / "r")) == len(first)


# What is refused.


def test_a_folder_of_another_call_is_refused_with_what_differs(tmp_path: Path) -> None:
    model = tiny("llama")
    make_record(model, tmp_path / "r", "state_post")
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with pytest.raises(
        ValueError, match=r"the record of another call: sites is \['state_post'\] there, \['resid_post'\]"
    ):
        make_record(model, tmp_path / "r", "resid_post")
    with pytest.raises(ValueError, match="loops is .0, 1, 2. there, .0. here.*Give another folder"):
        make_record(model, tmp_path / "r", "state_post", loops=[0])
    trained = make(**TINY["llama"])
    with torch.no_grad():
        trained.transformer.embed.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights is"):
        make_record(trained, tmp_path / "r", "state_post")
    with pytest.raises(ValueError, match="prompts is"):
        make_record(model, tmp_path / "r", "state_post", PROMPTS[:2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\): give a new folder"):
        make_record(model, tmp_path / "mine", "state_post")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}


def test_a_full_disk_is_refused_before_and_leaves_whole_files_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 2000))
        with pytest.raises(ValueError, match=r"needs 5.17kB more, and .* has 2.00kB free: record fewer"):
            make_record(model, tmp_path / "r", "state_post")
        assert not list((tmp_path / "r").glob("shard*"))
    from tl_looped.record import recording

    written: list[str] = []
    write = recording.write_whole

    def full(path: Path, content: Any) -> Path:
        written.append(path.name)
        if len(written) > 3:
            raise recording.InputError(f"{str(path)!r} can't be written: [Errno 28] No space left on device.")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "write_whole", full)
        with pytest.raises(ValueError, match="No space left on device"):
            make_record(model, tmp_path / "r", "state_post", shard_bytes=1)
    assert sorted(path.name for path in (tmp_path / "r").glob("shard*")) == written[1:3]
    with pytest.raises(ValueError, match="not finished: call record again with the same arguments"):
        Recorded.load(tmp_path / "r")
    recorded = make_record(model, tmp_path / "r", "state_post", shard_bytes=1)
    whole = make_record(model, tmp_path / "whole", "state_post", shard_bytes=1)
    assert torch.equal(recorded.tensor("state_post", loop=2), whole.tensor("state_post", loop=2))


def test_files_that_are_cut_or_gone_are_named_and_made_anew(tmp_path: Path) -> None:
    model = tiny("llama")
    recorded = make_record(model, tmp_path / "r", "state_post", shard_bytes=1)
    wanted = recorded.tensor("state_post", loop=1)
    cut, gone = tmp_path / "r" / "shard-00001.safetensors", tmp_path / "r" / "shard-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(ValueError, match="shard-00001.safetensors' has not its"):
        Recorded.load(tmp_path / "r")
    gone.unlink()
    again = make_record(model, tmp_path / "r", "state_post", shard_bytes=1)
    assert torch.equal(again.tensor("state_post", loop=1), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "resid_past"}, "there is no site 'resid_past'.*resid_post"),
        ({"sites": "coda.resid_post"}, "this model has no coda"),
        ({"sites": "exit_gate"}, "has no hook point 'hook_exit_gate'"),
        ({"sites": []}, "name at least one site"),
        ({"sites": "resid_post_grad"}, "is a gradient"),
        ({"sites": "state_post", "loops": [3]}, r"loop 3 is out of range: 3 exist"),
        ({"sites": "loop.7.hook_state_post"}, r"'loop.7.hook_state_post': loop 7 is out of range"),
        ({"sites": "resid_post", "layers": [2]}, "layer 2 is out of range"),
        ({"sites": "embed", "positions": "first"}, "positions must be 'all', 'last' or a list"),
        ({"sites": "embed", "positions": []}, "positions is empty"),
        ({"sites": "embed", "positions": [2]}, "prompt 3: position 2 is out of range: 1 exist"),
        ({"sites": "embed", "positions": [0, -1]}, "prompt 3 has 1 tokens, so .* names a position twice"),
        ({"sites": "embed", "batch_size": 0}, "batch_size must be at least 1"),
        ({"sites": "embed", "shard": 3}, "record has no argument 'shard'. Nearest: 'shard_bytes'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_wrong_input_is_refused_before_anything_is_made(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_record(make(), tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("as_a_user")
def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    recorded = make_record(model, tmp_path / "r", ["resid_post", "pattern"])
    for call, message in [
        (lambda: recorded.tensor("resid_post", 0), r"A place has loop: tensor\('resid_post', layer, loop\)"),
        (lambda: recorded.tensor("attn_out", 0, 0), "'blocks.0.loop.0.hook_attn_out' was not recorded"),
        (lambda: recorded.tensor("pattern", 0, 0), "prompts differ in length: pass rows="),
        (lambda: recorded.grid(), "several sites were recorded: pass site="),
        (lambda: recorded.cache(model, [0, 1]), "prompts of one length"),
        (lambda: recorded.cache(tiny("ouro"), [0]), "recorded from another model, which differs in"),
        (lambda: recorded[16], "row 16 is out of range"),
        (lambda: Recorded.load(tmp_path), "no folder that record wrote"),
        (lambda: recorded.save(tmp_path), "is there already"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    given = make_record(model, tmp_path / "g", "state_post", [[1, 2]], initial_state=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="the run was given initial_state, which is not kept"):
        given.cache(model, [0])
    with pytest.raises(ValueError, match="training mode"):
        make_record(make().train(), tmp_path / "t", "embed")
