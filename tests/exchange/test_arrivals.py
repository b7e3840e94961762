"""What a group remembers of received tensors: found again where they are, and gone when they are."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch

from compactdist import codecs
from compactdist.exchange.arrivals import Arrivals
from compactdist.exchange.forward import Message
from compactdist.state import StateStore, StreamConfig, StreamEncoder, relay

CODEC = codecs.get("int4")
N = 256


class Incoming:
    """A stream from rank 1 to a site ``key``, and the arrivals of the group."""

    def __init__(self, arrivals: Arrivals, store: StateStore, key: str = "a/send") -> None:
        self.arrivals, self.site = arrivals, store.site(key)
        self.encoder = StreamEncoder(store.config, self.site.fingerprint, "sender")

    def into(self, x: torch.Tensor, *, by_size: bool = False) -> None:
        value = torch.randn(x.numel(), dtype=x.dtype)
        staged = self.encoder.stage(value, CODEC, keyframe=self.encoder.is_fresh(x.numel(), x.dtype))
        self.encoder.commit(staged)
        self.arrivals.forget(self.site, 1)
        decoded = self.site.decoder(1).decode(staged.frame, CODEC, x.numel(), x.dtype)
        x.detach().copy_(decoded.view(x.shape))
        self.arrivals.put(self.site, 1, x, staged.frame, by_size=by_size)


def setup(enabled: bool = True) -> tuple[Arrivals, StateStore]:
    return Arrivals(enabled), StateStore(StreamConfig(), "group", None)


def test_found_by_place_shape_and_strides_only():
    arrivals, store = setup()
    buffer = torch.empty(2 * N)
    x = buffer[:N].view(16, 16)
    Incoming(arrivals, store).into(x)
    found = arrivals.found(x)
    assert found is not None
    assert arrivals.found(buffer[:N].view(16, 16)) is found  # another view of the same place
    for other in (x.t(), x.view(-1), buffer[N:].view(16, 16), x.clone(), x[:8], x.view(torch.int32)):
        assert arrivals.found(other) is None


def test_the_last_one_to_write_to_a_place_and_the_last_frame_of_a_stream_count():
    arrivals, store = setup()
    x, y = torch.empty(N), torch.empty(N)
    first, second = Incoming(arrivals, store), Incoming(arrivals, store, "b/send")
    first.into(x)
    second.into(x)
    assert arrivals.found(x).stream == ("b/send", 1)
    second.into(y)
    assert arrivals.found(x) is None  # what is there is an older frame of the second stream
    assert arrivals.found(y).stream == ("b/send", 1)
    arrivals.clear("a")
    assert arrivals.found(y) is not None
    arrivals.clear("b")
    assert arrivals.found(y) is None


def test_an_arrival_goes_with_its_storage():
    arrivals, store = setup()
    x = torch.empty(N)
    incoming = Incoming(arrivals, store)
    incoming.into(x, by_size=True)
    arrivals.relayed(arrivals.found(x).stream)
    incoming.into(x, by_size=True)
    assert arrivals.kept_bytes() == {"a/send": arrivals.found(x).received.payload.nbytes}
    view = x[3:]
    del x
    assert arrivals.latest(torch.empty(N)) is not None
    del view
    assert arrivals.latest(torch.empty(N)) is None
    assert arrivals.kept_bytes() == {}
    assert not arrivals._by_address


def test_held_only_while_the_decoder_stands_still():
    arrivals, store = setup()
    x = torch.empty(N)
    incoming = Incoming(arrivals, store)
    incoming.into(x)
    arrival = arrivals.found(x)
    assert arrivals.hold(arrival, store) is arrival
    arrival.release()
    store.reset()
    assert arrivals.hold(arrival, store) is None  # of a site that was forgotten
    arrivals, store = setup()
    incoming = Incoming(arrivals, store)
    incoming.into(x)
    arrival = arrivals.found(x)
    incoming.into(torch.empty(N))
    assert arrivals.hold(arrival, store) is None


def test_another_thread_at_the_site_is_not_waited_for():
    arrivals, store = setup()
    x = torch.empty(N)
    Incoming(arrivals, store).into(x)
    arrival = arrivals.found(x)
    inside, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        with arrival.site.lock:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=occupy)
    thread.start()
    assert inside.wait(10)
    assert arrivals.hold(arrival, store) is None
    leave.set()
    thread.join()
    assert arrivals.hold(arrival, store) is arrival
    arrival.release()


def test_off_the_cpu_only_on_trust():
    """Tensors of the meta device stand in for a GPU's: their bytes cannot be compared either."""
    arrivals, store = setup()
    x = torch.empty(N, device="meta")
    Incoming(arrivals, store).into(x, by_size=True)
    assert arrivals.found(x) is None
    with arrivals.trust():
        with arrivals.trust():
            pass
        assert arrivals.found(x).stream == ("a/send", 1)
        assert arrivals.latest(x) is None  # that one is searched by its bytes
    assert arrivals.found(x) is None


def test_states_are_compared_by_what_the_host_knows_where_bytes_are_out_of_reach():
    _, store = setup()
    decoder = store.site("a").decoder(1)
    encoder, other = StreamEncoder(store.config, store.site("a").fingerprint, ""), StreamEncoder(store.config, 5, "")
    for stream in (encoder, other):
        staged = stream.stage(torch.randn(N), CODEC, keyframe=True)
        stream.commit(staged)
        if stream is encoder:
            decoder.decode(staged.frame, CODEC, N, torch.float32)
    assert not relay.same_state(other, decoder)
    assert relay.same_state(other, decoder, compare=False)
    other.start(N - 1, torch.float32, None)
    assert not relay.same_state(other, decoder, compare=False)


def test_frames_without_history_and_switched_off_groups_leave_nothing():
    arrivals, store = setup()
    incoming = Incoming(arrivals, store)
    x = torch.empty(N)
    staged = incoming.encoder.stage_stateless(torch.randn(N), CODEC, step=0, epoch=0)
    incoming.site.decoder(1).decode(staged.frame, CODEC, N, torch.float32)
    arrivals.put(incoming.site, 1, x, staged.frame)
    assert arrivals.found(x) is None
    off, store = setup(enabled=False)
    Incoming(off, store).into(x)
    assert off.found(x) is None


def test_where_bytes_are_not_compared_only_the_keyframe_that_arrived_begins_passing_on():
    """On a GPU, where an adapter vouches for tensors: a keyframe coded again makes another history."""
    arrivals, store = setup()
    x = torch.empty(N)
    Incoming(arrivals, store).into(x)
    arrival = arrivals.found(x)
    encoder = store.site("b/send").encoder(2)
    for may_begin in (False, True):
        message = Message(arrivals, encoder, x, CODEC, keyframe_expected=True, arrival=arrival, may_begin=may_begin)
        assert message.begins == message.forwards == may_begin
        staged = message.pass_on(0, 0) if may_begin else encoder.stage(x, CODEC, keyframe=True)
        message._x = SimpleNamespace(device=torch.device("cuda"))
        message.commit(staged)
        assert (encoder.relay is not None and encoder.relay.source is arrival.received.decoder) == may_begin
    assert relay.same_state(encoder, arrival.received.decoder)
