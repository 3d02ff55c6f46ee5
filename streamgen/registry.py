"""Named extensions: registered by a decorator here or elsewhere, or found as entry points of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from streamgen.errors import InputError


class Registry:
    """Name -> (class, options dataclass). Entry points of `group` are loaded when an unknown name is asked for."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._items: dict[str, tuple[type, type]] = {}

    def register(self, name: str, options: type) -> Callable[[type], type]:
        """Class decorator. Raises ValueError if another class holds the name; the message names both."""

        def add(cls: type) -> type:
            other = self._items.get(name)
            if other and (other[0].__module__, other[0].__qualname__) != (cls.__module__, cls.__qualname__):
                origins = f"{other[0].__module__} and {cls.__module__}"
                raise ValueError(f"{self.kind} {name!r} is registered twice: by {origins}")
            self._items[name] = (cls, options)
            return cls

        return add

    def names(self) -> list[str]:
        return sorted(self._items)

    def get(self, name: str) -> tuple[type, type]:
        """(class, options class). Raises InputError that lists the choices."""
        if name not in self._items:
            for point in metadata.entry_points(group=self.group, name=name):
                point.load()
        if name not in self._items:
            raise InputError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self.names())}")
        return self._items[name]
