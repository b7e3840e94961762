"""What both ends of a stream remember, and what they predict from it: one predictor class for each order.

A predictor gives ``terms()``, the tensors whose sum is the prediction, and takes the reconstruction in ``advance``. The
arithmetic is elementwise float32 in a fixed order with one rounding to the tensor's dtype, so two ends that start equal
stay equal to the bit. No other code compares ``order``: it asks the class (``copies``, ``can_share``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Terms
from compactdist.errors import ConfigError
from compactdist.kernels.spec import MovingTerm, Term, Velocity

__all__ = [
    "DampedVelocity",
    "ExactCell",
    "ExactDampedVelocity",
    "ExactLastValue",
    "LastTwo",
    "LastValue",
    "Memoryless",
    "Order",
    "PREDICTORS",
    "Predictor",
    "predictor_class",
]

Order = int | Literal["auto"]


class Cell(Protocol):
    """A place for one remembered tensor."""

    def read(self) -> Tensor | None:
        """The remembered tensor, flat ``[numel]`` in the stream's dtype; ``None`` when empty. May be overwritten."""
        ...

    def kept(self, rounded: bool) -> Term | None:
        """What is kept: as :meth:`read`, or with ``rounded`` in eight bits where it is so kept."""
        ...

    def put(self, value: Tensor | Velocity, last: Term | None, accepted: Tensor | None = None) -> Tensor | None:
        """Remember ``value``.

        Args:
            value: flat ``[numel]``; belongs to the cell from now on. A velocity is remembered as the tensor that it is.
            last: what ``read`` or ``kept`` gave for this frame; ``None`` if neither was asked.
            accepted: as for :meth:`Predictor.advance`.

        Returns:
            A tensor of the same size that nobody needs any more, or ``None``.
        """
        ...

    def made_of(self, value: Tensor | Velocity) -> tuple[Tensor, ...]:
        """What ``held`` will hold once ``value`` is remembered, in memory of its own."""
        ...

    def stay(self) -> None:
        """Keep what is kept where it is until it is forgotten: a CUDA graph that is captured knows its address."""
        ...

    def clear(self) -> None:
        """Forget."""
        ...

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep what ``to`` makes of each tensor instead of the tensor: the same bytes elsewhere."""
        ...

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that are kept."""
        ...


