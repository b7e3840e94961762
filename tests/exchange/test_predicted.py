"""mode="predict-now": outputs hold predictions at once, histories move as if the call had waited, errors come later."""

from __future__ import annotations

import functools
import threading
import time
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import compactdist
from compactdist import Answer, Options, Rule
from compactdist.errors import ConfigError, FrameError, LateExchangeError, NonFiniteError
from compactdist.exchange.plan import Call
from compactdist.exchange.predicted import Late
from compactdist.testing import Fault, act_like_nccl, inject, remove
from compactdist.wire import HEADER_NBYTES
from tests.group.kit import NUMEL, data
from tests.launch import run_ranks
from tests.lockstep.compare import of_group

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 5
NOW = {"codec": "int4", "mode": "predict-now", "min_numel": 64}


def tensor(rank, step, dtype=torch.float32):
    """A smooth path with a turn, so that orders differ."""
    return (data(rank) + 0.3 * step * data(rank, seed=1) + 0.05 * step**2 * data(rank, seed=2)).to(dtype)


def unset(size, dtype=torch.float32):
    return torch.full((size * NUMEL,), torch.nan, dtype=dtype)


def gather(g, x, size, **how):
    out = unset(size, x.dtype)
    work = dist.all_gather_into_tensor(out, x, group=g, **how)
    return out, work


def payloads(g):
    """A list to which the group adds the payload of every frame it gathers."""
    sent, link = [], g._engine.link
    plain = link.all_gather

    def spied(self, arrived, frame, opts):
        sent.append(frame[HEADER_NBYTES:].clone())
        return plain(arrived, frame, opts)

    link.all_gather = MethodType(spied, link)
    return sent


def arrive(g, seconds=10.0):
    """Wait until what is under way has arrived, without decoding it."""
    until = time.monotonic() + seconds
    while not all(job.is_ready() for site in g._engine.store.sites() for job in site.pending):
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("like_nccl", [False, True])
def test_outputs_are_predictions_and_histories_are_those_of_waiting(like_nccl):
    def all_orders(rank, size):
        kinds = [(1, torch.float32, "exact"), (2, torch.bfloat16, "exact"), ("auto", torch.float16, "exact")]
        for order, dtype, state in [*kinds, (2, torch.float32, "int8")]:
            body(rank, size, dtype, {"order": order, "state": state})

    def body(rank, size, dtype, options):
        inner = act_like_nccl(dist.group.WORLD, delay=0.001) if like_nccl else None
        waits, now = (compactdist.wrap(inner, **NOW | options | {"mode": m}) for m in ("wait", "predict-now"))
        sent = payloads(waits), payloads(now)
        last = None
        for step in range(STEPS):
            x, peer = tensor(rank, step, dtype), 1 - rank
            waits.step(), now.step()
            decoders = [s.decoder(peer) for s in waits._engine.store.sites()]
            expected = torch.empty(x.numel(), dtype=dtype)
            if decoders:
                decoders[0].predict(expected)
            (exact, _), (out, work) = gather(waits, x, size), gather(now, x, size)
            assert work is None
            exact, out = exact.view(size, -1), out.view(size, -1)
            assert torch.equal(out[rank], exact[rank])
            if step == 0:
                assert torch.equal(out, exact)
            else:
                assert torch.equal(out[peer], expected)
                assert not torch.equal(out[peer], exact[peer])
                assert options["order"] != 1 or torch.equal(out[peer], last[peer])
            last = exact
        for one, other in zip(*sent, strict=True):
            assert torch.equal(one, other)  # nothing on the wire differs
        assert now.stats().predicted == STEPS - 1
        assert waits.stats().predicted == 0
        assert now.stats().wire_bytes == waits.stats().wire_bytes
        assert of_group(now)["sites"] == of_group(waits)["sites"]
        now.check()
        assert "pred" in now.explain()
        assert "pred" not in waits.explain()
        now.close(), waits.close()
        if inner is not None:
            remove(inner)

    run_ranks(all_orders, 2)


def test_every_form_of_an_all_gather_and_ones_own_chunk():
    def lists(g, x, size):
        outs = [torch.full((NUMEL,), torch.nan) for _ in range(size)]
        dist.all_gather(outs, x, group=g)
        return torch.cat(outs)

    def asynchronous(g, x, size):
        out, work = gather(g, x, size, async_op=True)
        now = out.clone()
        if g.stats().predicted:
            assert work.is_completed()
            assert not now.isnan().any()
        work.wait()
        assert torch.equal(work.get_future().wait()[0], out)
        return out

    def functional(g, x, size):
        return funcol.all_gather_tensor(x, 0, g) + 0

    def several(g, x, size):
        outs = [[torch.full((NUMEL,), torch.nan), torch.full((NUMEL,), torch.nan)] for _ in range(size)]
        dist.all_gather_coalesced(outs, [x, -x], group=g)
        assert all(torch.equal(a, -b) for a, b in outs) or g.options.local == "exact"
        return torch.cat([a for a, _ in outs])

    forms = (lists, asynchronous, functional, several)

    def body(rank, size):
        for local in ("reconstructed", "exact"):
            for form in forms:
                calls = 2 if form is several else 1
                g = compactdist.wrap(**NOW, local=local)
                rows = []
                for step in range(3):
                    g.step()
                    rows.append(form(g, tensor(rank, step), size).view(size, -1))
                assert torch.equal(rows[0][1 - rank], rows[1][1 - rank]), form  # the last value is the keyframe's
                assert not torch.equal(rows[1][1 - rank], rows[2][1 - rank]), form
                assert torch.equal(rows[2][rank], tensor(rank, 2)) == (local == "exact"), form
                assert g.stats().predicted == 2 * calls, form
                g.close()

    run_ranks(body, 2)


