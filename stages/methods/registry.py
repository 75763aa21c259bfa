"""Methods by name. `name:key=value+key=value` changes a method's settings, which is how ablations are written:

tinytrain:rule=random        channels at random instead of by Fisher information
tinytrain:criterion=l2       layers by the norm of their weights
tinytrain:ratios=0.25+macs=30%   (several ratios: ratios=0.5/0.25)
tinytl:bias=true             lite residual modules and the backbone's biases
tinytl:drop=0.6              modules beside the last 40 % of the blocks only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from stages.errors import UsageError
from stages.methods.plans import Shortcut, TinyTrain, named, nothing, planned, sparse_update
from stages.methods.task import Method
from stages.methods.tinytl import TinyTL
from stages.methods.transductive import Transductive
from stages.planning.baselines import is_plan, plan_names

Factory = Callable[..., Method]


def _searched(search: type[TinyTrain]) -> Factory:
    return lambda **settings: planned(search(**settings))


METHODS: Mapping[str, Factory] = {
    "none": lambda: nothing,
    "full": lambda: planned(named("full")),
    "last-layer": lambda: planned(named("last-layer")),
    "bias": lambda: planned(named("bias")),
    "sparse-update": lambda: planned(sparse_update),
    "tinytrain": _searched(TinyTrain),
    "shortcut": _searched(Shortcut),
    "transductive": Transductive,
    "tinytl": TinyTL,
    "adapter-drop-75": lambda: TinyTL(drop=0.75),
    "adapter-drop-50": lambda: TinyTL(drop=0.5),
    "adapter-drop-25": lambda: TinyTL(drop=0.25),
}
"""Name -> what makes the method from its settings. Every named plan is a method too: `last-3`, `mcunet-49kb`, ..."""

_SETTINGS: Mapping[str, type] = {
    "tinytrain": TinyTrain,
    "shortcut": Shortcut,
    "transductive": Transductive,
    "tinytl": TinyTL,
}


def find_method(text: str) -> Method:
    """The method of a name with settings. Raises `UsageError` for an unknown name or setting."""
    if is_plan(text) and text not in METHODS:
        return planned(named(text))
    name, _, rest = text.partition(":")
    settings = _settings(name, rest) if rest else {}
    if name in METHODS:
        return METHODS[name](**settings)
    known = ", ".join([*METHODS, *(plan for plan in plan_names() if plan not in METHODS)])
    raise UsageError("--methods", repr(name), f"one of {known}")


def _settings(name: str, text: str) -> dict[str, Any]:
    """`key=value+...` as arguments, each value of the type of the setting's default."""
    made = _SETTINGS.get(name)
    defaults = {each.name: each.default for each in fields(made)} if made else {}
    settings: dict[str, Any] = {}
    for part in text.split("+"):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(defaults) or "none"
            raise UsageError("--methods", f"setting {part!r} of {name}", f"key=value, with keys {known}")
        settings[key] = _value(defaults[key], value, f"{name}:{key}")
    return settings


def _value(default: object, text: str, where: str) -> object:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        if isinstance(default, tuple):
            return tuple(float(part) for part in text.split("/"))
        return type(default)(text)  # type: ignore[call-arg]
    except (KeyError, ValueError) as error:
        raise UsageError("--methods", f"{where}={text}", f"a value such as {default}") from error
