"""A recording that is killed at any moment ends in the same bytes; two processes never write one folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import make

from tl_looped.record import Recorded, record

# One process serves many recordings: it forks for each, as importing torch takes seconds and a recording none.
SERVER = """
import os, sys, time
import torch
torch.set_num_threads(1)
from helpers import make
from tl_looped.record import record
model = make()
prompts = [[i % 20, (3 * i) % 20, 5][: 1 + i % 3] for i in range(60)]
for line in sys.stdin:
    child = os.fork()
    if not child:
        options = {"shard_bytes": 1, "batch_size": 2, "progress": False}
        record(model, prompts, 2, sites=["resid_post", "state_post"], out=line.strip(), **options)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert server.stdin is not None and server.stdout is not None

    def start(folder: Path) -> int:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(f"{folder}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    try:
        start(tmp_path / "whole")
        begin = time.monotonic()
        assert server.stdout.readline().strip() == "0"
        whole, seconds = contents(tmp_path / "whole"), time.monotonic() - begin
        assert len(whole) == 31
        draw, killed, partial = random.Random(0), 0, set()
        for attempt in range(12):
            folder = tmp_path / f"killed{attempt % 3}"
            child = start(folder)
            time.sleep(draw.random() * 0.4 * seconds)
            os.kill(child, signal.SIGKILL)  # of our own child, which the server has not waited for yet or just did
            killed += server.stdout.readline().strip() == str(int(signal.SIGKILL))
            partial.add(len(list(folder.glob("shard*")))) if folder.exists() else None
        assert killed >= 6 and len(partial) > 2
        for folder in sorted(tmp_path.glob("killed*")):
            start(folder)
            assert server.stdout.readline().strip() == "0"
            assert contents(folder) == whole
            assert len(Recorded.load(folder)) == 120
    finally:
        server.stdin.close()
        server.wait(60)


def test_two_writers_of_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    with FileLock(tmp_path / "r" / ".lock"), pytest.raises(ValueError, match="another process records to .*/r': wait"):
        record(make(), [[1, 2]], sites="state_post", out=tmp_path / "r", progress=False)
    assert len(record(make(), [[1, 2]], sites="state_post", out=tmp_path / "r", progress=False)) == 2