def test_what_is_under_way_is_decoded_and_written_nowhere():
    def every(rank, size):
        for ending in ("step", "reset", "close", "check", "stats", "request"):
            body(rank, size, ending)

    def body(rank, size, ending):
        g = compactdist.wrap(**NOW)
        request = g.request("one") if ending == "request" else None
        if request is not None:
            request.__enter__()
        for step in range(3):
            g.step()
            out, _ = gather(g, tensor(rank, step), size)
        out.fill_(7)
        [site] = g._engine.store.sites()
        decoder = site.decoder(1 - rank)
        assert decoder.sequence == 2
        if ending == "step":
            arrive(g)
        if request is not None:
            request.__exit__(None, None, None)
        else:
            getattr(g, ending)()
        assert decoder.sequence == 3
        assert not site.pending
        assert bool((out == 7).all())
        assert not g._engine.late._jobs
        g.close()

    run_ranks(every, 2)


def test_the_error_of_a_late_frame_is_raised_once_at_the_next_use():
    def every(rank, size):
        for at in ("use", "step", "reset", "stats"):
            body(rank, size, at)
        for at in ("reset", "stats"):
            body(rank, size, at, while_handling=True)
        body(rank, size, "close")

    def in_handler(act):
        """Act while another error is handled, which is not on its way any more."""
        try:
            raise KeyError("of the caller's own")
        except KeyError:
            act()

    def body(rank, size, at, while_handling=False):
        inner = inject(dist.group.WORLD, [Fault("flip-received", "all_gather", nth=1, byte=200)] if rank else [])
        g = compactdist.wrap(inner, **NOW)
        for step in range(2):
            g.step()
            gather(g, tensor(rank, step), size)
        arrive(g)
        if at == "use":
            g._keys._on_step = None
            g.step()
        actions = {"use": lambda: gather(g, tensor(rank, 2), size)}
        act = actions.get(at) or getattr(g, at)
        act = functools.partial(in_handler, act) if while_handling else act
        if rank == 0:
            if at != "use":  # the others' next call would not come
                act()
        else:
            with pytest.raises(
                FrameError, match=r"rank 1, site 'all_gather#0', frame from rank 0: the payload is damag"
            ):
                act()
        if at == "close":
            return
        g._keys._on_step = None
        g.reset()
        for step in range(3):
            g.step()
            gather(g, tensor(rank, step), size)
        g.check()
        g.close()
        remove(inner)

    run_ranks(every, 2)


def test_a_transport_that_fails_late_is_named():
    def body(rank, size):
        g = compactdist.wrap(inject(dist.group.WORLD, [Fault("fail-wait", "all_gather", nth=1)] if rank else []), **NOW)
        for step in range(2):
            g.step()
            gather(g, tensor(rank, step), size)
        if rank == 1:
            named = (
                r"rank 1, site 'all_gather#0': the exchange of step 1, which was answered with its prediction, failed"
            )
            assert g.stats(wait=False).compressed_calls == 2  # as a thread that watches asks: it takes no error away
            assert "all_gather#0" in g.explain(wait=False)
            with pytest.raises(LateExchangeError, match=named):
                g.stats()
        g.close()

    run_ranks(body, 2)


def test_a_tensor_that_is_not_finite():
    """Its sender is told by the call, the others by a later one; histories stay equal."""

    def body(rank, size):
        g = compactdist.wrap(**NOW)
        for step in range(5):
            g.step() if step != 3 or rank == 0 else told(g)
            x = tensor(rank, step)
            if step == 2 and rank == 0:
                x[5] = torch.nan
                with pytest.raises(NonFiniteError, match="rank 0, site 'all_gather#0'"):
                    gather(g, x, size)
            else:
                gather(g, x, size)
            arrive(g)
        g.check()
        assert g.stats().predicted == (2 if rank == 0 else 3)  # the stream restarts with a keyframe, which waits
        g.close()

    def told(g):
        with pytest.raises(NonFiniteError, match="rank 1, site 'all_gather#0', frame from rank 0"):
            g.step()
        g.step()

    run_ranks(body, 2)


