"""State of the process that threads may read and change at the same time."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class LiveSet:
    """Objects that are found here as long as something else keeps them alive.

    One thread may build, copy or delete models while another one trains: adding, forgetting and iterating are one
    operation on a built-in set each, and an iteration walks over a copy. `weakref.WeakSet` iterates over itself, and
    fails when another thread adds an object or lets one die.

    Attributes:
        version: another object after every change, to tell whether what was read is still up to date. Objects that
            die leave it alone: who keeps a weak reference sees it himself.
    """

    def __init__(self):
        self._references: set[weakref.ref] = set()
        self.version = object()

    def add(self, member: Any) -> None:
        """Add an object, or note that one that is here has changed."""
        self._references.add(weakref.ref(member, self._references.discard))
        self.version = object()

    def __iter__(self) -> Iterator[Any]:
        members = [reference() for reference in self._references.copy()]
        return iter([member for member in members if member is not None])

    def __bool__(self) -> bool:
        return bool(self._references)


def made_once(make: Callable[[type], type]) -> Callable[[type], type]:
    """Cache what a function makes of a class, so that threads that ask for it at once get one object.

    `functools.cache` may make two, of which pickle then refuses one.
    """
    cached = functools.cache(make)
    lock = threading.RLock()

    @functools.wraps(make)
    def made(cls: type) -> type:
        with lock:
            return cached(cls)

    return made
