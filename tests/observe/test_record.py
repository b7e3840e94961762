"""``compactdist.record``: what every pattern really sends ends up in the file, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compactdist
from compactdist.observe.trace import Trace, TraceError
from tests.cli.kit import run_json
from tests.group.lifecycle.kit import gather, tensor, wrap
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

STEPS, ROWS, CHANNELS = 4, 80, 64
N = ROWS * CHANNELS


def rows_layout(info: Any) -> compactdist.Layout:
    return compactdist.Layout("(n c) -> 1 n c", c=CHANNELS)


def test_every_pattern_is_recorded_as_it_was_sent(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> Any:
        dist = wrap(layouts=rows_layout)
        peer = 1 - rank
        with compactdist.record(dist, tmp_path / "trace-{rank}.safetensors") as recording:
            for t in range(STEPS):
                dist.step()
                gather(dist, tensor(rank, t, N))
                both = torch.cat([tensor(rank + 10, t, N), tensor(rank + 20, t, N)])
                dist.all_to_all_single(torch.empty(2 * N), both)
                received = torch.empty(N)
                if rank == 0:
                    dist.send(tensor(30, t, N), peer)
                else:
                    dist.recv(received, peer)
                dist.broadcast(tensor(40 + rank, t, N), src=1)
        assert dist._engine.tap is None
        assert recording.skipped == {}
        return recording.path, recording.written

    results = run_ranks(body, 2, timeout=60)
    for rank, (path, written) in enumerate(results):
        assert path == str(tmp_path / f"trace-{rank}.safetensors")
        sent = load_file(path)
        assert {name: tuple(x.shape) for name, x in sent.items()} == written
        by_op = {name.split("/")[0].split("#")[0]: name for name in sent}
        expected = {"all_gather": rank, "all_to_all": (rank + 10, rank + 20)[1 - rank]}
        expected |= {"send": 30} if rank == 0 else {"broadcast": 41}
        assert set(by_op) == set(expected)
        for op, seed in expected.items():
            truth = torch.stack([tensor(seed, t, N).view(ROWS, CHANNELS) for t in range(STEPS)])
            assert torch.equal(sent[by_op[op]], truth), op
        assert by_op["all_to_all"].endswith(f">{1 - rank}")
        metadata = Trace(path).metadata
        assert json.loads(metadata["sites"]) == sorted(sent)
        assert metadata["codec"] == "Int4()"
        assert metadata["rank"] == f"{rank} of 2"


def test_chunks_of_a_reduction_are_recorded_by_peer(tmp_path: Path) -> None:
    """What goes to one rank in the next step is close to what went there before, and to nothing else."""

    def body(rank: int, size: int) -> Any:
        dist = wrap(policy=[compactdist.Rule("int8", op=op) for op in ("all_reduce", "reduce_scatter")])
        chunks = [[tensor(10 * rank + peer, t, N) for peer in range(size)] for t in range(STEPS)]
        with compactdist.record(dist, tmp_path / "trace-{rank}.safetensors") as recording:
            for t in range(STEPS):
                dist.step()
                whole = torch.cat(chunks[t])
                dist.reduce_scatter_tensor(torch.empty(N), whole)
                dist.all_reduce(whole)
        sent = load_file(recording.path)
        peers = [peer for peer in range(size) if peer != rank]
        for op in ("reduce_scatter", "all_reduce"):
            for peer in peers:
                truth = torch.stack([chunks[t][peer] for t in range(STEPS)])
                assert torch.equal(sent[f"{op}#0>{peer}"].reshape(STEPS, N), truth)
        assert {name for name in sent if ">" not in name} == {"all_reduce/sums#0"}

    run_ranks(body, 3, timeout=60)


def test_recording_changes_nothing(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> bool:
        taped, plain = wrap(), wrap()
        with compactdist.record(taped, tmp_path / "t{rank}.safetensors"):
            for t in range(STEPS):
                taped.step()
                plain.step()
                if not torch.equal(gather(taped, tensor(rank, t)), gather(plain, tensor(rank, t))):
                    return False
        return taped.stats().wire_bytes == plain.stats().wire_bytes

    assert run_ranks(body, 2, timeout=60) == [True, True]


def test_every_rank_writes_a_file_of_its_own(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> str:
        dist = wrap()
        with compactdist.record(dist, tmp_path / "in.a" / "trace.safetensors") as recording:
            for t in range(2):
                dist.step()
                gather(dist, tensor(rank, t, N))
        return recording.path

    paths = run_ranks(body, 2, timeout=60)
    assert paths == [str(tmp_path / "in.a" / f"trace-rank{rank}.safetensors") for rank in range(2)]
    assert [Trace(path).metadata["rank"] for path in paths] == ["0 of 2", "1 of 2"]


def test_evaluate_plays_what_was_recorded(tmp_path: Path) -> None:
    """The trace of a group without a hint gives the error that the group measured itself."""

    def body(rank: int, size: int) -> float:
        dist = wrap(codec="int2", layouts=rows_layout)
        worst = 0.0
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors"):
            for t in range(STEPS):
                dist.step()
                x = tensor(rank, t, N)
                x_hat = gather(dist, x)[rank * N : (rank + 1) * N]
                worst = max(worst, float((x_hat - x).norm() / x.norm()))
        return worst

    worst = run_ranks(body, 2, timeout=60)
    for rank in range(2):
        row = run_json("evaluate", tmp_path / f"t{rank}.safetensors", "--codec", "int2", "--json", "-")["int2"]
        assert row["worst_step_rel_error"] == pytest.approx(worst[rank], rel=1e-6)


def test_groups_are_folded_into_rows_and_named(tmp_path: Path) -> None:
    def layout(info: Any) -> compactdist.Layout:
        return compactdist.Layout("(kv h s d) -> kv s (h d)", kv=2, h=4, d=16)

    def body(rank: int, size: int) -> None:
        dist = wrap(codec="raw", layouts=layout)
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors"):
            for t in range(STEPS):
                dist.step()
                gather(dist, tensor(rank, t, N))

    run_ranks(body, 2, timeout=60)
    trace = Trace(tmp_path / "t1.safetensors")
    (site,) = trace.sites
    x = trace.load(site)
    truth = tensor(1, 2, N).view(2, 4, ROWS // 2, 16).transpose(1, 2).reshape(ROWS, 64)
    assert torch.equal(x[2], truth)
    assert trace.groups(site, ROWS) == 2


def test_without_a_hint_the_found_layout_is_used(tmp_path: Path) -> None:
    def values(t: int) -> torch.Tensor:
        scale = torch.logspace(-2, 0, 48)
        return (torch.randn(200, 48, generator=torch.Generator().manual_seed(t)) * scale).reshape(-1)

    def body(rank: int, size: int) -> Any:
        dist = wrap(codec="raw")
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors") as recording:
            for t in range(STEPS):
                dist.step()
                gather(dist, values(t))
                gather(dist, values(t)[:2001].clone())
        return recording.written

    written = run_ranks(body, 2, timeout=60)[0]
    assert written == {"all_gather#0": (STEPS, 200, 48), "all_gather#1": (STEPS, 1, 2001)}


def test_sites_steps_and_dtype_can_be_chosen(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> Any:
        dist = wrap()
        path = tmp_path / "t{rank}.safetensors"
        with compactdist.record(dist, path, sites=["*kv*"], max_steps=2, dtype=torch.float16) as recording:
            for t in range(STEPS):
                dist.step()
                for key in ("a.kv", "b.kv", "norm"):
                    with dist.key(key):
                        gather(dist, tensor(rank, t))
        return recording.written, recording.nbytes

    written, nbytes = run_ranks(body, 2, timeout=60)[0]
    assert [name.split("/")[0] for name in written] == ["a.kv", "b.kv"]
    assert all(shape[0] == 2 for shape in written.values())
    assert nbytes == 2 * 2 * 2048 * 2
    assert all(x.dtype == torch.float16 for x in load_file(tmp_path / "t0.safetensors").values())


def test_unfit_sites_are_left_out_and_reported(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> Any:
        dist = wrap()
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors", dtype=torch.float16) as recording:
            for t in range(STEPS):
                dist.step()
                for key, x in {
                    "fine": tensor(rank, t),
                    "varying": tensor(rank, t, 2048 + 64 * (t // 2)),
                    "large": 1e6 * tensor(rank, t),
                }.items():
                    with dist.key(key):
                        gather(dist, x)
        return list(recording.written), recording.skipped

    written, skipped = run_ranks(body, 2, timeout=60)[0]
    assert written == ["fine/all_gather#0"]
    assert "2112 later" in skipped["varying/all_gather#0"]
    assert "float16" in skipped["large/all_gather#0"]


def test_only_the_first_request_is_recorded(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> Any:
        dist = wrap()
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors") as recording:
            dist.reset()
            for _ in range(2):
                for t in range(STEPS):
                    dist.step()
                    gather(dist, tensor(rank, t))
                dist.reset()
        return [shape[0] for shape in recording.written.values()]

    assert run_ranks(body, 2, timeout=60)[0] == [STEPS]


def test_sites_named_by_keys_without_steps(tmp_path: Path) -> None:
    def body(rank: int, size: int) -> Any:
        dist = wrap()
        with compactdist.record(dist, tmp_path / "t{rank}.safetensors") as recording:
            for t in range(STEPS):
                with dist.key("layer"):
                    gather(dist, tensor(rank, t))
        return recording.written

    written = run_ranks(body, 2, timeout=60)[1]
    assert {name: shape[0] for name, shape in written.items()} == {"layer/all_gather#0": STEPS}


def test_importing_the_library_loads_nothing_of_the_tools() -> None:
    check = "import sys, compactdist; print(*({'safetensors', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_too_much_is_said_at_the_end_and_no_rank_hangs(tmp_path: Path) -> None:
    """Only rank 0 records; if its tap raised inside the collective, rank 1 would wait for it."""

    def body(rank: int, size: int) -> Any:
        dist = wrap()

        def loop() -> None:
            for t in range(STEPS):
                dist.step()
                gather(dist, tensor(rank, t))

        if rank == 1:
            loop()
            return None
        path = tmp_path / "t.safetensors"
        with (
            pytest.raises(TraceError, match=r"max_bytes=20000.*nothing was written"),
            compactdist.record(dist, path, max_bytes=20000) as recording,
        ):
            loop()
        assert dist._engine.tap is None
        return dist.stats().compressed_calls, recording.nbytes, Path(recording.path).exists()

    assert run_ranks(body, 2, timeout=60)[0] == (STEPS, 0, False)


def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int, size: int) -> None:
        dist = wrap()
        path = tmp_path / "t{rank}.safetensors"

        def recorded(**options: Any) -> None:
            with compactdist.record(dist, path, **options):
                gather(dist, tensor(rank))

        with pytest.raises(TraceError, match="no call was compressed"):
            recorded()
        dist.step()
        with pytest.raises(TraceError, match="matches none of 1 sites, as 'all_gather#0'"):
            recorded(sites="nothing*")
        with pytest.raises(compactdist.CompactDistError, match="max_steps"):
            recorded(max_steps=0)
        with pytest.raises(compactdist.CompactDistError, match="floating-point"):
            recorded(dtype=torch.int8)
        with pytest.raises(compactdist.CompactDistError, match="already"), compactdist.record(dist, path):
            recorded()
        with (
            pytest.raises(compactdist.CompactDistError, match=r"compactdist\.wrap"),
            compactdist.record(torch.distributed.group.WORLD, path),  # type: ignore[arg-type]
        ):
            pass
        with pytest.raises(ZeroDivisionError), compactdist.record(dist, path):
            gather(dist, tensor(rank)).reshape(1 // 0)
        assert dist._engine.tap is None
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(TraceError, match="pip install safetensors"):
            recorded()
        dist.close()

    run_ranks(body, 2, timeout=60)
    assert list(tmp_path.iterdir()) == []
