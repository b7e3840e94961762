"""Rates where only devices look at frames: what is announced there is followed, and what was measured there counts."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import codecs
from compactdist.errors import FrameError
from compactdist.kernels import use
from compactdist.state.announcements import announce
from compactdist.state.host_copy import HostCopy
from compactdist.state.rate import Choice, RateControl
from compactdist.state.target import Target
from compactdist.testing import act_like_nccl
from compactdist.wire import COEFFICIENT_PLACE
from tests.kernels.gpu import kit
from tests.kernels.gpu.test_frames import Stream
from tests.kernels.gpu.test_host_reads import TRANSFORMS
from tests.launch import run_ranks

LADDER = "rates:rungs=scalar"
"""A frame of these few elements is mostly header, which counts as bits."""
STEPS = 8


@pytest.fixture(autouse=True)
def _kernels_of_the_device():
    with use("gpu"):
        yield


class Steered(Stream):
    """Both ends of a stream with a target."""

    def __init__(self, target: str, codec: Any = LADDER, **options: Any) -> None:
        super().__init__(codec, **options)
        self.control = RateControl(Target.parse(target))
        self.encoder.steers = self.control.stream(("a site", 0))


def _play(stream: Steered, xs: list[torch.Tensor]) -> list[int]:
    """The rate of each frame; the frames go from device to device."""
    rates = []
    for step, x in enumerate(xs):
        frame = stream.send(step, x, key=stream.encoder.is_fresh(x.numel(), x.dtype))
        key = stream.decoder.is_fresh(x.numel(), x.dtype) if step else None
        value = stream.receive(step, frame, key=key)
        stream.decoder.read_announcement()
        rates.append(stream.encoder.rate_of(stream.codec))
        assert stream.decoder.rate_of(stream.codec) == rates[-1]
        assert (value.float() - x.float()).norm() < 0.5 * x.float().norm()
    stream.both_are_silent()
    assert stream.ends_are_equal()
    return rates


def _walk(stream: Steered, change: float, steps: int = STEPS) -> list[torch.Tensor]:
    x, made = torch.randn(stream.view.numel, generator=stream.generator), []
    for _ in range(steps):
        x = x + change * torch.randn(stream.view.numel, generator=stream.generator)
        made.append(x.bfloat16().to(stream.device))
    return made


@pytest.mark.parametrize(
    ("target", "codec", "change"),
    [("nmse_db=-30", LADDER, 0.1), ("bits=6.5", LADDER, 0.1), ("bits=8", TRANSFORMS, 0.1)],
)
def test_both_ends_follow_and_the_target_is_met(target, codec, change):
    stream = Steered(target, codec)
    rates = _play(stream, _walk(stream, change))
    assert len(set(rates)) > 1
    met = stream.control.met()
    assert math.isfinite(met.nmse_db)
    if stream.control.target.kind == "nmse_db":
        assert met.met < stream.control.target.value + 1


def test_what_is_measured_on_the_device_is_what_the_host_measures():
    """Of the same frames; rates are chosen one frame later than on a host, so frames are not the host's."""
    stream, made = Steered("bits=3"), []
    learn = stream.encoder.steers._learn
    stream.encoder.steers._learn = lambda measured, rate: made.append((measured, rate)) or learn(measured, rate)
    xs, values = _walk(stream, 0.1), []
    for step, x in enumerate(xs):
        values.append(stream.receive(step, stream.send(step, x)).clone())
    stream.control.met()
    assert len(made) == STEPS - 1
    for (measured, rate), x, value, before in zip(made, xs[1:], values[1:], values[:-1], strict=True):
        exact, error = x.double(), x.double() - value.double()
        assert measured.energy == pytest.approx(float(exact.square().sum()), rel=1e-5)
        assert measured.error == pytest.approx(float(error.square().sum()), rel=1e-5)
        assert measured.residual == pytest.approx(float((exact - before.double()).square().sum()), rel=1e-5)
        assert 1 <= rate <= stream.codec.rates


