"""Which plan is meant: presets, recipes with their knobs, and the tuned plans at hand."""

import ast
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blockcache import api, recipes, sparse
from blockcache.demo.settings import Settings
from blockcache.errors import BlockCacheError, PlanError, PlanMismatchError
from blockcache.methods.presets import BUDGETS
from blockcache.pipelines import recipe_table
from blockcache.plan import Fingerprint, Plan, Recipe

FOLDER = "plans"
"""Plans that come with a model lie in this folder of it."""

_DB = "psnr_db_median"


@dataclass(frozen=True)
class Tuned:
    """A plan with the name it goes by."""

    name: str
    plan: Plan

    @property
    def psnr_db(self) -> float | None:
        """The median the tuning measured on other prompts; None where none was."""
        return self.plan.reached.get(_DB)

    @property
    def speed(self) -> float:
        """What it is ranked by: the speed-up that was measured, or 0."""
        return self.plan.reached.get("speedup", 0.0)

    @property
    def words(self) -> str:
        """Name and promise in one line."""
        parts = [self.name]
        if self.psnr_db is not None:
            parts.append(f"{self.psnr_db:.1f} dB")
        if self.speed:
            parts.append(f"{self.speed:.1f}x")
        return ", ".join(parts)


def read_plan(path: Path, name: str | None = None) -> Tuned:
    """A plan file. Errors name the file, not where it lies.

    Raises:
        PlanError: no plan.
    """
    name = name or path.name
    try:
        return Tuned(name, Plan.load(path))
    except PlanError as error:
        raise type(error)(str(error).replace(str(path), name)) from None


def plans_in(folder: Path) -> list[Tuned]:
    """Every plan file of a folder; none if there is no such folder.

    Raises:
        PlanError: a file that is no plan.
    """
    return [read_plan(path, path.stem) for path in sorted(folder.glob("*.json"))]


def fitting(plans: Iterable[Tuned], mark: Fingerprint) -> list[Tuned]:
    """Those made for this very model."""
    return [tuned for tuned in plans if _fits(tuned.plan, mark)]


def _fits(plan: Plan, mark: Fingerprint) -> bool:
    try:
        plan.fingerprint.check(mark)
    except PlanMismatchError:
        return False
    return True


def pick(plans: Iterable[Tuned], psnr_db: float, model: str) -> Tuned:
    """The fastest tuned plan that reached this quality.

    Raises:
        BlockCacheError: none did.
    """
    measured = [tuned for tuned in plans if tuned.psnr_db is not None]
    if not measured:
        raise BlockCacheError(
            f"no plan has been tuned for {model} yet: open Tune and make one, or take a preset"
        )
    enough = [tuned for tuned in measured if (tuned.psnr_db or 0.0) >= psnr_db]
    if not enough:
        best = max(measured, key=lambda tuned: tuned.psnr_db or 0.0)
        raise BlockCacheError(
            f"no tuned plan for {model} reaches {psnr_db:g} dB; the nearest is {best.words}. "
            "Ask for less, or tune one"
        )
    return max(enough, key=lambda tuned: (tuned.speed, -(tuned.psnr_db or 0.0)))


def choose(settings: Settings, plans: Iterable[Tuned]) -> tuple[str, Recipe | Plan]:
    """The name and what to enable. plans: those at hand that fit the model.

    Raises:
        BlockCacheError: an unknown word, recipe, knob or plan, or no plan that is good enough.
    """
    way, what = settings.way, settings.what
    if way == "preset":
        if what not in BUDGETS:
            raise PlanError(f"unknown preset {what[:40]!r} (known: {', '.join(BUDGETS)})")
        return what, api.read(what)
    if way == "recipe":
        return _recipe(what, settings.knobs)
    if way == "target":
        tuned = pick(plans, _decibels(what), settings.model)
        return tuned.name, tuned.plan
    named = {tuned.name: tuned for tuned in plans}
    if what not in named:
        known = ", ".join(named) or "none yet; upload a plan file or tune one"
        raise PlanError(f"no plan {what[:40]!r} here that fits {settings.model} (known: {known})")
    return named[what].name, named[what].plan


def _decibels(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BlockCacheError(f"the quality must be a number of dB, found {text[:40]!r}") from None


def usable_recipes() -> list[str]:
    """Recipes that need neither a trace nor real runs, then the ways to thin attention out."""
    own = [name for name in recipes.names() if not recipes.needs(name)]
    return [*own, *sparse.names()]


def about(name: str) -> str:
    """A recipe's knobs with their defaults, and where it comes from."""
    if name in recipes.names():
        make = recipes.function(name)
        return f"{recipe_table.paper(make)}. Settings: {recipe_table.settings(make) or 'none'}"
    if name in sparse.names():
        first = (inspect.getdoc(type(sparse.by_name(name))) or name).split("\n\n")[0]
        return f"Sparse attention: {' '.join(first.split())}"
    return ""


def _recipe(name: str, knobs: str) -> tuple[str, Recipe | Plan]:
    if name not in usable_recipes():
        if name in recipes.names():
            # Says what it cannot be made without.
            recipes.by_name(name)
        known = ", ".join(usable_recipes())
        raise PlanError(f"unknown recipe {name[:40]!r} (known: {known})")
    if not knobs:
        return name, api.read(name)
    if name in sparse.names():
        raise PlanError(f"{name} takes no settings here")
    try:
        return f"{name} {knobs}", recipes.by_name(name, **read_knobs(knobs))
    except PlanError:
        raise
    except (ValueError, TypeError) as error:
        raise PlanError(f"recipe {name!r}: {str(error).splitlines()[0]}") from None


def read_knobs(text: str) -> dict[str, object]:
    """`interval=3, order=1` as a dictionary.

    Raises:
        PlanError: anything else.
    """
    wrong = f"settings are written name=value, name=value; found {text[:80]!r}"
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise PlanError(wrong)
        return {str(knob.arg): _value(knob.value) for knob in call.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise PlanError(wrong) from None


def _value(found: ast.expr) -> object:
    """A number, a tuple, True, None; a bare word is itself."""
    return found.id if isinstance(found, ast.Name) else ast.literal_eval(found)
