"""Changes in a framework's objects, from outside and for a while."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterable
from typing import Any

_log = logging.getLogger("compactdist")


def call_all(functions: Iterable[Callable[[], Any]]) -> None:
    """Call all functions, whatever some of them raise.

    Raises:
        The first error, once all were called; later ones are logged.
    """
    first: Exception | None = None
    for function in functions:
        try:
            function()
        except Exception as error:
            if first is None:
                first = error
            else:
                _log.error("%s", str(error))
    if first is not None:
        raise first


class _InOneInstance:
    """In place of a method of one object. A deep copy of the object, and one that was pickled, has the method itself:
    pipelines copy their schedulers.

    Args:
        method: bound to the object.
        instead: what is called; its signature is the method's.
    """

    def __init__(self, method: types.MethodType, instead: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self._method, self._instead = method, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._method.__self__))  # being made, as this is one of its attributes
        return self._method if copied is None else types.MethodType(self._method.__func__, copied)

    def __reduce__(self) -> Any:
        return getattr, (self._method.__self__, self._method.__name__)


class Patches:
    """Changes something in objects of others, and undoes all changes in reverse order.

    An attribute is replaced in the instance, module or class itself: some wrappers forward `setattr` to the object they
    wrap. `undo()` puts the attribute's old value back, or removes the attribute where the owner had none of its own.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __bool__(self) -> bool:
        """Whether there is a change to undo."""
        return bool(self._undo)

    def add(self, undo: Callable[[], Any]) -> None:
        """Call `undo` when this is undone; for changes made elsewhere, such as hooks and wrapped groups."""
        self._undo.append(undo)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Give an attribute of `owner` another value."""
        own = vars(owner)
        before = (own[name],) if name in own else ()
        _put(owner, name, (value,))
        self.add(lambda: _put(owner, name, before))

    def wrap(self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a function by `around(function)`, which keeps its name and signature.

        Frameworks read signatures to see which arguments a function takes.
        """
        original = getattr(owner, name)
        if isinstance(original, types.MethodType) and original.__self__ is owner and not isinstance(owner, type):
            self.replace(owner, name, _InOneInstance(original, around(original)))
        else:
            self.replace(owner, name, functools.wraps(original)(around(original)))

    def before(self, owner: Any, name: str, first: Callable[[], Any]) -> None:
        """Call `first()` before every call of a function."""

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                first()
                return original(*args, **kwargs)

            return call

        self.wrap(owner, name, around)

    def after(self, owner: Any, name: str, then: Callable[..., Any]) -> None:
        """Call `then` after every call of a function, with the arguments of that call."""

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                then(*args, **kwargs)
                return result

            return call

        self.wrap(owner, name, around)

    def undo(self) -> None:
        """Undo every change, the last one first. Calling it again does nothing.

        Raises:
            Whatever a change raises that is undone, once all are: the first such error; later ones are logged.
        """
        changes = [*reversed(self._undo)]
        self._undo.clear()
        call_all(changes)


def _put(owner: Any, name: str, value: tuple[Any, ...]) -> None:
    """Set an attribute of `owner` itself to the one value of a tuple, or remove it where the tuple is empty."""
    if isinstance(owner, type):
        if value:
            setattr(owner, name, value[0])
        elif name in vars(owner):
            delattr(owner, name)
    elif value:
        vars(owner)[name] = value[0]
    else:
        vars(owner).pop(name, None)
