"""Functions of the user's own, named `package.module:function` on the command line; an artifact never names code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import PartMissing, UsageError, require


def own(name: str, option: str) -> Any:
    """The object that `package.module:name` names, imported.

    Raises:
        UsageError: not of that form, no such name in the module, or a module that fails to import.
        PartMissing: no such module.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(option, repr(name), "package.module:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PartMissing(option, f"no module {error.name!r} for {name}", "", "put its folder on PYTHONPATH") from error
    except AttributeError as error:
        raise UsageError(option, f"{module} has no {attribute!r}", "package.module:function") from error
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(option, f"{name} cannot be imported: {line}", "a module that can be imported") from error


def answers(function: Callable[..., Any], name: str, count: int, *arguments: Any) -> NDArray[np.float64]:
    """What the user's function says of `count` things: float64 (count,).

    Raises `UsageError` when it is no function, fails, or returns anything but one finite number for each.
    """
    require(callable(function), name, f"a {type(function).__name__}", "a function")
    try:
        found = np.asarray(function(*arguments), np.float64)
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(name, f"failed: {line}", "a function that returns numbers") from error
    right = found.shape == (count,) and bool(np.isfinite(found).all())
    require(right, name, f"returned an array of shape {found.shape}", f"{count} finite numbers")
    return found
