"""The public kit passes good codecs and finds the fault of each bad one; its text names codec, promise and input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import compactdist
from compactdist import codecs
from compactdist.codecs import Codec, registry
from compactdist.codecs.base import Session as BaseSession
from compactdist.codecs.base import add_up, residual_of
from compactdist.codecs.shapes import padded_nbytes
from compactdist.errors import CodecConfigError, CompactDistError, NonFiniteError, PayloadError
from compactdist.kernels.spec import MatrixView, Rounded, Velocity
from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.testing import check_codec, codec_checks, sample
from compactdist.testing.session_checks import VIEWS, check_session, check_sessions
from tests.launch import run_ranks
from tests.quick import quick_for


class Half(Codec):
    """A plain codec of another package: float16, saturating."""

    codec_id: ClassVar[str] = "kit-half"

    def payload_nbytes(self, shape: Any, dtype: torch.dtype) -> int:
        if not dtype.is_floating_point:
            raise CodecConfigError(f"kit-half takes floating point, not {dtype}")
        return padded_nbytes(2 * torch.Size(shape).numel())

    def encode(self, x: Tensor) -> Tensor:
        nbytes = self.payload_nbytes(x.shape, x.dtype)
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("not finite: use 'raw'")
        half = x.detach().clamp(-65504, 65504).half().contiguous().reshape(-1)
        payload = torch.zeros(nbytes, dtype=torch.uint8, device=x.device)
        payload[: 2 * half.numel()] = half.view(torch.uint8)
        return payload

    def decode(self, payload: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        expected = self.payload_nbytes(shape, dtype)
        if not isinstance(payload, Tensor) or payload.dtype != torch.uint8 or payload.shape != (expected,):
            raise PayloadError(f"expected uint8 of shape ({expected},)")
        n = torch.Size(shape).numel()
        return payload[: 2 * n].clone().view(torch.float16).reshape(tuple(shape)).to(dtype)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(registry._CODECS)
    yield
    registry._CODECS.clear()
    registry._CODECS.update(before)


def passes(codec: Codec) -> None:
    check_codec(codec, examples=5)


def test_a_codec_of_another_package_passes() -> None:
    passes(codecs.register(Half)())


@pytest.mark.parametrize("codec_id", quick_for(["int4"], ["raw", "int4", "lowrank"]))
def test_codecs_of_this_package_pass(codec_id: str) -> None:
    passes(codecs.get(codec_id))


@pytest.mark.parametrize("codec_id", quick_for(["raw", "int4", "lowrank"], codecs.list()))
def test_sessions_of_every_codec(codec_id: str) -> None:
    check_sessions(codecs.get(codec_id))


def test_an_unregistered_codec_is_told_how_to_register() -> None:
    with pytest.raises(AssertionError, match=r"Half\(\) is not registered: decorate .*compactdist\.codecs\.register"):
        passes(Half())


def test_without_hypothesis_the_fixed_inputs_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs.register(Half)()
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    check_codec(codec, examples=0)
    with pytest.raises(CompactDistError, match=r"pip install hypothesis.*examples=0"):
        check_codec(codec)


def bad_size(codec: Half, x: Tensor) -> Tensor:
    payload = Half.encode(codec, x)
    return payload[:-16] if x.numel() > 8 and not x.any() else payload


def bad_random(codec: Half, x: Tensor) -> Tensor:
    if not x.dtype.is_floating_point:
        return Half.encode(codec, x)
    noise = torch.randint(2, (max(x.numel(), 1),), generator=BAD_NOISE).reshape(-1)[: x.numel()].reshape(x.shape)
    return Half.encode(codec, x.detach() * (1 + 0.01 * noise))


BAD_NOISE = torch.Generator().manual_seed(0)


def bad_in_place(codec: Half, x: Tensor) -> Tensor:
    payload = Half.encode(codec, x)
    if not x.requires_grad:
        x.mul_(0.5)
    return payload


def bad_strides(codec: Half, x: Tensor) -> Tensor:
    flat = torch.as_strided(x.detach(), (x.numel(),), (1,)) if x.numel() else x
    return Half.encode(codec, flat.reshape(x.shape) if x.numel() else x)


def bad_nan(codec: Half, x: Tensor) -> Tensor:
    return Half.encode(codec, torch.nan_to_num(x) if x.dtype.is_floating_point else x)


def bad_growth(codec: Half, x: Tensor) -> Tensor:
    return Half.encode(codec, -0.5 * x if x.dtype.is_floating_point else x)


def bad_address(codec: Half, payload: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    y = Half.decode(codec, payload, shape, dtype)
    return y if payload.data_ptr() % 2 == 0 else y.neg()


def bad_inf(codec: Half, payload: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    y = Half.decode(codec, payload, shape, dtype)
    return torch.where(y.abs() >= 65504, torch.full_like(y, torch.inf), y)


def bad_form(codec: Half, payload: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    n = codec.payload_nbytes(shape, dtype)
    return Half.decode(codec, payload.reshape(-1).view(torch.uint8)[:n], shape, dtype)


def bad_threads(codec: Half, payload: Any, shape: Any, dtype: torch.dtype) -> Tensor:
    return Half.decode(codec, payload, shape, dtype) * (1 if torch.get_num_threads() == 1 else 0.5)


BAD: dict[str, tuple[str, Callable[..., Any], str]] = {
    "size": ("encode", bad_size, r"payload_nbytes says|raised PayloadError: expected uint8"),
    "random": ("encode", bad_random, r"two encodes of one tensor differ"),
    "in place": ("encode", bad_in_place, r"encode changed its input"),
    "strides": ("encode", bad_strides, r"a (strided|transposed) view encodes to other bytes"),
    "nan": ("encode", bad_nan, r"a tensor with nan must raise NonFiniteError, raised nothing"),
    "growth": ("encode", bad_growth, r"error's energy .* exceeds the input's"),
    "address": ("decode", bad_address, r"a payload at an odd address decodes to other bits"),
    "inf": ("decode", bad_inf, r"came back with NaN or Inf"),
    "form": ("decode", bad_form, r"a payload .* must raise PayloadError"),
    "threads": ("decode", bad_threads, r"one thread and two decode to different bits"),
    "fingerprint": ("fingerprint", lambda codec: id(codec), r"different (hashes|fingerprints)"),
    "config": ("get_config", lambda codec: {"id": "kit-half"}, r"get_config must leave out the id"),
    "repr": ("__repr__", lambda codec: "Half(1)", r"its repr does not make it again"),
}


@pytest.mark.parametrize("fault", BAD)
def test_every_fault_is_found_and_named(fault: str) -> None:
    method, function, match = BAD[fault]
    bad = type("Half", (Half,), {method: function, "codec_id": "kit-bad"})
    codecs.register(bad)
    with pytest.raises(AssertionError, match=match) as caught:
        passes(bad())
    if fault in ("random", "strides", "growth"):
        assert "Half()" in str(caught.value)
        assert "float" in str(caught.value)
        assert "compactdist.testing.sample(" in str(caught.value)


def test_what_the_text_names_can_be_drawn_again() -> None:
    with (
        pytest.raises(AssertionError, match="drawn by") as caught,
        codec_checks.on_sample("laplace", (3, 5), torch.float16, 7),
    ):
        codec_checks.expect(False, Half(), "broken", sample("laplace", (3, 5), torch.float16, 7))
    call = str(caught.value).split("drawn by ")[1].replace("compactdist.testing.", "")
    again = eval(call, {"sample": sample, "torch": torch})
    assert torch.equal(again, sample("laplace", (3, 5), torch.float16, 7))


# --- sessions: the contract of Codec.open, played by a session that can be made bad


class Session:
    """One end of a stream; counts the frames that were sent, and sends a little less with each."""

    def __init__(self, codec: Any, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        self.codec, self.view, self.dtype, self.device = codec, view, dtype, device
        self.payload_nbytes = codec.payload_nbytes(view.shape, torch.float32)
        self.last = self.staged = 0.0

    def expected(self, terms: tuple[Tensor, ...]) -> Tensor:
        total = torch.zeros(self.view.numel, dtype=torch.float32, device=self.device)
        for term in terms:
            total = total + term.float()
        return total

    def encode(self, x: Tensor, terms: tuple[Tensor, ...], out: Tensor | None, payload: Tensor) -> None:
        difference = x.float() - self.expected(terms)
        difference = difference / (1 + self.last / 1000)  # a private memory changes what is sent, not what it means
        payload.copy_(self.codec.encode(self.view.to_matrix(difference)))
        self.staged = self.last + 1
        if out is not None:
            self.decode(payload, terms, out)

    def decode(self, payload: Tensor, terms: tuple[Tensor, ...], out: Tensor) -> None:
        decoded = self.view.to_flat(self.codec.decode(payload, self.view.shape, torch.float32))
        limit = torch.finfo(out.dtype).max
        out.copy_((decoded + self.expected(terms)).clamp(-limit, limit))

    def encode_twice(self, x: Tensor, terms: Any, out: Tensor, copy: Tensor, payload: Tensor) -> None:
        self.encode(x, terms, out, payload)
        copy.copy_(out)

    def decode_twice(self, payload: Tensor, terms: Any, out: Tensor, copy: Tensor) -> None:
        self.decode(payload, terms, out)
        copy.copy_(out)

    @property
    def takes_rounded(self) -> bool:
        return False

    takes_velocity = False

    def commit(self) -> None:
        self.last, self.staged = self.staged or self.last, 0.0

    def rollback(self) -> None:
        self.staged = 0.0

    def prepare(self) -> None:
        pass

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        pass

    def copy_memory(self) -> Any:
        return self.last

    def take_memory(self, memory: Any) -> None:
        self.last = memory

    @property
    def held_bytes(self) -> int:
        return 0


def with_sessions(base: type[Session] = Session, **methods: Any) -> Codec:
    session = type("Session", (base,), methods)
    half = type("Half", (Half,), {"open": lambda codec, *args: session(codec, *args)})
    codecs.register(half)
    return half()


def test_good_sessions_pass() -> None:
    codec = with_sessions()
    passes(codec)
    check_sessions(codec)


def remembers_at_once(self: Session, x: Tensor, terms: Any, out: Tensor | None, payload: Tensor) -> None:
    Session.encode(self, x, terms, out, payload)
    self.last = self.staged


def forgets_to_roll_back(self: Session) -> None:
    self.commit()


def another_out(self: Session, x: Tensor, terms: Any, out: Tensor | None, payload: Tensor) -> None:
    Session.encode(self, x, terms, out, payload)
    if out is not None:
        out.add_(1)


def takes_codes_for_values(self: Session, terms: tuple[Any, ...]) -> Tensor:
    return Session.expected(self, tuple(term.codes if isinstance(term, Rounded) else term for term in terms))


def takes_the_older_tensor_for_a_velocity(self: Session, terms: tuple[Any, ...]) -> Tensor:
    return Session.expected(self, tuple(term.previous if isinstance(term, Velocity) else term for term in terms))


def adds_into_a_term(self: Session, payload: Tensor, terms: Any, out: Tensor) -> None:
    Session.decode(self, payload, terms, out)
    if terms and out.data_ptr() != terms[0].data_ptr():
        terms[0].copy_(out)


def reads_its_output(self: Session, payload: Tensor, terms: Any, out: Tensor) -> None:
    keep = out.clone()
    Session.decode(self, payload, terms, out)
    out.add_(keep * 0.01)


def swallows_nan(self: Session, x: Tensor, terms: Any, out: Tensor | None, payload: Tensor) -> None:
    Session.encode(self, torch.nan_to_num(x), terms, out, payload)


def prepares_too_much(self: Session) -> None:
    self.last += 100


def copies_the_tensor(self: Session, x: Tensor, terms: Any, out: Tensor, copy: Tensor, payload: Tensor) -> None:
    self.encode(x, terms, out, payload)
    copy.copy_(x)


def copies_before_it_decodes(self: Session, payload: Tensor, terms: Any, out: Tensor, copy: Tensor) -> None:
    copy.copy_(out)
    self.decode(payload, terms, out)


class Remembers(Session):
    """Keeps its count in a tensor, as a session with memory does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.count = self.alias = torch.zeros(1, dtype=torch.float32)
        self.spare = torch.zeros(1, dtype=torch.float32)

    def encode(self, x: Tensor, terms: tuple[Tensor, ...], out: Tensor | None, payload: Tensor) -> None:
        self.last = float(self.alias)
        super().encode(x, terms, out, payload)

    def commit(self) -> None:
        super().commit()
        self.alias.fill_(self.last)

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self.count = self.alias = to(self.count)

    def copy_memory(self) -> Any:
        return self.count.clone()

    def take_memory(self, memory: Any) -> None:
        self.count = self.alias = memory.clone()

    @property
    def held_bytes(self) -> int:
        return self.count.nbytes