class ExactCell:
    """Remembers a tensor as it is.

    The cell keeps the tensor passed to ``put`` and returns the one it kept before. After ``stay`` it copies the tensor
    into the memory that it has.
    """

    __slots__ = ("stays", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.stays = False

    def read(self) -> Tensor | None:
        """The remembered tensor itself."""
        return self.value

    def kept(self, rounded: bool) -> Tensor | None:
        """The remembered tensor itself: nothing is kept in eight bits."""
        return self.value

    def put(self, value: Tensor | Velocity, last: Term | None, accepted: Tensor | None = None) -> Tensor | None:
        """Remember ``value``; returns the tensor kept before, or ``value`` if that was copied."""
        before, value = self.value, kernels.restored(value)
        if before is value:
            return None
        if before is None or not self.stays:
            self.value = value
            return before
        before.copy_(value)
        return value

    def made_of(self, value: Tensor | Velocity) -> tuple[Tensor, ...]:
        """The tensor."""
        return (kernels.restored(value),)

    def stay(self) -> None:
        """From now on copy into the memory of the remembered tensor."""
        self.stays = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactCell:
        """A cell that no graph knows, with a copy of the tensor."""
        made = ExactCell()
        made.value = copy.deepcopy(self.value, memo)
        return made

    def clear(self) -> None:
        """Forget."""
        self.value, self.stays = None, False

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep a copy of the tensor that lies elsewhere."""
        if self.value is not None:
            self.value = to(self.value)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensor, if there is one."""
        return () if self.value is None else (self.value,)


class Predictor(ABC):
    """Predicts the next tensor of a stream from earlier reconstructions.

    Args:
        damping: factor g of the velocity, 0 <= g <= 1; used by :class:`DampedVelocity` only.
        new_cell: makes an empty :class:`Cell`.
    """

    number: ClassVar[int]
    """Names the predictor in frames."""

    copies: ClassVar[int]
    """Number of remembered tensors, each as large as the stream's."""

    damped: ClassVar[bool] = False
    """Whether ``damping`` means anything."""

    adapts: ClassVar[bool] = False
    """Whether the sender chooses a coefficient for every residual, which its frame says."""

    can_share: ClassVar[bool] = False
    """Whether a stream that passes frames on may share the incoming stream's predictor and keep none of its own."""

    __slots__ = ()

    @abstractmethod
    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None: ...

    @property
    def base(self) -> Tensor | None:
        """The last reconstruction, flat ``[numel]`` in the stream's dtype; ``None`` when empty or without memory."""
        terms = self.terms()
        return terms[0] if terms else None

    @abstractmethod
    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        """The prediction, as flat tensors to be added up in float32; empty without a prediction.

        Args:
            coefficient: what the frame says, which is :meth:`accepted`; for a predictor that adapts. On the device,
                float32 ``[]``, where the host does not know it.
        """

    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]:
        """As :meth:`terms`; a second term may be a ``kernels.spec.Velocity`` between tensors that are kept.

        ``rounded``: what is kept in eight bits is given as it is.
        """
        return self.terms(coefficient)

    def choose(self, x: Tensor, share: float, out: Tensor | None = None, queue: int | None = None) -> Tensor:
        """The coefficient to predict ``x``, flat ``[numel]``, with; 0 where the predictor does not adapt.

        Args:
            x: what is to be sent.
            share: how much of the coefficient that leaves the smallest residual to use, in (0, 1].
            out: float32 ``[]``, where to write it.
            queue: ``kernels.queue_of`` the device, where the caller has asked.

        Returns:
            float32 ``[]`` on the device of ``x``; the host does not look at it.
        """
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        return zero if out is None else out.copy_(zero)

    def accepted(self, coefficient: Tensor) -> Tensor:
        """The coefficient that a residual's frame says, float32 ``[]``, if it may say that now; else 0."""
        return torch.zeros_like(coefficient)

    def accept(self, frame: Tensor, at: int, out: Tensor, queue: int | None = None) -> Tensor:
        """Write what is :meth:`accepted` of the float32 in a frame, 1-D uint8, from byte ``at`` on to ``out``.

        ``queue``: as for :meth:`choose`.
        """
        return out.copy_(self.accepted(frame[at : at + 4].clone().view(torch.float32)[0]))

    def accepts(self, coefficient: float) -> bool:
        """The same on the host: whether a residual's frame may say this coefficient now."""
        return bool(self.accepted(torch.tensor(coefficient, dtype=torch.float32, device="cpu")) == coefficient)

    def spare(self, terms: tuple[MovingTerm, ...]) -> Tensor | None:
        """Memory for the reconstruction that nobody needs after the frame, flat ``[numel]``: a tensor of the terms, or
        what a velocity among them goes out from; ``None`` where there is none.

        ``terms``: what :meth:`kept_terms` gave for this frame.
        """
        return None

    @abstractmethod
    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        """Remember ``value``, flat ``[numel]``; it belongs to the predictor from now on.

        Args:
            value: the reconstruction.
            terms: what :meth:`terms` or :meth:`kept_terms` gave for this frame; empty for a keyframe.
            accepted: uint8 ``[2]`` on the device: where the first of it is 0, what is kept in eight bits stays, and a
                tensor holds what it did before the frame was decoded to it.

        Returns:
            A tensor of the same size whose memory nobody needs any more, or ``None``.
        """

    @abstractmethod
    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        """What ``held`` will hold once ``value`` is remembered, in that order; ``terms`` as for :meth:`advance`.

        For frames that a CUDA graph captures. What is held may be written to in that order.
        """

    @property
    @abstractmethod
    def cells(self) -> tuple[Cell, ...]:
        """The places where tensors are kept."""

    def stay(self) -> None:
        """Keep what is held where it is until :meth:`clear`: a CUDA graph that is captured knows the addresses."""
        for cell in self.cells:
            cell.stay()

    def clear(self) -> None:
        """Forget everything."""
        for cell in self.cells:
            cell.clear()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep what ``to`` makes of each tensor in ``held``, in that order: the same bytes elsewhere."""
        for cell in self.cells:
            cell.move(to)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that are kept. Both ends of a stream keep the same bytes."""
        return tuple([tensor for cell in self.cells for tensor in cell.held])

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(tensor.nbytes for tensor in self.held)


class Memoryless(Predictor):
    """Order 0: predicts nothing (plain quantization)."""

    number = copies = 0
    __slots__ = ()

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        pass

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        return ()

    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        return None

    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        return ()

    @property
    def cells(self) -> tuple[Cell, ...]:
        return ()


class LastValue(Predictor):
    """Order 1: predicts the last reconstruction."""

    number = copies = 1
    can_share = True
    __slots__ = ("_base",)

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        self._base = new_cell()

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        base = self._base.read()
        return () if base is None else (base,)

    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]:
        kept = self._base.kept(rounded)
        return () if kept is None else (kept,)

    def spare(self, terms: tuple[MovingTerm, ...]) -> Tensor | None:
        return terms[0] if terms and isinstance(terms[0], Tensor) else None

    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        return self._base.put(value, terms[0] if terms else None, accepted)

    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        return self._base.made_of(value)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self._base,)


