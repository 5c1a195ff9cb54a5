"""Calls from several threads at once, in forked children, and what they leave to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import select_attn_ops
from select_attn_ops import (
    paged_select_attention,
    quest_block_select_paged,
    quest_prefill_metadata,
)

NUM_KV_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 64, 16, 4, 64
CHILD_SECONDS = 60


def make_step(seed: int, batch: int = 4, repeat: int = 1) -> Callable[[], np.ndarray]:
    """Return a call of the operators on data of its own; the same bytes whenever it is called."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((NUM_KV_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), np.float32)
    tables = rng.integers(0, NUM_KV_BLOCKS, (batch, NUM_KV_BLOCKS * repeat)).astype(np.int32)
    lens = rng.integers(1, NUM_KV_BLOCKS * BLOCK_SIZE * repeat, batch).astype(np.int32)
    query = rng.standard_normal((batch, NUM_KV_HEADS * 2, HEAD_DIM), np.float32)

    def step() -> np.ndarray:
        shape = (NUM_KV_BLOCKS, 1, NUM_KV_HEADS, HEAD_DIM)
        maxblocks, minblocks = (
            np.full(shape, np.nan, np.float32),
            np.full(shape, np.nan, np.float32),
        )
        every_block = np.arange(NUM_KV_BLOCKS, dtype=np.int32)[None]
        everything = np.array([NUM_KV_BLOCKS * BLOCK_SIZE], np.int32)
        quest_prefill_metadata(keys, every_block, everything, every_block, maxblocks, minblocks)
        selected = quest_block_select_paged(
            query, maxblocks, minblocks, tables, lens, k=24, block_size=BLOCK_SIZE
        )
        attended = paged_select_attention(query, keys, keys, tables, lens, selected)
        return np.concatenate([selected.ravel(), attended.ravel().view(np.int32)])

    return step


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("same_inputs", [False, True], ids=["own-inputs", "same-inputs"])
def test_python_threads_at_once(num_threads: int, same_inputs: bool) -> None:
    select_attn_ops.set_num_threads(num_threads)
    steps = [make_step(0 if same_inputs else seed) for seed in range(4)]
    expected = [step() for step in steps]
    start = threading.Barrier(len(steps))
    wrong: list[int] = []

    def work(i: int) -> None:
        start.wait()
        for _ in range(30):
            if not np.array_equal(steps[i](), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_child(check: Callable[[], bool]) -> int:
    """Run ``check`` in a forked child and return its exit status: 0 if true, 1 if not."""
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)  # a deadlock ends as a failure
        status = 2
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child() -> None:
    select_attn_ops.set_num_threads(4)
    step = make_step(1)
    expected = step()  # the parent's pool has threads now, which the child will not have
    assert in_child(lambda: np.array_equal(step(), expected)) == 0
    assert in_child(lambda: in_child(lambda: np.array_equal(step(), expected)) == 0) == 0
    assert np.array_equal(step(), expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_while_another_thread_is_inside_a_call() -> None:
    select_attn_ops.set_num_threads(4)
    step, busy_step = make_step(2), make_step(3, batch=64, repeat=16)
    expected = step()
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            busy_step()

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        statuses = [in_child(lambda: np.array_equal(step(), expected)) for _ in range(10)]
    finally:
        done.set()
        thread.join()
    assert statuses == [0] * 10


def test_other_python_threads_run_during_a_call() -> None:
    select_attn_ops.set_num_threads(1)
    step = make_step(4, batch=64, repeat=16)
    inside, ticks = threading.Event(), 0

    def call() -> None:
        inside.set()
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            step()
        inside.clear()

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    longest, last = 0.0, time.monotonic()
    start = time.monotonic()
    step()
    one_call = time.monotonic() - start
    while inside.is_set():
        now = time.monotonic()
        longest, last, ticks = max(longest, now - last), now, ticks + 1
    thread.join()
    # Without the interpreter during a call, this loop would run between calls only.
    assert ticks > 10 * 1.0 / one_call


def test_number_of_threads() -> None:
    select_attn_ops.set_num_threads(3)
    assert select_attn_ops.get_num_threads() == 3
    step = make_step(5, batch=64, repeat=16)
    expected = step()
    for count in (1, 2, 7):
        select_attn_ops.set_num_threads(count)
        assert np.array_equal(step(), expected)


_WITH_TORCH = """
import os
import numpy as np
import torch

torch.set_num_threads(3)
torch.ones(1 << 22).exp()  # starts torch's team
query = torch.ones(2, 4, 64)
metadata = torch.randn(512, 16, 4, 64)
table = torch.arange(512, dtype=torch.int32).view(2, 256)
seq_lens = torch.full((2,), 256 * 16 * 16, dtype=torch.int32)
out = torch.empty(2, 4, 8, dtype=torch.int32)

def select(num_threads):
    import select_attn_ops
    select_attn_ops.set_num_threads(num_threads)
    out.fill_(-9)
    select_attn_ops.quest_block_select_paged_in_out(
        query, metadata, metadata, table, seq_lens, out
    )
    return out.numpy().copy()

def num_threads():
    return len(os.listdir("/proc/self/task"))

def in_child(work):
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_with_torch(code: str, **variables: str) -> str:
    """Run code after ``_WITH_TORCH`` in a process of its own and return what it prints."""
    pytest.importorskip("torch")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WITH_TORCH + code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=CHILD_SECONDS,
    ).stdout


@pytest.mark.parametrize(
    ("setting", "threads", "started"), [("", 3, 0), ("pool", 3, 2), ("", 2, 1)]
)
def test_threads_beside_torch(setting: str, threads: int, started: int) -> None:
    """Torch's team does the work if it has the right size, and no thread is started."""
    code = f"""
import select_attn_ops
expected = select(1)
before = num_threads()
assert np.array_equal(select({threads}), expected)
print(num_threads() - before)
"""
    assert run_with_torch(code, SELECT_ATTN_PARALLEL=setting) == f"{started}\n"


def test_child_forked_after_torch_before_the_first_call() -> None:
    """Torch's team is not in the child, whose own import cannot know that it ever was."""
    assert run_with_torch("print(in_child(lambda: (select(3) >= 0).all()))") == "0\n"


def test_child_forked_after_calls_on_the_team_of_torch() -> None:
    code = """
expected = select(3)
print(in_child(lambda: np.array_equal(select(3), expected)))
assert np.array_equal(select(3), expected)
"""
    assert run_with_torch(code) == "0\n"