def moves_one_reference(self: Remembers, to: Callable[[Tensor], Tensor]) -> None:
    self.count = to(self.count)


def moves_what_is_not_counted(self: Remembers, to: Callable[[Tensor], Tensor]) -> None:
    self.count = self.alias = to(self.count)
    self.spare = to(self.spare)


def moves_copies(self: Remembers, to: Callable[[Tensor], Tensor]) -> None:
    self.count = self.alias = to(self.count.clone())


def copies_nothing(self: Remembers) -> Any:
    return self.count


def takes_the_copy_itself(self: Remembers, memory: Any) -> None:
    self.count = self.alias = memory


def cannot_be_copied(self: Remembers) -> Any:
    raise CodecConfigError("its memory is elsewhere")


BAD_SESSIONS: dict[str, tuple[dict[str, Any], str]] = {
    "remembers at once": ({"encode": remembers_at_once}, "a frame that was not sent, out=None"),
    "rollback": ({"rollback": forgets_to_roll_back}, "a frame that was not sent, out=None"),
    "out": ({"encode": another_out}, "decode gives other bits than encode's out"),
    "eight bits": ({"takes_rounded": True, "expected": takes_codes_for_values}, "in eight bits gives other bits"),
    "velocity": (
        {"takes_velocity": True, "expected": takes_the_older_tensor_for_a_velocity},
        "a velocity as it is kept gives other bits",
    ),
    "term": ({"decode": adds_into_a_term}, "changed x or a term|changed the next payload"),
    "output": ({"decode": reads_its_output}, "in place.* gives other bits|other bits than encode's out"),
    "nan": ({"encode": swallows_nan}, "must raise NonFiniteError, raised nothing"),
    "prepare": ({"prepare": prepares_too_much}, "changed the next payload"),
    "held": ({"held_bytes": -1}, "held_bytes is -1"),
    "encode twice": ({"encode_twice": copies_the_tensor}, "encode_twice gives other bits"),
    "decode twice": ({"decode_twice": copies_before_it_decodes}, "decode_twice writes other bits"),
}
BAD_MOVES: dict[str, tuple[dict[str, Any], str]] = {
    "one reference": ({"move": moves_one_reference}, "changed the next payload"),
    "not counted": ({"move": moves_what_is_not_counted}, "move takes 8 bytes elsewhere, held_bytes says 4"),
    "copies": ({"move": moves_copies}, "move gave other tensors, or another order, the second time"),
    "no copy": ({"copy_memory": copies_nothing}, "a copy of the memory.* changed the next payload|other bits"),
    "copy taken": (
        {"take_memory": takes_the_copy_itself},
        "a copy of the memory.* changed the next payload|other bits",
    ),
    "copy left": ({"take_memory": lambda *_: None}, "a copy of the memory.* changed the next payload|other bits"),
}


