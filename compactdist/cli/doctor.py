"""``compactdist doctor``: look at everything that compression depends on, and try it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from compactdist import __version__
from compactdist.cli.findings import Finding, Status, show_findings, worst
from compactdist.cli.ranks_check import between_launched_ranks, between_own_ranks, is_launched, rank_findings
from compactdist.cli.streams_check import StreamCheck, check_streams, show_streams, stream_findings, streams
from compactdist.cli.surroundings import (
    cache_findings,
    compiled_kernels,
    machine_findings,
    options_of,
    variable_findings,
    version_findings,
)
from compactdist.errors import CompactDistError, ConfigError

__all__ = ["CODEC_CHOICES", "Examination", "examine", "show"]

_GRACE_SECONDS = 3.0
"""Ranks that do not meet give up at the same time, and torchrun ends all when the first of them fails."""

CODEC_CHOICES = ("presets", "all")


@dataclass
class Examination:
    """What ``doctor`` saw.

    Attributes:
        findings: in the order they are shown.
        streams: the self check, a row for each stream and device.
        fingerprint: what ``wrap()`` would compare between ranks; empty where the variables are wrong.
        ranks: what the check between ranks gave; ``None`` where there was none.
    """

    findings: list[Finding] = field(default_factory=list)
    streams: list[StreamCheck] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, Any] | None = None

    @property
    def status(self) -> Status:
        """The gravest of all findings."""
        return worst(self.findings)

    @property
    def errors(self) -> list[str]:
        """The findings that are errors, as text."""
        return [str(one) for one in self.findings if one.status == "error"]

    @property
    def speaks(self) -> bool:
        """Whether this process prints: of the ranks that torchrun started, the first does."""
        return not is_launched(os.environ) or os.environ["RANK"] == "0"

    @property
    def unheard(self) -> list[str]:
        """Errors of a rank that the first rank, which did not meet it, cannot print."""
        return self.errors if self.ranks is None or "ranks" not in self.ranks else []

    @property
    def fails(self) -> bool:
        """Whether this process ends with status 1.

        torchrun kills all ranks when one fails, so a rank whose errors the first one prints leaves that to it.
        """
        return self.status == "error" and (self.speaks or bool(self.unheard))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "command": " ".join(["compactdist", *sys.argv[1:]]),
            "compactdist": __version__,
            "status": self.status,
            "fingerprint": self.fingerprint,
            "findings": [one.to_dict() for one in self.findings],
            "streams": [one.to_dict() for one in self.streams],
            "ranks": self.ranks,
        }


def examine(codecs: str = "presets", ranks: int = 0, timeout: float = 30.0) -> Examination:
    """Look at everything.

    Args:
        codecs: ``"presets"``, or ``"all"`` for every registered codec, too.
        ranks: processes to start for the check between ranks; 0: none. Under torchrun its ranks are checked.
        timeout: seconds that a call between ranks may take.

    Raises:
        ConfigError: an argument is none of these.
    """
    launched = is_launched(os.environ)
    if codecs not in CODEC_CHOICES:
        raise ConfigError(f"--codecs is {' or '.join(CODEC_CHOICES)}, got {codecs!r}")
    if launched and ranks:
        started = os.environ["WORLD_SIZE"]
        raise ConfigError(f"--ranks {ranks} under torchrun, whose {started} ranks are checked: leave it out")
    if ranks == 1:
        raise ConfigError("--ranks 1 would send nothing: take 2 or more, or leave it out")
    seen = Examination([*version_findings(), *machine_findings()])
    variables = variable_findings(os.environ)
    seen.findings += variables
    try:
        seen.fingerprint = options_of(os.environ).fingerprint()
    except CompactDistError:  # found above
        assert worst(variables) == "error"
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    before, began = compiled_kernels(), time.monotonic()
    seen.streams = check_streams(streams(codecs == "all"), devices)
    seen.findings += cache_findings(before, time.monotonic() - began)
    seen.findings += stream_findings(seen.streams)
    _check_ranks(seen, launched, ranks, timeout)
    return seen


def _check_ranks(seen: Examination, launched: bool, ranks: int, timeout: float) -> None:
    if launched:
        seen.ranks = between_launched_ranks(timeout, seen.errors)
    elif ranks and not seen.fingerprint:
        seen.findings.append(Finding("Ranks", f"{ranks} ranks", "not tried, as the environment variables are wrong"))
    elif ranks:
        seen.ranks = between_own_ranks(ranks, timeout)
    else:
        told = "not tried: --ranks 2, or torchrun --nproc-per-node 2 -m compactdist.cli doctor"
        seen.findings.append(Finding("Ranks", "between ranks", told))
    if seen.ranks is not None:
        seen.findings += rank_findings(seen.ranks, int(os.environ.get("RANK", 0)))


def tell_unheard(seen: Examination) -> None:
    """On another rank than the first: print on stderr what the first cannot know, and let that print before we fail."""
    for error in seen.unheard:
        sys.stderr.write(f"rank {os.environ['RANK']}: {error}\n")
    sys.stderr.flush()
    if seen.unheard:
        time.sleep(_GRACE_SECONDS)


def show(seen: Examination, shown_on: Console) -> None:
    """Print everything, and last what it comes to."""
    after = ("Self check", "Ranks")
    show_findings([one for one in seen.findings if one.section not in after], shown_on)
    show_streams(seen.streams, shown_on)
    show_findings([one for one in seen.findings if one.section in after], shown_on)
    counts = {status: sum(one.status == status for one in seen.findings) for status in ("error", "warning")}
    told = ", ".join(f"{n} {status}{'s' if n > 1 else ''}" for status, n in counts.items() if n)
    shown_on.print(told or "all is well", style={"error": "red", "warning": "yellow", "ok": "green"}[seen.status])
