"""The Triton kernels of ``scales="token_history"`` against the reference: the same bytes at both ends, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels import history_steps_for, use
from compactdist.kernels.gpu.history_steps import TritonHistorySteps, steps_of
from compactdist.kernels.spec import MatrixView
from compactdist.state.matrix_view import Layout, plain
from tests.codecs import make_fixtures
from tests.kernels.gpu import kit

VIEWS = (
    plain(66 * 264, 1, 264),
    plain(2 * 70 * 136, 2, 136),
    MatrixView(66 * 136 - 5, 1, 66, 136),  # a padded tail
    plain(64 * 130, 1, 130),  # rows end within units
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=48).resolve(2 * 2 * 3 * 33 * 48),
    Layout("(h s d) -> 1 s (d h)", h=6, d=24).resolve(6 * 65 * 24),
)
KINDS = ("wide", "zero rows", "L", "zeros", "tiny", "huge", "one hot", "denormal and normal")


@pytest.fixture
def done(monkeypatch):
    """What the steps answered: one that declined everything would be equal to the reference, too."""
    answers = []
    for name in ("encode", "decode"):
        real = getattr(TritonHistorySteps, name)

        def spied(*args, real=real, name=name, **kwargs):
            answers.append((name, real(*args, **kwargs)))
            return answers[-1][1]

        monkeypatch.setattr(TritonHistorySteps, name, spied)
    return answers


class Ends:
    """Sender and receiver on some kernels."""

    def __init__(self, kernels: str, codec, view: MatrixView, dtype: torch.dtype) -> None:
        self.kernels, self.device = kernels, kit.DEVICE if kernels == "gpu" else torch.device("cpu")
        with use(kernels):
            self.sender, self.receiver = (codec.open(view, dtype, self.device) for _ in range(2))

    def step(self, x, terms, copies: bool = False):
        """All that one frame makes, on the CPU."""
        x, terms = x.to(self.device), tuple(term.to(self.device, copy=True) for term in terms)
        payload = torch.full((self.sender.payload_nbytes,), 255, dtype=torch.uint8, device=self.device)
        out, got = torch.empty_like(x), terms[0].clone() if terms else torch.empty_like(x)
        copy = torch.empty_like(x)
        with use(self.kernels):
            if copies:
                self.sender.encode_twice(x, terms, out, copy, payload)
                assert torch.equal(kit.raw(copy), kit.raw(out))
                copy = torch.empty_like(x)
            else:
                self.sender.encode(x, terms, out, payload)
            before = (got, *terms[1:]) if terms else ()
            if copies:
                self.receiver.decode_twice(payload, before, got, copy)
                assert torch.equal(kit.raw(copy), kit.raw(got))
            else:
                self.receiver.decode(payload, before, got)
        for end in (self.sender, self.receiver):
            end.commit()
        made = (payload, out, got, *self.sender.shared_memory, *self.receiver.shared_memory)
        return [kit.raw(one) for one in made]


def check(codec, view, dtype, kinds, seed=0):
    both = [Ends(kernels, codec, view, dtype) for kernels in ("reference", "gpu")]
    terms: tuple[torch.Tensor, ...] = ()
    for turn, kind in enumerate(kinds):
        change = kit.draw(kind, view.numel, view.channels, seed + turn)
        x = kit.cast(change + sum(term.double() for term in terms), dtype)
        expected, got = (ends.step(x, terms, turn % 2 == 1) for ends in both)
        for name, one, other in zip(("payload", "out", "got", "sender", "receiver"), expected, got, strict=True):
            assert torch.equal(one, other), (name, view, dtype, kind)
        base = kit.cast(kit.draw("gaussian", view.numel, view.channels, 50 + turn), dtype)
        terms = ((base,), (base, kit.cast(base.double() / 8, dtype)), ())[len(terms)]


@pytest.mark.parametrize("codec_id", kit.CODECS)
def test_same_bytes_as_the_reference(codec_id, done):
    codec, at = codecs.get(codec_id, scales="token_history"), kit.CODECS.index(codec_id)
    view, kinds = VIEWS[at % len(VIEWS)], [KINDS[(at + i) % len(KINDS)] for i in range(2)]
    check(codec, view, kit.DTYPES[at % 3], ("gaussian", "gaussian", *kinds), seed=at)
    assert ("encode", True) in done
    assert all(answer for name, answer in done if name == "decode")


def test_every_second_row_of_many(done):
    check(codecs.get("int2", scales="token_history"), plain(1030 * 128, 1, 128), torch.bfloat16, ("L", "L"))
    assert ("encode", True) in done


def test_of_more_than_64_tiles(done):
    check(codecs.get("int8", scales="token_history"), plain(4200 * 128, 1, 128), torch.bfloat16, ("L", "L"))
    assert ("encode", True) in done


@pytest.mark.parametrize("name", make_fixtures.STREAMS)
def test_stored_streams(name, done):
    stored = make_fixtures.load_stream(name)
    with use("gpu"):
        view, dtype = make_fixtures.STREAM_VIEW, make_fixtures.STREAM_DTYPE
        session = codecs.get(make_fixtures.STREAMS[name]).open(view, dtype, kit.DEVICE)
        terms: tuple[torch.Tensor, ...] = ()
        for payload in stored.payloads:
            out = torch.empty(view.numel, dtype=dtype, device=kit.DEVICE)
            session.decode(payload.to(kit.DEVICE), terms, out)
            session.commit()
            terms = (out,)
    assert torch.equal(kit.raw(out), kit.raw(stored.decoded))
    assert torch.equal(session.shared_memory[0].cpu(), stored.scales)
    assert done == [("decode", True)] * 2


def test_of_any_payload():
    """Roots and row scales that no encoder writes: infinite, negative, not a number."""
    codec, view, dtype = codecs.get("int4", scales="token_history"), VIEWS[1], torch.float32
    g = torch.Generator().manual_seed(3)
    made = []
    payloads = [torch.randint(256, (codec.payload_nbytes(view.shape, dtype),), generator=g).to(torch.uint8)] * 2
    for kernels, device in (("reference", torch.device("cpu")), ("gpu", kit.DEVICE)):
        with use(kernels):
            session = codec.open(view, dtype, device)
            for payload in payloads:
                out = torch.empty(view.numel, device=device)
                session.decode(payload.to(device), (), out)
                session.commit()
            made.append((out.cpu(), session.shared_memory[0].cpu()))
    (expected, scales), (got, others) = made
    assert torch.equal(scales, others)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(kit.raw(got.nan_to_num()), kit.raw(expected.nan_to_num()))


def test_what_is_supported():
    codec, view = codecs.get("int4", scales="token_history"), VIEWS[1]
    assert steps_of(codec.spec, view, torch.float64, kit.DEVICE) is None
    assert steps_of(codec.spec, plain(40 * 136, 1, 136), torch.float32, kit.DEVICE) is None
    assert steps_of(codec.spec, view, torch.float32, torch.device("meta")) is None
    with use("reference"):
        assert history_steps_for(codec.spec, view, torch.float32, kit.DEVICE) is None
    with use("gpu"):
        steps = history_steps_for(codec.spec, view, torch.float32, kit.DEVICE)
    assert isinstance(steps, TritonHistorySteps)
    x = torch.randn(view.numel).to(kit.DEVICE)
    payload = torch.empty(codec.payload_nbytes(view.shape, x.dtype), dtype=torch.uint8, device=kit.DEVICE)
    c, after = (torch.full((2, 136), 0.5, device=kit.DEVICE) for _ in range(2))
    for bad in (torch.nan, torch.inf, 1e30):
        x[7] = bad
        assert not steps.encode(x, (), None, payload, (c, after))
    assert not steps.decode(payload, (), x.half(), (c, after))
