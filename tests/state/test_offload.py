"""State in host memory: copied as it is, in full, and only where no call needs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compactdist import codecs, kernels
from compactdist.errors import OffloadError
from compactdist.state import Offload, StateStore, StreamConfig, offloaded
from compactdist.state.offloaded import Offloaded, Queues, copy_to_device, copy_to_host
from compactdist.state.staged import Wanted

CPU = torch.device("cpu")
N = 2048
ONE = 4 * N
CODECS = [
    "binary",
    "int4",
    {"id": "int2", "scales": "token_history"},
    {"id": "lowrank", "rank": 4},
    {"id": "lowrank_int4", "rank": 4},
    "topk",
    {"id": "transform", "bits": 1.0},
    "rates",
]


def values(t: int, n: int = N) -> torch.Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    return x + 0.05 * t * torch.randn(n, generator=torch.Generator().manual_seed(50 + t))


def store_with(budget: int, config: StreamConfig | None = None) -> tuple[StateStore, list[str]]:
    moved: list[str] = []
    config = config or StreamConfig(find_layout=False, keyframe=None)
    return StateStore(config, "group 'g', rank 0", budget, "g", 0, offload=Offload(budget, moved.append)), moved


def call(store: StateStore, key: str, step: int, codec="int8", n: int = N) -> None:
    """A call of a site that encodes one tensor, as the engine makes it."""
    site = store.site(key)
    store.offload.enter(site, step, 4 * n, CPU)
    encoder = site.encoder(0)
    x = values(step, n)
    encoder.commit(encoder.stage(x, codecs.get(codec), keyframe=encoder.is_fresh(n, x.dtype)))
    store.offload.leave(site)
    store.offload.settle(site)


@pytest.fixture
def spied(monkeypatch):
    """Storages of the copies on the host that nobody may compute with; the session's tensors are looked at."""
    away: dict[int, torch.Tensor] = {}

    def to_host(tensor):
        copy = copy_to_host(tensor)
        away[copy.data_ptr()] = copy  # kept, so that no other tensor gets its address
        return copy

    monkeypatch.setattr(offloaded, "copy_to_host", to_host)
    return away


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 2, "state": "int8"},
        {"order": "auto", "state": "fp8"},
        {"order": 2, "error_feedback": False},
    ],
    ids=str,
)
def test_a_stream_goes_on_after_every_move_as_if_nothing_had_happened(codec, options, spied):
    codec = codecs.get(codec)
    if codec.needs_shared_history and options.get("error_feedback") is False:
        options = {**options, "error_feedback": True}  # such a codec works in no open loop
    config, sites = StreamConfig(**options), []
    for _ in range(2):
        store = StateStore(config, "group", None)
        sites.append(store.site("s"))
    for t in range(5):
        frames = []
        for moves, site in zip((True, False), sites, strict=True):
            encoder, decoder = site.encoder(1), site.decoder(1)
            fresh = encoder.is_fresh(N, torch.float32)
            staged = encoder.stage(values(t), codec, Wanted(step=t), keyframe=fresh)
            encoder.commit(staged)
            out = decoder.decode(staged.frame, codec, N, torch.float32, step=t)
            frames += [staged.frame.clone(), out.clone()]
            if moves:
                held = site.held_bytes
                moved = Offloaded(site.streams, Queues())
                assert moved.nbytes == held > 0, "the codecs' memory goes, too"
                there = [h for stream in site.streams for h in stream.predictor.held]
                assert all(h.data_ptr() in spied for h in there)
                moved.bring_back(Queues())
                here = [h for stream in site.streams for h in (*stream.predictor.held, *stream.codec_memory)]
                assert here
                assert not any(h.data_ptr() in spied for h in here)
        assert torch.equal(frames[0], frames[2]), t
        assert torch.equal(frames[1], frames[3]), t


def test_copies_can_be_written_to_whatever_mode_made_them():
    with torch.inference_mode():
        x = torch.arange(8.0).bfloat16()
        host = copy_to_host(x)
        back = copy_to_device(host, CPU)
    assert not host.is_inference()
    assert not back.is_inference()
    assert len({x.data_ptr(), host.data_ptr(), back.data_ptr()}) == 3
    assert torch.equal(back, x)
    assert back.dtype == x.dtype
    back.add_(1)


def test_other_requests_go_first_then_idle_sites_then_the_one_just_used():
    store, moved = store_with(4 * ONE)
    call(store, "request:one/a", 0)
    call(store, "idle", 0)
    for t in (2, 3):
        call(store, "p", t)
        call(store, "q", t)
    assert moved == []
    for key, goes in [("new", "request:one/a"), ("newer", "idle"), ("newest", "newer"), ("last", "newest")]:
        call(store, key, 3)
        assert moved.pop() == goes
        assert not moved
    call(store, "request:one/a", 1)  # p is the one that was used first, and all of them belong to another request
    assert moved == ["p"]
    assert sum(store.state_bytes().values()) == 4 * ONE
    assert store.offloaded_bytes() == dict.fromkeys(["idle", "p", "newer", "newest"], ONE)


def test_sites_used_in_turn_come_back_no_more_often_than_they_must():
    store, moved = store_with(3 * ONE)
    for t in range(9):
        for key in "abcd":
            call(store, key, t)
        assert sum(store.state_bytes().values()) <= 3 * ONE
    # the site in use has to be there, so of four at least one in three calls of the others misses; by least recent
    # use every call would
    assert len(moved) <= 9 * 4 / 3


