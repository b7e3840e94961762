"""A request among several that a server interleaves: its own site keys, steps and history."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from compactdist.errors import CompactDistError, ConfigError
from compactdist.group.keys import Clock, KeyBook
from compactdist.state.site_key import REQUEST_PREFIX

__all__ = ["Request"]

_log = logging.getLogger("compactdist")


class Request:
    """One of several requests that a server interleaves; made by ``CompressedProcessGroup.request``.

    Attributes:
        name: the request's name.
        prefix: prefix of the request's site keys.
    """

    def __init__(self, name: str, keys: KeyBook, forget: Callable[[Request], None]) -> None:
        self.name = name
        self.prefix = f"{REQUEST_PREFIX}{name}"
        self._keys = keys
        self._forget = forget
        self._clock: Clock | None = Clock()
        self._scopes: list[AbstractContextManager[None]] = []

    def resume(self) -> AbstractContextManager[None]:
        """Let calls and steps of this thread belong to the request, inside a ``with`` block.

        Raises:
            ConfigError: the request has ended.
        """
        if self._clock is None:
            raise ConfigError(f"request '{self.name}' has ended: begin another with request()")
        return self._scope(self._clock)

    @contextmanager
    def _scope(self, clock: Clock) -> Iterator[None]:
        error: BaseException | None = None
        try:
            with self._keys.within_request(self.prefix, clock):
                yield
        except BaseException as on_its_way:
            error = on_its_way
            raise
        finally:
            if self._clock is None:  # ended inside the block: calls after that began histories anew
                with _behind(error):
                    self._forget(self)
            del error

    def restart(self) -> None:
        """Count steps from the first again, because the group was reset."""
        if self._clock is not None:
            self._clock.restart()

    def end(self) -> None:
        """Drop the request's history. Ending twice is fine.

        Raises:
            FrameError, NonFiniteError, LateExchangeError: what a late frame of the request has met, once its history is
                dropped. At the end of a ``with`` block it is logged instead where another error is on its way.
        """
        if self._clock is not None:
            self._clock = None
            self._forget(self)

    def __enter__(self) -> Request:
        scope = self.resume()
        scope.__enter__()
        self._scopes.append(scope)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._scopes.pop().__exit__(*exc)
        if not self._scopes:
            with _behind(exc[1]):
                self.end()


@contextmanager
def _behind(error: BaseException | None) -> Iterator[None]:
    """Log what the block raises of ours, where an error is on its way already."""
    try:
        yield
    except CompactDistError as late:
        if error is None:
            raise
        _log.error("%s", str(late))
