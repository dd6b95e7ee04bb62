"""The contract of a coupling, which has a registered name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from glem_augment.checks import closest

# (in_channels, out_channels) -> network
SubnetFactory = Callable[[int, int], nn.Module]
# A flow's `coupling` may also say that it has none.
WITHOUT_COUPLINGS = ("identity", "custom")
# The settings of a flow; options of a coupling have other names.
SETTINGS = {"preset", "image_shape", "coupling", "whiten", "depth", "blocks", "width"}
SETTINGS |= {"actnorm", "subnet", "activation", "patch"}
_WORDS = {float: "finite number", int: "whole number", str: "text", bool: "bool"}
_LARGEST_BOUND = 8


class Coupling(nn.Module):
    """Splits the channels in halves x1, x2; x1 passes unchanged, x2 is mapped with parameters made from x1.

    A new coupling is a subclass with `__init__(channels, subnet, **options)`, which sets `net`, and `transform`; it is
    registered with `register_coupling`. `subnet(inputs, outputs)` makes a network whose last layer is zero, so `net`
    gives zeros at the start.

    Attributes:
        options: names and defaults of the options, which presets, saved models and users may set.
        n: c / 2, the channels of a half.
        net: maps x1 [B, c/2, H, W] to parameters [B, m, H, W].
    """

    options: ClassVar[Mapping[str, Any]] = {}
    net: nn.Module

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """ValueError: a value of `options` that can't be used. It may come from a stranger's file.

        Here the type must be the default's, and numbers must be finite.
        """
        for name, default in cls.options.items():
            value, types = options[name], (float, int) if type(default) is float else (type(default),)
            good = type(value) in types and (not isinstance(value, float) or math.isfinite(value))
            if not good:
                raise ValueError(f"{name} must be a {_WORDS[type(default)]}, got {str(value)[:80]!r}")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n = channels // 2

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The map of the second half x2 [c/2, B, H, W], channel-major (see `multiscale`), or its inverse.

        `params` [B, m, H, W] come from the network. Returns the result and log|det| [B] in nats.
        """
        raise NotImplementedError

    def couple(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The whole layer on channel-major x [c, B, H, W]: ([c, B, H, W], log|det| [B])."""
        x1, x2 = x.split(self.n)
        y2, logdet = self.transform(x2, self.net(x1.transpose(0, 1)), inverse)
        return torch.cat([x1, y2]), logdet


def check_bound(bound: float) -> None:
    """ValueError unless the bound of log-scales or of ||S|| lies in (0, 8]."""
    if not 0 < bound <= _LARGEST_BOUND:
        raise ValueError(f"bound must lie in (0, {_LARGEST_BOUND}], got {bound!r}")


# ---- the register ----------------------------------------------------------------------------------------------------

COUPLINGS: dict[str, type[Coupling]] = {}
_Kind = TypeVar("_Kind", bound=type[Coupling])


def register_coupling(name: str) -> Callable[[_Kind], _Kind]:
    """A class decorator: presets, `create_flow` and saved models then know the coupling by `name`.

    ValueError: a name that is taken or no word, or an option of an unknown type. TypeError: no subclass of `Coupling`.
    """

    def register(kind: _Kind) -> _Kind:
        if not (isinstance(kind, type) and issubclass(kind, Coupling)):
            raise TypeError(f"{kind!r} is no subclass of Coupling")
        before = COUPLINGS.get(name, kind)
        # A cell that runs twice registers the same class again.
        same = (before.__module__, before.__qualname__) == (kind.__module__, kind.__qualname__)
        if not re.fullmatch(r"[A-Za-z][\w-]{0,39}", name) or name in WITHOUT_COUPLINGS or not same:
            raise ValueError(f"the name {name!r} is taken, or no word: choose another name for {kind.__qualname__}")
        for option, default in kind.options.items():
            if option in SETTINGS or type(default) not in _WORDS:
                raise ValueError(
                    f"the option {option!r} of {name} has a name that flows use, or a default that is no bool, int, "
                    "float or str: rename or change it"
                )
        COUPLINGS[name] = kind
        return kind

    return register


def find_coupling(name: object) -> type[Coupling]:
    """The class that is registered as `name`. ValueError: there is none."""
    if not isinstance(name, str) or name not in COUPLINGS:
        raise ValueError(
            f"this model needs the coupling {str(name)[:40]!r}: import the module that registers it (registered are "
            f"{', '.join(COUPLINGS)}{closest(name, COUPLINGS)})"
        )
    return COUPLINGS[name]
