"""Published methods, one file each.

A file `name.py` defines `name(...) -> Recipe`; nothing else has to be edited for
`recipes.name(...)`, `enable(pipe, "name")` and the command line to know it. A method that is
calibrated takes a trace as its first argument, `name(trace, ...)`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from blockcache.errors import PlanError
from blockcache.plan.recipe import Recipe

_NO_RECIPE = ("presets",)
_RECIPES: dict[str, Callable[..., Recipe]] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _NO_RECIPE:
        _file = importlib.import_module(f"{__name__}.{_module.name}")
        _RECIPES[_module.name] = getattr(_file, _module.name)
# Over the submodules of the same names, so that `recipes.first_block(...)` is the function.
globals().update(_RECIPES)


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(sorted(_RECIPES))


def needs(name: str) -> tuple[str, ...]:
    """What recipe `name` cannot be made without: "trace" for one that is calibrated."""
    parameters = inspect.signature(function(name)).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty)


def needs_trace(name: str) -> bool:
    """Whether recipe `name` is made from a trace of the uncached pipeline."""
    return "trace" in needs(name)


def function(name: str) -> Callable[..., Recipe]:
    """The function that makes recipe `name`.

    Raises:
        PlanError: there is no such recipe.
    """
    if name not in _RECIPES:
        raise PlanError(f"unknown recipe {name!r} (known: {', '.join(names())})")
    return _RECIPES[name]


def by_name(name: str, **settings: object) -> Recipe:
    """Recipe `name` with its defaults, or with `settings` in their place.

    Raises:
        PlanError: no such recipe, unknown setting, an impossible value, or a trace is missing.
    """
    make = function(name)
    missing = [what for what in needs(name) if what not in settings]
    if missing == ["trace"]:
        raise PlanError(
            f"recipe {name!r} is calibrated: make a trace with blockcache.trace(pipe, prompts) and "
            f"enable blockcache.recipes.{name}(trace)"
        )
    if missing:
        raise PlanError(
            f"recipe {name!r} cannot be made without {', '.join(missing)}: "
            f"see help(blockcache.recipes.{name})"
        )
    try:
        return make(**settings)
    except TypeError as error:
        raise PlanError(f"recipe {name!r}: {error}") from None


def __getattr__(name: str) -> Callable[..., Recipe]:
    raise AttributeError(f"no recipe {name!r} (known: {', '.join(names())})")
