"""What a ProcessGroup has besides calls: hooks, other peers, one-sided windows (most of it since torch 2.14).

All of it is handed to the inner group, or refused where its meaning would silently change: a hook on the inner group
sees frames instead of tensors, and other peers would be sent residuals of what they never received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from compactdist import _torch
from compactdist.errors import ConfigError
from compactdist.observe.stats import PassReason

__all__ = ["BeyondCalls"]


class BeyondCalls:
    """Hooks, timeouts, peers and windows of a wrapped group."""

    if TYPE_CHECKING:
        inner: Any
        _engine: Any
        _pass: Any

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise ConfigError(f"{self._engine.label}: {name}() of a wrapped group is refused: {why}")

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _has_hooks(self) -> bool:
        """Whether the inner group has completion hooks."""
        return bool(self.inner._has_hooks())

    def _register_on_completion_hook(self, hook: Any) -> None:
        """Call ``hook`` after each of the inner group's works; it is told of frames."""
        self.inner._register_on_completion_hook(hook)

    def _wait_for_pending_works(self) -> None:
        """Wait for the inner group's works."""
        self.inner._wait_for_pending_works()

    def _enable_collectives_timing(self) -> None:
        """Switch timing on in the inner group."""
        self.inner._enable_collectives_timing()

    def register_abort_hook(self, hook_id: int, hook: Any) -> None:
        """Call ``hook`` before the inner group is aborted."""
        self.inner.register_abort_hook(hook_id, hook)

    def unregister_abort_hook(self, hook_id: int) -> None:
        """Undo ``register_abort_hook``."""
        self.inner.unregister_abort_hook(hook_id)

    def _refuse_hook(self, name: str) -> NoReturn:
        self._refuse(
            name,
            f"a hook would see frames (uint8) instead of the call's tensors. Use inner.{name}() of this group if that "
            "is what you want",
        )

    def register_pre_hook(self, hook_id: int, hook: Any) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        self._refuse_hook("register_pre_hook")

    def register_post_hook(self, hook_id: int, hook: Any) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        self._refuse_hook("register_post_hook")

    def unregister_pre_hook(self, hook_id: int) -> None:
        """Nothing to undo."""

    unregister_post_hook = unregister_pre_hook

    # --- timeouts -----------------------------------------------------------------------------------------------------

    def _add_ephemeral_timeout(self, timeout: Any) -> None:
        """Give later works more time. torch asks every group it knows, so a registered inner group was asked itself."""
        if not _torch.is_registered(self.inner):
            self.inner._add_ephemeral_timeout(timeout)

    # --- peers --------------------------------------------------------------------------------------------------------

    @property
    def supports_reconfigure(self) -> bool:
        """No: see ``reconfigure``."""
        return False

    def _refuse_peers(self, name: str) -> NoReturn:
        self._refuse(
            name,
            "other peers hold no history of this group. close() it, reconfigure the inner group, and wrap that again",
        )

    def get_reconfigure_handle(self) -> str:
        """Refused, see ``reconfigure``.

        Raises:
            ConfigError: always.
        """
        self._refuse_peers("get_reconfigure_handle")

    def reconfigure(self, opts: Any) -> Any:
        """Refused: other peers hold no history.

        Raises:
            ConfigError: always.
        """
        self._refuse_peers("reconfigure")

    def merge_remote_group(self, *args: Any, **kwargs: Any) -> Any:
        """A plain group of the inner group's ranks and others."""
        return self.inner.merge_remote_group(*args, **kwargs)

    # --- one-sided windows --------------------------------------------------------------------------------------------

    @property
    def supports_window(self) -> bool:
        """Whether the inner group has windows."""
        return bool(self.inner.supports_window)

    def new_window(self, tensor: Any = None) -> Any:
        """A window of the inner group. What is put into it and read from it is neither compressed nor counted."""
        self._pass("new_window", PassReason.OP, 0)
        return self.inner.new_window(tensor)
