"""Links by name, for ``compactdist plan``: nominal speeds, in one direction."""

from __future__ import annotations

import math
import re

from compactdist.errors import ConfigError

__all__ = ["LINKS", "link_of"]

LINKS = {"pcie3": 126.0, "pcie4": 252.0, "pcie5": 504.0, "nvlink3": 2400.0, "nvlink4": 3600.0}
"""Gbit/s of sixteen lanes of PCIe after its line code, and of all NVLinks of an A100 and of an H100."""

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([mg])(?:bit|bit/s|bps)", re.IGNORECASE)


def link_of(name: str | None, gbps: float | None) -> tuple[str, float]:
    """Name and Gbit/s of the link that ``--link`` or ``--gbps`` gives.

    Raises:
        ConfigError: neither is given, or both, or it is no link.
    """
    known = f"a speed, as 100mbit, 1gbit or 10gbit, or one of {', '.join(LINKS)}"
    if (name is None) == (gbps is None):
        given = "neither is" if name is None else "both are"
        raise ConfigError(f"give --link ({known}) or --gbps NUMBER: {given} given")
    if gbps is not None:
        if not 0 < gbps < math.inf:
            raise ConfigError(f"--gbps is a number above 0, got {gbps:g}")
        return f"{gbps:g} Gbit/s", gbps
    assert name is not None
    named = LINKS.get(name.lower())
    if named is not None:
        return f"{name.lower()}, {named:g} Gbit/s", named
    read = _NUMBER.fullmatch(name.strip())
    speed = 0.0 if read is None else float(read[1]) * (1e-3 if read[2].lower() == "m" else 1.0)
    if not speed:
        raise ConfigError(f"--link {name!r} is not {known}")
    return f"{speed:g} Gbit/s", speed