def test_a_keyframe_is_announced_where_the_highest_rate_would_not_do():
    """Tensors of changing signs: residuals have four times their energy, and a keyframe of three bits does better."""
    stream = Steered("nmse_db=-60", {"id": "rates", "rungs": ["binary", "int4"]}, keyframe=codecs.get("int3"))
    xs = [x * (-1) ** max(0, step - 3) for step, x in enumerate(_walk(stream, 0.01, 8))]
    kinds = []
    for step, x in enumerate(xs):
        key = stream.encoder.is_fresh(x.numel(), x.dtype)
        assert key == (step == 0 or stream.decoder.is_fresh(x.numel(), x.dtype))
        stream.receive(step, stream.send(step, x, key=key), key=key)
        stream.decoder.read_announcement()
        kinds.append(key)
    assert kinds[0]
    assert any(kinds[1:])
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize(("rate", "kind"), [(6, 0), (255, 0), (1, 2)])
def test_an_announcement_that_no_sender_makes_is_refused(rate, kind):
    stream = Steered("bits=3")
    for step in range(3):
        stream.receive(step, stream.send(step))
        stream.decoder.read_announcement()
    x, real = stream.x(), announce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compactdist.state.encoder.announce", lambda frames, *_, **__: real(frames, rate, kind))
        frame = stream.send(3, x, kept=False)
    out = torch.zeros(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
    stream.receive(3, frame, into=out)
    assert out.isnan().all()
    stream.decoder.read_announcement()
    assert stream.decoder.missed
    with pytest.raises(FrameError, match="wrong next_"):
        stream.boards[1].poll(wait=True)


def test_the_host_follows_what_a_device_announced_and_the_other_way():
    """A flagged frame, too: its device announced before it knew."""
    stream = Steered("bits=3")
    for step in range(9):
        x = stream.x()
        if step == 4:
            x[3] = math.nan
        frame = stream.send(step, x)
        try:
            stream.receive(step, frame, foreseen=step % 3 == 1)
        except compactdist.NonFiniteError:
            assert step == 4
        stream.decoder.read_announcement()
        assert stream.decoder.rate_of(stream.codec) == stream.encoder.rate_of(stream.codec)
    assert stream.ends_are_equal()


def _late(rank: int, world_size: int) -> None:
    x, out = torch.randn(768), torch.empty(768 * world_size)

    def play(group, steps: int = 4) -> compactdist.Stats:
        group.reset_stats()
        for _ in range(steps):
            with group.step():
                group.all_gather_into_tensor(out, x)
        return group.stats()

    with (
        use("gpu"),
        compactdist.wrap(act_like_nccl(dist.group.WORLD), LADDER, target="nmse_db=-26", min_numel=64) as group,
    ):
        play(group)
        counted = play(group)
        assert (counted.late_reads, counted.late_preparations) == (0, 0)  # nothing is learnt at these rungs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostCopy, "is_there", False)
            # the other rank's announcement at each call, and what was measured of this rank's own last frame; the
            # stats() before the first one have read that
            assert play(group).late_reads == 4 + 3
            assert "7 late reads" in group.explain()
        group.reset_stats()
        assert group.stats().late_reads == 0


def test_a_call_that_waits_for_an_earlier_ones_announcement_is_counted():
    run_ranks(_late, 2)


def _everything(rank: int, world_size: int, target: str) -> tuple[dict, dict]:
    with use("gpu"), compactdist.wrap(act_like_nccl(dist.group.WORLD), LADDER, target=target, min_numel=64) as group:
        generator, exact, numel = torch.Generator().manual_seed(0), torch.zeros(2, 768), 768
        for step in range(STEPS):
            changes = torch.randn(2, numel, generator=generator) * torch.tensor([[0.05], [0.5]])
            exact = exact + (20 * changes if step == 0 else changes)
            mine, other = exact[rank].clone(), exact[1 - rank]
            with group.step():
                gathered, swapped, came, sent = (torch.empty(n) for n in (2 * numel, numel, numel, numel))
                group.all_gather_into_tensor(gathered, mine)
                group.all_to_all_single(swapped, mine)
                sent.copy_(mine)
                group.broadcast(sent, 1)
                operations = ((group.send, mine), (group.recv, came))
                for call, tensor in operations if rank == 0 else operations[::-1]:
                    call(tensor, 1 - rank)
            for y, x in ((gathered, exact.view(-1)), (came, other), (sent, exact[1])):
                assert float((y - x).norm() / x.norm()) < 0.2
            half = slice(rank * numel // 2, (rank + 1) * numel // 2)
            assert float((swapped.view(2, -1)[1 - rank] - other[half]).norm() / other[half].norm()) < 0.3
        group.check()
        stats = group.stats().to_dict()
        group.reset()
        group.all_gather_into_tensor(gathered, mine)
        assert float((gathered - exact.view(-1)).norm() / exact.norm()) < 0.05
    return stats["target"], {key: site.get("rate") for key, site in stats["sites"].items()}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("target", ["nmse_db=-26", "bits=3.5"])
def test_every_collective_follows(target):
    results = run_ranks(_everything, world_size=2, args=(target,), timeout=200)
    for met, _ in results:
        value = float(target.partition("=")[2])
        assert met["met"] < value + 1 if "db" in target else met["met"] == pytest.approx(value, rel=0.15)
    if "db" in target:
        assert results[0][1] != results[1][1]


def test_a_refused_frame_stops_the_site_until_a_reset():
    """Nobody knows how large the next frame is."""

    def body(rank, world_size):
        with (
            use("gpu"),
            compactdist.wrap(act_like_nccl(dist.group.WORLD), LADDER, target="bits=3", min_numel=64) as group,
        ):
            x, out = torch.linspace(-1, 1, 768), torch.empty(2 * 768)
            for step in range(3):
                group.step()
                group.all_gather_into_tensor(out, x + 0.01 * step)
            if rank == 1:  # as if a frame had been lost
                group._engine.store.sites()[0].decoder(0).sequence += 1
            group.step()
            group.all_gather_into_tensor(out, x)
            if rank == 1:
                assert out[:768].isnan().all()
                with pytest.raises(FrameError, match="wrong sequence"):
                    group.step()
                group.step()
                with pytest.raises(FrameError, match=r"how large the next ones are .*reset\(\)"):
                    group.all_gather_into_tensor(out, x)
            group.reset()
            for _ in range(3):
                group.step()
                group.all_gather_into_tensor(out, x)
                assert (out - torch.cat([x, x])).abs().max() < 0.2
            group.check()

    run_ranks(body, world_size=2, timeout=120)


def test_a_refused_message_stops_its_site_until_a_reset():
    """On NCCL a receive of another size than is sent is undefined."""

    def body(rank, world_size):
        with (
            use("gpu"),
            compactdist.wrap(act_like_nccl(dist.group.WORLD), LADDER, target="bits=3", min_numel=64) as group,
        ):
            x, out = torch.linspace(-1, 1, 768), torch.empty(768)

            def message(step):
                group.step()
                work = group.send([x + 0.01 * step], 1) if rank == 0 else group.recv([out], 0)
                work.wait()

            for step in range(4):
                if (rank, step) == (1, 3):  # as if a frame had been lost
                    next(iter(group._engine.store.sites()[0].streams)).sequence += 1
                message(step)
            if rank == 1:
                assert out.isnan().all()
                with pytest.raises(FrameError, match="wrong sequence"):
                    group.step()
                group.step()
                with pytest.raises(FrameError, match=r"how large the next ones are .*reset\(\)"):
                    group.recv([out], 0)
            group.reset()
            for step in range(3):
                message(step)
            group.check()

    run_ranks(body, world_size=2, timeout=120)


def test_a_prediction_goes_by_the_last_coefficient_at_a_new_rate():
    """Each rate has a form of its own, whose template says what its own last frame did."""
    stream, followed = Steered("bits=6.5", order="auto"), 0
    first, change = _walk(stream, 0.3, 2)
    for step in range(STEPS):
        x = first + step**1.5 * (change - first)
        stream.encoder.steers.choose = lambda *_, rate=3 + step % 2, **__: Choice(rate)
        frame, before = stream.send(step, x), stream.decoder.rate_of(stream.codec)
        stream.receive(step, frame)
        stream.decoder.read_announcement()
        if step > 1 and stream.decoder.rate_of(stream.codec) != before:
            said = frame[COEFFICIENT_PLACE].clone().view(torch.float32)[0]
            terms = stream.decoder.predictor.terms(said)
            expected = (terms[0].float() + terms[1].float()).to(x.dtype)
            followed += bool(said != 0)
            stream.decoder.predict(made := torch.empty_like(expected))
            assert torch.equal(made, expected)
    assert followed


def test_a_target_may_be_asked_about_while_frames_are_learnt_from():
    """Both read what was measured: a frame counts once, and nobody finds the list empty."""
    stream = Steered("bits=3")
    steers, looked = stream.encoder.steers, threading.Event()

    class Late:
        def read(self):
            looked.set()
            time.sleep(0.05)
            return [1.0, 0.1, 0.01]

    steers.begin(0, 0, 100, [10, 20], 1)
    steers._awaited += [(0, Late(), 1), (0, Late(), 1)]
    asking = threading.Thread(target=stream.control.met)
    asking.start()
    looked.wait(5)
    steers.catch_up()
    learnt = len(steers.changes)
    asking.join()
    assert learnt == len(steers.changes) == 2


@pytest.mark.parametrize("steps", [True, False])
def test_sampled_errors_do_not_pile_up(steps):
    def body(rank, world_size):
        inner = act_like_nccl(dist.group.WORLD)
        with use("gpu"), compactdist.wrap(inner, "int4", sample_errors_every=1, min_numel=64) as group:
            x, out = torch.linspace(-1, 1, 768), torch.empty(2 * 768)
            for step in range(4):
                if steps:
                    group.step()
                with group.key("a layer"):
                    group.all_gather_into_tensor(out, x + 0.01 * step)
            assert len(group._engine.samples._unread) == 1
            group.reset_stats()
            assert not group._engine.samples._unread
            assert all(not math.isfinite(site.error_db or math.nan) for site in group.stats().sites.values())

    run_ranks(body, world_size=2, timeout=120)