def test_warm_up_and_another_size_wait():
    def body(rank, size):
        g = compactdist.wrap(**NOW, warmup_steps=2)
        for step, numel in enumerate((NUMEL, NUMEL, NUMEL, 2 * NUMEL, 2 * NUMEL)):
            g.step()
            x = torch.cat([tensor(rank, step), tensor(rank, step)])[:numel]
            out = torch.full((size * numel,), torch.nan)
            dist.all_gather_into_tensor(out, x, group=g)
            theirs = torch.cat([tensor(1 - rank, step), tensor(1 - rank, step)])[:numel]
            waited = float((out.view(size, -1)[1 - rank] - theirs).abs().max()) < 0.05
            assert waited == (step in (0, 1, 3)), step
        assert g.stats().predicted == 2
        g.close()

    run_ranks(body, 2)


def test_a_policy_names_the_sites():
    def body(rank, size):
        def by_function(call):
            return Answer("int8", "predict-now") if call.key.startswith("v/") else None

        by_rules = [Rule(None, key="v/*", op="all_gather", mode="predict-now"), Rule("int8", key="k/*")]
        all_but = Rule(None, key="k/*", mode="wait")
        for options in (
            {"policy": by_function, "mode": "wait"},
            {"policy": by_rules, "mode": "wait"},
            {"policy": all_but},
        ):
            g = compactdist.wrap(**NOW | options)
            for step in range(3):
                g.step()
                for name in ("k", "v"):
                    with g.key(name):
                        gather(g, tensor(rank, step), size)
            assert {key: s.predicted for key, s in g.stats().sites.items()} == {
                "k/all_gather#0": 0,
                "v/all_gather#0": 2,
            }
            g.close()

    run_ranks(body, 2)


def test_a_rule_for_the_mode_alone_names_no_codec_for_sums():
    def body(rank, size):
        g = compactdist.wrap(**NOW | {"mode": "wait"}, policy=Rule(None, mode="wait"))
        g.step()
        x = tensor(rank, 0)
        dist.all_reduce(x, group=g)
        assert g.stats().passed_reasons == {"not-asked": 1}
        g.close()

    run_ranks(body, 2)


def test_other_operations_wait_and_a_policy_may_not_ask_them():
    def body(rank, size):
        g = compactdist.wrap(**NOW)
        for step in range(3):
            g.step()
            out = torch.empty(NUMEL)
            dist.all_to_all_single(out, tensor(rank, step), group=g)
        assert g.stats().predicted == 0
        assert "mode='predict-now' is for all_gather; these waited" in g.explain()
        g.close()
        g = compactdist.wrap(**NOW, policy=lambda call: Answer("int8", "predict-now"))
        g.step()
        with pytest.raises(
            ConfigError, match=r"rank \d, site 'all_to_all#0': the policy returned mode='predict-now' for"
        ):
            dist.all_to_all_single(out, out.clone(), group=g)
        with pytest.raises(ConfigError, match="for send; only an all_gather can"):
            dist.send(out, 1 - rank, group=g)
        g.close()

    run_ranks(body, 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Options(mode="now"), "mode is 'wait' or 'predict-now', got 'now'"),
        (lambda: Options(mode="predict-now", order=0), "order=0 keeps none"),
        (lambda: Options(mode="predict-now", codec="raw"), r"codec Raw\(\) keeps none"),
        (lambda: Options(order=0, policy=Rule(None, op="all_gather", mode="predict-now")), "order=0 keeps none"),
        (lambda: Rule("int4", mode="predict-now"), "says op='all_gather'"),
        (lambda: Rule("int4", op="all_to_all", mode="predict-now"), "got op='all_to_all'"),
        (lambda: Rule("raw", op="all_gather", mode="predict-now"), r"codec Raw\(\) keeps none"),
        (lambda: Answer("pass", "predict-now"), "a call that passes through keeps none"),
        (lambda: Answer("int4", "later"), "got 'later'"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_ranks_compare_the_mode():
    assert Options(mode="predict-now").fingerprint() != Options().fingerprint()
    rules = [Rule("int4", op="all_gather", mode=mode) for mode in (None, "predict-now")]
    assert len({Options(policy=rule).fingerprint()["policy"] for rule in rules}) == 2


def test_threads_that_look_at_late_exchanges_at_once():
    """As a step and ``stats()`` in a thread that monitors do: each exchange is forgotten once."""

    class Slow(dict):
        def get(self, *given):
            found = super().get(*given)
            time.sleep(0.005)  # time for another thread to look at the same
            return found

    class Done:
        error, done, late = None, True, False

        def poll(self):
            return True

        def finish_late(self):
            pass

    late, errors = Late("a group"), []
    late._jobs = Slow()

    def look(what):
        try:
            what()
        except BaseException as error:
            errors.append(error)

    for _ in range(5):
        late.add(Call("k/all_gather#0", "all_gather", 1, 0, False), Done())
        looks = (late.poll, late.settle, lambda: late.look_at("k/all_gather#0"))
        threads = [threading.Thread(target=look, args=(what,)) for what in looks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not late._jobs
    assert not errors
