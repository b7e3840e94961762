"""The checks the sessions of every codec must pass: both ends stay equal, and a rolled-back frame leaves no trace."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from compactdist.codecs.base import Session, Terms, tensors_in
from compactdist.errors import CodecConfigError, NonFiniteError, PayloadError
from compactdist.kernels import MIN_ELEMENTS, restored
from compactdist.kernels.spec import MatrixView, Velocity
from compactdist.state.quantized_history import quantize
from compactdist.testing.codec_checks import as_bytes, expect, expect_raises, surroundings
from compactdist.testing.samples import DISTRIBUTIONS, sample

__all__ = ["VIEWS", "check_session", "check_sessions"]

VIEWS = (
    MatrixView(1, 1, 1, 1),
    MatrixView(300, 1, 3, 128),  # the last row is filled up with zeros
    MatrixView(33 * 65, 1, 33, 65),
    MatrixView(2 * 40 * 72, 2, 40, 72),
    MatrixView(2 * 200 * 130, 2, 200, 130),  # large enough for any codec's fast path
    MatrixView(2 * 3 * 20 * 16, 2, 20, 48, axes=(2, 3, 20, 16), order=(0, 2, 1, 3)),  # heads between groups and rows
)
"""One element, a padded tail, an odd matrix, groups, many elements, permuted axes."""

STEPS = 6


def check_sessions(codec: Any, *, device: str | torch.device = "cpu") -> None:
    """Run :func:`check_session` on every kind of matrix view, with each dtype and distribution at least once."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for turn, name in enumerate(DISTRIBUTIONS):
        for index, view in enumerate(VIEWS):
            if index == turn % len(VIEWS) or name == "student4":
                check_session(codec, view, dtypes[(turn + index) % 3], name=name, device=device)


def check_session(
    codec: Any,
    view: MatrixView,
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "student4",
    device: str | torch.device = "cpu",
) -> None:
    """Run a stream through sessions of a codec, with no, one and two terms, and compare its ends at every step.

    The sender is disturbed on the way: it encodes frames that are rolled back, frames that the next one replaces
    without a rollback, and tensors with NaN. A twin that never saw them must send equal payloads. Between steps the
    memory of two ends is moved, and its old place spoilt; they must not notice. Two ends are replaced by new sessions
    that take copies of their memory, as a restored snapshot does. A session that ``takes_rounded`` is given a term in
    eight bits, too, and one that ``takes_velocity`` a velocity that is yet to be worked out, over whose older tensor it
    decodes; of either it must make what it makes of the tensor.

    Args:
        codec: a codec with ``open``.
        view: matrix view of the flat tensors.
        dtype: of the tensors.
        name: distribution of the tensors, of :data:`~compactdist.testing.samples.DISTRIBUTIONS`.
        device: where the tensors live.

    Raises:
        AssertionError: a promise is broken.
    """
    _Stream(codec, view, dtype, name, torch.device(device)).run()