@pytest.mark.parametrize("fault", BAD_SESSIONS)
def test_every_fault_of_a_session_is_found(fault: str) -> None:
    methods, match = BAD_SESSIONS[fault]
    with pytest.raises(AssertionError, match=match) as caught:
        check_sessions(with_sessions(**methods))
    assert "session of MatrixView(" in str(caught.value) or "must raise" in str(caught.value)


def test_sessions_that_move_their_memory_pass() -> None:
    check_sessions(with_sessions(Remembers))


def test_sessions_that_refuse_a_copy_of_their_memory_pass() -> None:
    check_sessions(with_sessions(Remembers, copy_memory=cannot_be_copied))


@pytest.mark.parametrize("fault", BAD_MOVES)
def test_every_fault_of_a_move_is_found(fault: str) -> None:
    methods, match = BAD_MOVES[fault]
    with pytest.raises(AssertionError, match=match):
        check_sessions(with_sessions(Remembers, **methods))


def test_views_are_matrices_of_their_elements() -> None:
    codec = with_sessions()
    for view in VIEWS:
        x = torch.arange(view.numel, dtype=torch.float32)
        assert torch.equal(view.to_flat(view.to_matrix(x)), x)
        check_session(codec, view, torch.bfloat16, name="laplace")


class Product(Half):
    """Its decoding is a product, which autocast makes in bfloat16."""

    codec_id: ClassVar[str] = "kit-product"

    def decode(self, payload: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        flat = super().decode(payload, shape, torch.float32).reshape(-1, 1)
        return (flat @ torch.ones(1, 1, dtype=torch.float32)).reshape(tuple(shape)).to(dtype)


class Table(Half):
    """It makes a tensor of the default dtype."""

    codec_id: ClassVar[str] = "kit-table"

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x * (torch.ones(1).element_size() / 4))


