"""What a site key says about the request that its calls belong to."""

from __future__ import annotations

__all__ = ["REQUEST_PREFIX", "is_under", "without_request"]

REQUEST_PREFIX = "request:"
"""Begins the first part of the key of every site of a request."""


def is_under(key: str, prefix: str | None) -> bool:
    """Whether a site key is a prefix or begins with that and a slash; every key is under ``None``."""
    return prefix is None or key == prefix or key.startswith(f"{prefix}/")


def without_request(site: str) -> tuple[str, str]:
    """A site key as the prefix of its request, empty without one, and the rest."""
    if not site.startswith(REQUEST_PREFIX):
        return "", site
    prefix, _, rest = site.partition("/")
    return prefix, rest