class _Stream:
    """A sender, its undisturbed twin, a receiver, and a receiver that decodes in place; they share the terms."""

    def __init__(self, codec: Any, view: MatrixView, dtype: torch.dtype, name: str, device: torch.device) -> None:
        self.codec = codec
        self.view = view
        self.dtype = dtype
        self.name = name
        self.device = device
        self.sender, self.twin, self.receiver, self.in_place = (codec.open(view, dtype, device) for _ in range(4))
        self.terms: tuple[Tensor, ...] = ()

    def run(self) -> None:
        size = self.sender.payload_nbytes
        said = self.codec.payload_nbytes(self.view.shape, torch.float32)
        self.expect(size == said, f"its session's payloads have {size} bytes, payload_nbytes says {said}")
        first = self.draw(0)
        for step in range(STEPS):
            x = first if step == 0 else self.bounded(first.float() + 0.1 * self.draw(step).float())
            self.disturb(step, x)
            decoded = self.step(step, x)
            # no term, then the last value, then also a velocity: what predictors of order 0, 1 and 2 give
            velocity = self.bounded(0.5 * (decoded.float() - (self.terms[0].float() if self.terms else 0)))
            self.terms = (decoded,) if step < 2 else (decoded, velocity)
            if step % 2:
                self.twin, self.receiver = map(self.replaced, (self.twin, self.receiver))
        self.refuse_wrong_payloads(size)
        if self.sender.takes_rounded and self.view.numel < MIN_ELEMENTS:  # above it, there would be kernels to compile
            self.read_rounded(first)
        if self.sender.takes_velocity and self.view.numel < MIN_ELEMENTS:
            self.read_velocity(first)
            if self.sender.takes_rounded:
                self.read_rounded_pairs(first)

    def draw(self, seed: int) -> Tensor:
        # At most a quarter of the largest value, so that no difference of two tensors leaves float32.
        return (sample(self.name, (self.view.numel,), self.dtype, seed) / 4).to(self.device)

    def bounded(self, x: Tensor) -> Tensor:
        limit = torch.finfo(self.dtype).max / 4
        return x.clamp(-limit, limit).to(self.dtype)

    def expect(self, met: bool, what: str) -> None:
        where = f"session of {self.view} in {str(self.dtype).removeprefix('torch.')}, distribution {self.name!r}"
        expect(met, self.codec, f"{what} ({where})")

    def buffers(self) -> tuple[Tensor, Tensor]:
        """An output and a payload that hold noise, as reused memory does."""
        out = torch.full((self.view.numel,), 7.0, dtype=self.dtype, device=self.device)
        return out, torch.full((self.sender.payload_nbytes,), 0xA5, dtype=torch.uint8, device=self.device)

    def disturb(self, step: int, x: Tensor) -> None:
        """Encode frames that will not be sent; they must not change later ones."""
        out, payload = self.buffers()
        other = self.bounded(x.float().flip(0) * 2 + 1)
        self.sender.encode(other, self.terms, out, payload)
        if step % 2:
            self.sender.rollback()
        if not self.codec.lossless and step % 3 == 1:
            broken = x.clone()
            broken[-1] = (math.nan, math.inf)[step % 2]
            held = [as_bytes(term).clone() for term in self.terms]
            what = "a session's encode of a tensor that is not finite"
            expect_raises(
                NonFiniteError, self.codec, what, lambda: self.sender.encode(broken, self.terms, out, payload)
            )
            same = all(torch.equal(as_bytes(term), before) for term, before in zip(self.terms, held, strict=True))
            self.expect(same, "an encode that was refused changed the terms")
            self.sender.rollback()

    def step(self, step: int, x: Tensor) -> Tensor:
        """Send ``x``; returns the tensor that every end now holds."""
        inputs = [x, *self.terms]
        before = [as_bytes(tensor).clone() for tensor in inputs]
        out, payload = self.buffers()
        self.sender.encode(x, self.terms, out, payload)
        (again, undisturbed), (copy, _) = self.buffers(), self.buffers()
        with surroundings():
            if step % 2:
                self.twin.encode_twice(x, self.terms, again, copy, undisturbed)
            else:
                self.twin.encode(x, self.terms, None, undisturbed)
        same = torch.equal(payload, undisturbed)
        self.expect(
            same,
            f"step {step}: a frame that was not sent, out=None, a copy of the memory, or a caller's autocast or "
            "default dtype changed the next payload",
        )
        if step % 2:
            same = all(torch.equal(as_bytes(one), as_bytes(out)) for one in (again, copy))
            self.expect(same, f"step {step}: encode_twice gives other bits than encode's out")
        got, _ = self.buffers()
        kept = payload.clone()
        self.receiver.decode(payload, self.terms, got)
        self.expect(torch.equal(payload, kept), f"step {step}: decode changed its payload")
        self.expect(
            torch.equal(as_bytes(got), as_bytes(out)), f"step {step}: decode gives other bits than encode's out"
        )
        self.expect(bool(torch.isfinite(got).all()), f"step {step}: a finite tensor came back with NaN or Inf")
        unchanged = all(torch.equal(as_bytes(t), b) for t, b in zip(inputs, before, strict=True))
        self.expect(unchanged, f"step {step}: encode or decode changed x or a term")
        target = self.terms[0].clone() if self.terms else self.buffers()[0]
        terms = (target, *self.terms[1:]) if self.terms else ()
        with surroundings():
            if step % 2:
                self.in_place.decode_twice(payload, terms, target, copy.fill_(7))
            else:
                self.in_place.decode(payload, terms, target)
                copy.copy_(target)
        same = torch.equal(as_bytes(target), as_bytes(got))
        twice = torch.equal(as_bytes(copy), as_bytes(got))
        self.expect(twice or not same, f"step {step}: decode_twice writes other bits to its copy")
        self.expect(same, f"step {step}: decode in place, under autocast and another default dtype, gives other bits")
        ends = (self.sender, self.twin, self.receiver, self.in_place)
        for end in ends:
            end.commit()
        for end in ends[::2]:  # prepare() may do work early, and must not change what comes out
            with surroundings():
                end.prepare()
        for end in ends:
            self.expect(end.held_bytes >= 0, f"step {step}: held_bytes is {end.held_bytes}")
        for end in ends[1::2]:
            self.move(step, end)
        return got

    def move(self, step: int, end: Session) -> None:
        """Put an end's memory elsewhere and spoil the old place, as offloading does; later steps must not notice."""
        first, second = tensors_in(end.move), tensors_in(end.move)
        same = len(first) == len(second) and all(one is other for one, other in zip(first, second, strict=True))
        self.expect(same, f"step {step}: move gave other tensors, or another order, the second time")
        nbytes = sum(tensor.nbytes for tensor in first)
        held = end.held_bytes
        self.expect(nbytes <= held, f"step {step}: move takes {nbytes} bytes elsewhere, held_bytes says {held}")
        end.move(torch.clone)
        self.expect(end.held_bytes == held, f"step {step}: after a move, held_bytes is {end.held_bytes} and was {held}")
        for tensor in first:
            as_bytes(tensor).fill_(0xA5)

    def replaced(self, end: Session) -> Session:
        """A new session with a copy of an end's memory, which that end and another session have gone on from before."""
        try:
            memory = end.copy_memory()
        except CodecConfigError:  # it can be in no snapshot, and says so
            return end
        first: Session
        second: Session
        first, second = (self.codec.open(self.view, self.dtype, self.device) for _ in range(2))
        first.take_memory(memory)
        for other in (end, first):
            other.encode(self.draw(STEPS), self.terms, *self.buffers())
            other.commit()
        second.take_memory(memory)
        return second

    def read_rounded(self, x: Tensor) -> None:
        """Both ends get a term as a history in eight bits has it, and two others the tensor that it stands for."""
        rounded, made = quantize(self.bounded(0.9 * x.float()), "int8", self.dtype), []
        for term in (rounded, restored(rounded)):
            sender, receiver = (self.codec.open(self.view, self.dtype, self.device) for _ in range(2))
            (out, payload), (got, _) = self.buffers(), self.buffers()
            sender.encode(x, (term,), out, payload)
            receiver.decode(payload, (term,), got)
            made.append([as_bytes(one) for one in (payload, out, got)])
        self.expect(all(map(torch.equal, *made)), "a term in eight bits gives other bits than the tensor it stands for")

    def read_velocity(self, x: Tensor) -> None:
        """Both ends get a velocity as a predictor keeps it, and two others the tensor that it stands for."""
        base, previous, made = self.bounded(0.9 * x.float()), self.bounded(0.8 * x.float()), []
        for kept in (True, False):
            sender, receiver = (self.codec.open(self.view, self.dtype, self.device) for _ in range(2))
            (out, payload), velocity = self.buffers(), Velocity(base, previous.clone(), 0.4375)
            term = velocity if kept else restored(velocity)
            got = cast(Tensor, velocity.previous) if kept else self.buffers()[0]
            sender.encode(x, (base, cast(Tensor, term)), out, payload)
            receiver.decode(payload, (base, cast(Tensor, term)), got)
            made.append([as_bytes(one) for one in (payload, out, got)])
        self.expect(
            all(map(torch.equal, *made)), "a velocity as it is kept gives other bits than the tensor it stands for"
        )

    def read_rounded_pairs(self, x: Tensor) -> None:
        """The same with both terms, or with a velocity's two tensors, as histories in eight bits have them."""
        base, previous = (quantize(self.bounded(f * x.float()), "int8", self.dtype) for f in (0.9, 0.8))
        for second in (previous, Velocity(base, previous, 0.4375)):
            made = []
            for terms in ((base, second), (restored(base), restored(second))):
                sender, receiver = (self.codec.open(self.view, self.dtype, self.device) for _ in range(2))
                (out, payload), (got, _) = self.buffers(), self.buffers()
                sender.encode(x, cast(Terms, terms), out, payload)
                receiver.decode(payload, cast(Terms, terms), got)
                made.append([as_bytes(one) for one in (payload, out, got)])
            self.expect(
                all(map(torch.equal, *made)), "two terms in eight bits give other bits than the tensors they stand for"
            )

    def refuse_wrong_payloads(self, size: int) -> None:
        out, payload = self.buffers()
        if size:
            expect_raises(
                PayloadError,
                self.codec,
                "a session's decode of a payload that is a byte short",
                lambda: self.receiver.decode(payload[:-1], self.terms, out),
            )