@pytest.mark.parametrize("bad", [Product, Table])
def test_a_codec_that_goes_by_its_callers_autocast_or_default_dtype_is_found(bad):
    with pytest.raises(AssertionError, match=r"autocast to bfloat16 and the default dtype to float64.*undisturbed"):
        codec_checks.check_surroundings(bad())


class Exposed(BaseSession):
    """A session that computes as it is called."""

    def encode(self, x, terms, out, payload, *, row_weights=None):
        payload.copy_(self.codec.encode(self.view.to_matrix(residual_of(x, terms))))
        if out is not None:
            self.decode(payload, terms, out)

    def decode(self, payload, terms, out):
        add_up(terms, self.view.to_flat(self.codec.decode(payload, self.view.shape, torch.float32)), out)


class WithSession(Product):
    codec_id: ClassVar[str] = "kit-exposed"

    def open(self, view, dtype, device):
        return Exposed(self, view, dtype, device)


def test_a_group_and_a_stream_protect_any_session_from_autocast():
    registry.register(WithSession)

    def frames() -> list[Tensor]:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        encoder, decoder = ResidualEncoder("kit-exposed"), ResidualDecoder("kit-exposed")
        made = []
        for step in range(3):
            made += [encoder.encode(x + 0.1 * step)]
            made += [decoder.decode(made[-1])]
        return made

    def body(rank, world_size):
        group = compactdist.wrap(codec="kit-exposed", min_numel=64)
        outs = []
        for step in range(3):
            group.step()
            out = torch.empty(2 * 1024)
            group.all_gather_into_tensor(out, torch.linspace(-1, 1, 1024) * (1 + 0.1 * step + rank))
            outs.append(out)
        group.close()
        return outs

    def under_autocast(rank, world_size):
        with torch.autocast("cpu", torch.bfloat16):
            return body(rank, world_size)

    alone = frames()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, frames(), alone))
    for plain, other in zip(run_ranks(body, world_size=2), run_ranks(under_autocast, world_size=2), strict=True):
        assert all(map(torch.equal, plain, other))
