"""Published sparse-attention methods, one file each.

A file `name.py` defines a planner class whose lower-case name is the file's without underscores;
nothing else has to be edited for `by_name(name)` to know it.
"""

import importlib
import pkgutil

from blockcache.errors import PlanError
from blockcache.sparse.base import (
    Attended,
    Card,
    Context,
    Decision,
    Partial,
    Planner,
    State,
    attend,
)
from blockcache.sparse.recall import sampled_recall

_NO_METHOD = ("base", "pieces", "recall", "remainder", "table", "tilings")
_PLANNERS: dict[str, type[Planner]] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _NO_METHOD:
        _file = importlib.import_module(f"{__name__}.{_module.name}")
        _made = {name.lower(): value for name, value in vars(_file).items()}
        _PLANNERS[_module.name] = _made[_module.name.replace("_", "")]

__all__ = [
    "Attended",
    "Card",
    "Context",
    "Decision",
    "Partial",
    "Planner",
    "State",
    "attend",
    "by_name",
    "function",
    "names",
    "sampled_recall",
]


def names() -> tuple[str, ...]:
    """The names of all planners."""
    return tuple(sorted(_PLANNERS))


def function(name: str) -> type[Planner]:
    """The class of planner `name`.

    Raises:
        PlanError: there is no such planner.
    """
    if name not in _PLANNERS:
        raise PlanError(f"unknown planner {name!r} (known: {', '.join(names())})")
    return _PLANNERS[name]


def by_name(name: str, **settings: object) -> Planner:
    """Planner `name` with its defaults, or with `settings` in their place.

    Raises:
        PlanError: no such planner, unknown setting, or an impossible value.
    """
    return function(name)(**settings)