class ExactLastValue(LastValue):
    """Order 1 with the last reconstruction kept as it is: nearly every stream's, at half the Python calls."""

    __slots__ = ("_cell",)

    _cell: ExactCell

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        self._base = self._cell = ExactCell()

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        base = self._cell.value
        return () if base is None else (base,)

    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        cell = self._cell
        last = cell.value
        if last is value:
            return None
        if last is not None and cell.stays:
            last.copy_(value)  # as ``ExactCell.put`` does, in one Python call less
            return value
        cell.value = value
        return last


class DampedVelocity(Predictor):
    """Order 2: predicts the last reconstruction plus a damped velocity.

    Source: CompactFusion, arXiv 2507.17511, residual level 2. With damping g the velocity becomes
    ``g * (x_hat - base)`` after every frame; it is zero after the first.
    """

    number = copies = 2
    damped = True
    __slots__ = ("_base", "_damping", "_velocity")

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        self._damping = damping
        self._base = new_cell()
        self._velocity = new_cell()

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        base, velocity = self._base.read(), self._velocity.read()
        return () if base is None or velocity is None else (base, velocity)

    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]:
        base, velocity = self._base.kept(rounded), self._velocity.kept(rounded)
        return () if base is None or velocity is None else (base, velocity)

    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        base = terms[0] if terms else self._base.read()
        self._velocity.put(self._change(value, base), None, accepted)
        return self._base.put(value, base, accepted)

    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        return self._base.made_of(value) + self._velocity.made_of(self._change(value, terms[0]))

    def _change(self, value: Tensor, base: Term | None) -> Tensor | Velocity:
        return torch.zeros_like(value) if base is None else Velocity(value, base, self._damping)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return self._base, self._velocity


class LastTwo(Predictor):
    """Keeps the last two reconstructions, from which it makes a velocity."""

    copies = 2
    __slots__ = ("_base", "_previous", "_stays")

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        self._base, self._previous = new_cell(), new_cell()
        self._stays = False  # both where they are; else they change places with every frame

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        kept = self.kept_terms(coefficient)
        return tuple(map(kernels.restored, kept))

    @abstractmethod
    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]: ...

    def with_velocity(self, coefficient: float | Tensor | None, rounded: bool) -> tuple[MovingTerm, ...]:
        """The terms of a prediction with this coefficient; ``None``: without a velocity."""
        base = self._base.kept(rounded)
        if base is None:
            return ()
        previous = None if coefficient is None else self._previous.kept(rounded)
        if coefficient is None or previous is None:
            return (base,)
        return base, Velocity(base, previous, coefficient)

    def stay(self) -> None:
        self._stays = True
        super().stay()

    def clear(self) -> None:
        self._stays = False
        super().clear()

    def spare(self, terms: tuple[MovingTerm, ...]) -> Tensor | None:
        if len(terms) < 2 or self._stays or not isinstance(velocity := terms[1], Velocity):
            return None
        return velocity.previous if isinstance(velocity.previous, Tensor) else None

    def advance(self, value: Tensor, terms: Terms, accepted: Tensor | None = None) -> Tensor | None:
        base = terms[0] if terms else self._base.read()
        if base is None:
            self._previous.put(value.clone(), None)  # no change yet
            return self._base.put(value, None)
        if self._stays:
            for kept, now in zip(self._previous.held, self._base.held, strict=True):
                kept.copy_(now)
        else:
            self._base, self._previous = self._previous, self._base
        return self._base.put(value, base, accepted)

    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        return self._base.made_of(value) + tuple([one.clone() for one in self._base.held])  # which are written to first

    @property
    def cells(self) -> tuple[Cell, ...]:
        return self._base, self._previous


class ExactDampedVelocity(LastTwo):
    """Order 2 with exact tensors: the same predictions, made from the last two, which takes one pass less."""

    number = 2
    damped = True
    __slots__ = ("_damping",)

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        super().__init__(damping, new_cell)
        self._damping = damping

    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]:
        return self.with_velocity(self._damping, rounded)


PREDICTORS: tuple[type[Predictor], ...] = (Memoryless, LastValue, DampedVelocity)
"""By order: 0 no prediction, 1 last value, 2 last value and damped velocity."""


def predictor_class(order: Order) -> type[Predictor]:
    """The predictor of an order, which knows what the order means.

    Raises:
        ConfigError: there is none.
    """
    if order == "auto":
        from compactdist.state.adaptive import AdaptiveVelocity

        return AdaptiveVelocity
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order < len(PREDICTORS):
        raise ConfigError(f'order must be an integer from 0 to {len(PREDICTORS) - 1} or "auto", got {order!r}')
    return PREDICTORS[order]
