"""What rates are chosen for, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compactdist.codecs.base import Codec
from compactdist.errors import ConfigError

__all__ = ["STEERED", "Met", "Target", "check_steered"]

STEERED = "rates"
"""Id of the codec where a target is given and no codec."""

_MOST_DECIBELS = 300
_KINDS = {
    "nmse_db": "decibels from -300 to 300, as -32",
    "bits": "a number above 0",
    "bytes_per_step": "a number above 0",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What rates are chosen for.

    Attributes:
        kind: ``"nmse_db"``: energy of the error over the tensors', in decibels; ``"bits"``: of residual frames, headers
            and scales included, for each element; ``"bytes_per_step"``: of the residual frames that this rank encodes
            in a step, each counted once.
        value: the number.

    Raises:
        ConfigError: there is no such kind, or the value is out of range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"target must begin with one of {', '.join(f'{kind}=' for kind in _KINDS)}, got '{self}'")
        decibels = self.kind == "nmse_db"
        if not math.isfinite(self.value) or (abs(self.value) > _MOST_DECIBELS if decibels else self.value <= 0):
            raise ConfigError(f"target {self.kind}= takes {_KINDS[self.kind]}, got {self.value!r}")

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """A target from ``"nmse_db=-32"``, ``"bits=1.5"`` or ``"bytes_per_step=2e6"``.

        Raises:
            ConfigError: the text says something else.
        """
        if isinstance(text, Target):
            return text
        kind, _, number = str(text).partition("=")
        try:
            return cls(kind.strip(), float(number))
        except ValueError:  # of float, or a ConfigError
            takes = ", or ".join(f"{name}= and {what}" for name, what in _KINDS.items())
            raise ConfigError(f"target is {takes}, got {text!r}") from None

    @property
    def nmse(self) -> float:
        """The error that is asked for, as a ratio of energies; infinite where a size is asked for."""
        return 10 ** (self.value / 10) if self.kind == "nmse_db" else math.inf

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def check_steered(codec: Codec, target: Target) -> None:
    """Make sure that a codec has rates to choose from.

    Raises:
        ConfigError: it has just one.
    """
    if not codec.rates:
        raise ConfigError(
            f"target='{target}' chooses among the rates of a codec, and {codec!r} has just one: leave codec out, or "
            f"give codec='{STEERED}' with rungs of your choice"
        )


@dataclass(frozen=True, slots=True)
class Met:
    """What came of a target since the last reset, over all streams of this rank.

    Attributes:
        asked: the target.
        nmse_db: of residual frames; NaN before the first.
        bits: of residual frames, for each element; NaN before the first.
        bytes_per_step: of residual frames, by steps that had any; NaN before the first.
        request_bits: of all frames, keyframes too, for each element; NaN before the first.
    """

    asked: Target
    nmse_db: float
    bits: float
    bytes_per_step: float
    request_bits: float

    @property
    def met(self) -> float:
        """The figure that was asked for."""
        return float(getattr(self, self.asked.kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``None`` where there is no finite number."""
        values = {"met": self.met, "nmse_db": self.nmse_db, "bits": self.bits, "bytes_per_step": self.bytes_per_step}
        values["request_bits"] = self.request_bits
        return {"asked": str(self.asked)} | {n: v if math.isfinite(v) else None for n, v in values.items()}
