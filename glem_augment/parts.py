"""The register of parts: a kind, the name in a config, stands for a class and the options of its constructor.

Flows, couplings, codecs, class models and policies are parts. An object of a registered class records its options, so
that a saved model can be built again.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from glem_augment.checks import closest

# The arguments that a model gives to parts of a room; all others are options. A flow and a coupling share their place
# in a config, so no flow has the name of a coupling.
GIVEN = {
    "flow": ("image_shape",),
    "coupling": ("channels", "subnet", "shape", "index"),
    "codec": ("image_shape",),
    "class model": ("num_classes", "shape"),
    "policy": (),
}
_TOGETHER = {"flow": ("flow", "coupling"), "coupling": ("flow", "coupling")}
# The settings of a flow; options have other names.
SETTINGS = {"preset", "image_shape", "coupling", "whiten", "depth", "blocks", "width"}
SETTINGS |= {"actnorm", "subnet", "activation", "patch", "module"}
CUSTOM = "custom"  # in place of a kind: a user's object that is no part, and has to be given when a model is loaded
_WORDS = {float: "finite number", int: "whole number", str: "text", bool: "bool"}
_REGISTER: dict[str, dict[str, type[Any]]] = {room: {} for room in GIVEN}
_Part = TypeVar("_Part", bound=type[Any])


def register(room: str, kind: str, base: type[Any]) -> Callable[[_Part], _Part]:
    """A class decorator: models then know the subclass of `base` by the name `kind`.

    TypeError: no subclass. ValueError: a name that is taken or no word, or an option without a default that is a bool,
    an int, a float or a text.
    """

    def decorate(part: _Part) -> _Part:
        if not (isinstance(part, type) and issubclass(part, base)):
            raise TypeError(f"{part!r} is no subclass of {base.__name__}")
        before = next((_REGISTER[r][kind] for r in _TOGETHER.get(room, (room,)) if kind in _REGISTER[r]), part)
        # A cell that runs twice registers the same class again.
        same = (before.__module__, before.__qualname__) == (part.__module__, part.__qualname__)
        if not re.fullmatch(r"[A-Za-z][\w-]{0,39}", kind) or kind == CUSTOM or not same:
            raise ValueError(f"the name {kind!r} is taken, or no word: choose another name for {part.__qualname__}")
        for option, default in options(part, room).items():
            if option in SETTINGS or type(default) not in _WORDS:
                raise ValueError(
                    f"the option {option!r} of {kind} has a name that flows use, or no default that is a bool, int, "
                    "float or str: rename it, or give it one"
                )
        _REGISTER[room][kind] = part
        _record(part, room)
        return part

    return decorate


def _record(part: type[Any], room: str) -> None:
    """Let objects of the class, but not of subclasses, keep the options that they are made with."""
    make = part.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is part:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.__dict__["recorded"] = {n: v for n, v in [*bound.arguments.items()][1:] if n not in GIVEN[room]}
        make(self, *args, **kwargs)

    part.__init__ = init


def find(room: str, kind: object) -> type[Any]:
    """The class that is registered as `kind`. ValueError: there is none."""
    known = _REGISTER[room]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"there is no {room} {str(kind)[:40]!r}: import the module that registers it (registered are "
            f"{', '.join(known)}{closest(kind, known)})"
        )
    return known[kind]


def kinds(room: str) -> dict[str, type[Any]]:
    """The registered classes of a room by their names."""
    return _REGISTER[room]


def kind_of(room: str, part: object) -> str | None:
    """The name under which the class of an object is registered; None: it is not."""
    return next((kind for kind, known in _REGISTER[room].items() if known is type(part)), None)


def options(part: type[Any], room: str) -> dict[str, Any]:
    """Names and defaults of the options of a class, from its constructor; `inspect.Parameter.empty` for none."""
    found = [*inspect.signature(part.__init__).parameters.values()][1:]
    return {p.name: p.default for p in found if p.name not in GIVEN[room]}


def recorded(part: Any) -> dict[str, Any]:
    """The options of an object, checked. ValueError: the constructor was given what a config can't hold."""
    room = next(room for room in GIVEN if kind_of(room, part) is not None)
    check_options(type(part), room, part.__dict__["recorded"])
    return dict(part.__dict__["recorded"])


def check_options(part: type[Any], room: str, given: Mapping[str, Any]) -> None:
    """ValueError: an option has another type than its default, or is not finite. They may come from a stranger."""
    for name, default in options(part, room).items():
        value = given.get(name, default)
        types = (float, int) if type(default) is float else (type(default),)
        if type(value) not in types or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} must be a {_WORDS[type(default)]}, got {str(value)[:80]!r}")
    if unknown := sorted(set(given) - set(options(part, room))):
        raise ValueError(f"{part.__name__} has no option {unknown[:5]}; it has {sorted(options(part, room))}")
