"""The libraries that the benchmark measures beside ours: that they do the same work."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from select_attn_ops import __main__ as command_line
from select_attn_ops.bench import alternatives, peers
from select_attn_ops.bench.alternatives import (
    OtherWorkError,
    Prepare,
    SelectionProblem,
    UnavailableError,
)

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "build_peers.sh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peers, downloaded and built."""
    bash, compiler = shutil.which("bash"), shutil.which("g++")
    if bash is None or compiler is None:
        pytest.skip("there is no bash or no g++")
    folder = tmp_path_factory.mktemp("peers")
    done = subprocess.run(
        [bash, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 3:
        pytest.skip(f"no download: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def ktransformers(folder: Path) -> Prepare:
    return peers.load(folder)["ktransformers"]


def problem(
    num_blocks: list[int], rows: int, k: int, window: int = 0, dtype: torch.dtype = torch.float16
) -> SelectionProblem:
    """Requests of so many KV blocks, whose metadata blocks of `rows` rows lie in any order."""
    generator = torch.Generator().manual_seed(len(num_blocks) + rows + k)
    batch, width = len(num_blocks), -(-max(num_blocks) // rows)
    shape = (batch * width, rows, 2, 32)
    bounds = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    query = torch.randn(batch, 8, 32, generator=generator).to(dtype)
    tables = torch.randperm(batch * width, generator=generator).int().view(batch, width)
    request = torch.repeat_interleave(torch.arange(batch), torch.tensor(num_blocks))
    number = torch.cat([torch.arange(count) for count in num_blocks])
    per_row = (tables[request, number // rows].long(), number % rows, request, number)
    numbers = torch.arange(max(num_blocks))[None]
    ends = torch.tensor(num_blocks)[:, None]
    newest = (numbers >= ends - window) & (numbers < ends)
    forced = (numbers == 0) | newest if window else None
    ragged = len(set(num_blocks)) > 1
    return SelectionProblem(
        query, *bounds, tables, per_row if ragged else None, max(num_blocks), forced, k
    )


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("num_blocks", [[96], [64, 64, 64], [40, 200, 33]])
@pytest.mark.parametrize("rows", [1, 8])
def test_selects_the_same_blocks(
    ktransformers: Prepare, num_blocks: list[int], rows: int, window: int
) -> None:
    p = problem(num_blocks, rows, 16, window)
    # The mean query of ktransformers is rounded to float16; so this one is.
    mean = p.query.view(len(num_blocks), 2, 4, 32).mean(2, keepdim=True)
    p.query.view(len(num_blocks), 2, 4, 32).copy_(mean.expand(-1, -1, 4, -1))
    (call,) = ktransformers([p])
    places = (p.tables[..., None] * rows + torch.arange(rows)).flatten(1)
    expected = alternatives.select(p).flatten(1).long()
    assert torch.equal(
        call().sort(-1).values,  # type: ignore[attr-defined]
        places.gather(1, expected).view(len(num_blocks), 2, 16).sort(-1).values,
    )


@pytest.mark.parametrize(
    ("unsuitable", "message"),
    [
        (problem([16, 64], 1, 16), "it is not asked for a choice"),
        (problem([64], 1, 2, window=3), "it is not asked for a choice"),
        (object(), "only its selection is built"),
    ],
)
def test_says_what_it_cannot(ktransformers: Prepare, unsuitable: object, message: str) -> None:
    with pytest.raises(OtherWorkError, match=message):
        ktransformers([unsuitable])


def test_takes_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "PEERS", {})
    options = ["--quick", "--suite", "context", "--filter", "tokens=8k", "--dtype", "fp16", "bf16"]
    options += ["--peers", str(folder), "--json", str(tmp_path / "run.json")]
    assert command_line.main(["bench", *options]) == 0
    cases = json.loads((tmp_path / "run.json").read_text())["cases"]
    measured = [(c["operator"], c["dtype"]) for c in cases if "ktransformers" in c["alternatives"]]
    assert len(cases) == 4
    assert measured == [("quest_block_select_paged", dtype) for dtype in ("fp16", "bf16")]


def test_takes_no_tables_beyond_its_memory(ktransformers: Prepare) -> None:
    with pytest.raises(UnavailableError, match="its tables would take too much memory"):
        ktransformers([problem([20000] * 14, 1, 16)])


def test_a_peer_that_does_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ktransformers.so").write_text("no library")
    assert command_line.main(["bench", "--peers", str(tmp_path)]) == 1
    assert "ktransformers.so does not load" in capsys.readouterr().err


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["bench", "--peers", str(tmp_path)]) == 1
    assert f"error: no peer in {tmp_path}" in capsys.readouterr().err