def test_a_site_larger_than_the_budget_is_there_while_it_is_used_and_takes_all_room():
    store, moved = store_with(ONE)
    call(store, "small", 0)
    call(store, "large", 0, n=2 * N)
    assert (moved, store.state_bytes()) == (["small"], {"small": 0, "large": 2 * ONE})
    call(store, "small", 1)
    assert (moved, store.state_bytes()) == (["small", "large"], {"small": ONE, "large": 0})


def test_prepared_calls_and_sites_that_decode_keep_their_state():
    store, moved = store_with(0)
    call(store, "a", 0)
    call(store, "b", 0)
    assert moved == ["a"]
    a, b = store.site("a"), store.site("b")
    store.offload.enter(a, 1, ONE, CPU)
    store.offload.enter(b, 1, ONE, CPU)
    assert moved == ["a", "b"], "b made room for a"
    assert a.offloaded is b.offloaded is None, "a cannot go before its call has left"
    store.offload.leave(b)
    store.offload.leave(a)
    held = b.lock._is_owned  # another thread decodes
    b.lock = SimpleNamespace(acquire=lambda blocking: False)
    store.offload.settle(a)
    assert held() is False
    assert b.offloaded is None
    assert moved == ["a", "b"]


def test_what_is_reset_takes_no_room_and_what_is_under_way_still_comes_back():
    store, _ = store_with(ONE)
    for key in ("a/x", "b/x"):
        call(store, key, 0)
    site = store.site("a/x")
    assert site.offloaded_bytes == ONE
    store.reset("a")
    assert (store.offloaded_bytes(), store.state_bytes()) == ({}, {"b/x": ONE})
    store.offload.visit(site, CPU)  # a frame that had been sent before
    assert site.state_bytes == ONE
    store.offload.settle(site)
    assert store.offload._total == ONE, "only b/x counts"
    store.reset()
    assert (store.offload._total, store.offload._uses) == (0, {})


@pytest.mark.parametrize("which", ["copy_to_host", "copy_to_device"])
def test_a_copy_that_fails_half_way_changes_nothing(which, monkeypatch):
    config = StreamConfig(order=2, find_layout=False)
    store, _ = store_with(2 * ONE, config)
    call(store, "a", 0)
    if which == "copy_to_device":
        call(store, "b", 0)
    site = store.site("a")
    before, total = [h.clone() for h in site.encoder(0).predictor.held], store.offload._total
    good, count = getattr(offloaded, which), []

    def fails(*args):
        count.append(1)
        if len(count) % 2 == 0:
            raise RuntimeError("out of memory")
        return good(*args)

    with monkeypatch.context() as patch:
        patch.setattr(offloaded, which, fails)
        with pytest.raises(OffloadError, match=r"group 'g', rank 0, site 'a': .* 16384 bytes of its state") as info:
            store.offload.enter(store.site("c" if which == "copy_to_host" else "a"), 1, 2 * ONE, CPU)
    assert "out of memory" in str(info.value)
    assert "state_budget_bytes=16384" in str(info.value)
    assert len(count) == 2
    after = site.encoder(0).predictor.held
    assert all(map(torch.equal, before, after))
    assert site.offloaded_bytes == (0 if which == "copy_to_host" else 2 * ONE)
    assert store.offload._total <= total
    call(store, "a", 1)
    assert site.state_bytes == 2 * ONE


def test_a_cuda_graph_pins_the_sites_it_knows(monkeypatch):
    store, moved = store_with(ONE)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(Queues, "enter", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(store, "a", 0)
    a = store.site("a")
    store.offload.enter(a, 1, ONE, device)
    store.offload.leave(a)
    call(store, "b", 1)
    call(store, "c", 1)
    assert moved == ["b"], "a is part of the graph"
    with pytest.raises(OffloadError, match=r"site 'b': 8192 bytes .* while a CUDA graph is captured.* is 8192"):
        store.offload.enter(store.site("b"), 2, ONE, device)
    assert store.site("b").offloaded_bytes == ONE


def test_moves_wait_for_streams_that_worked_on_the_state_and_later_ones_wait_for_the_move(monkeypatch):
    said: list[tuple[str, ...]] = []
    now = ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append((self.name, "waits for", other.name))

        def wait_event(self, event):
            said.append((self.name, "waits for the copy on", event.name))

    class Event:
        def record(self, stream):
            self.name = stream.name

        def synchronize(self):
            said.append(("the host waits for", self.name))

    monkeypatch.setattr(kernels, "queue_of", lambda device: now[0])
    monkeypatch.setattr(kernels, "stream_of", lambda queue, device: Stream(queue))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(now[0]))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    device, queues = torch.device("cuda", 0), Queues()
    for name in ("main", "side", "main"):
        now[0] = name
        queues.enter(device)
    assert not said
    queues.before_move(device)
    queues.after_move(device)
    assert said == [("main", "waits for", "side")]
    queues.wait()
    assert said.pop() == ("the host waits for", "main")
    now[0] = "side"
    queues.before_move(device)
    queues.after_move(device)
    assert said[1:] == [("side", "waits for the copy on", "main")], "the way back follows the way there"
    now[0] = "main"
    queues.enter(device)
    queues.enter(device)
    assert said[2:] == [("main", "waits for the copy on", "side")], "once"
