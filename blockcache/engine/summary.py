"""The summary: one screen for people, one dictionary for programs."""

from dataclasses import dataclass
from typing import Any

from blockcache.engine.attention_stats import screen
from blockcache.engine.hooks import Attachment
from blockcache.engine.runner import COMPILED_WHOLE, Runner


@dataclass(frozen=True)
class Summary:
    """Figures of the last run of each enabled denoiser. `str` gives one screen."""

    models: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """The figures of the first denoiser; those of all are under "models"."""
        return {**self.models[0], "models": list(self.models)}

    def __str__(self) -> str:
        """One screen."""
        return "\n".join(_screen(model) for model in self.models)


def summarise(attached: dict[str, Attachment]) -> Summary:
    """Read the figures off what is attached to the denoisers."""
    return Summary(tuple(_figures(name, attachment) for name, attachment in attached.items()))


def _figures(name: str, attachment: Attachment) -> dict[str, Any]:
    runner = attachment.engine
    if not isinstance(runner, Runner):
        raise TypeError(f"expected a Runner, got {type(runner).__name__}")
    run = runner.last_run
    reasons = dict(run.reasons) if run else {}
    if attachment.is_traced or not attachment.is_in_place():
        reasons[COMPILED_WHOLE] = 1
    branches = [branch.as_dict() for branch in run.branches] if run else []
    return {
        "part": name,
        "model": type(runner.denoiser).__name__,
        "recipe": runner.recipe.name,
        "branches": branches,
        "cache_bytes": run.cache_bytes if run else 0,
        "skipped_fraction": run.skipped_fraction() if run else 0.0,
        "attention": run.attention.as_dict() if run and run.attention else None,
        "reasons": reasons,
    }


def _screen(model: dict[str, Any]) -> str:
    lines = [f"blockcache  {model['model']}  {model['recipe']}"]
    why = [f"{reason} ({count} times)" for reason, count in model["reasons"].items()]
    if not model["branches"]:
        return "\n".join([*lines, *(why or ["no run yet"])])
    lines.append("branch  steps  computed  reused  change min/median/max   drift estimate")
    for branch in model["branches"]:
        change, drift = branch["change"], branch["drift_db"]
        seen = "-" if change is None else "{min:.3f} / {median:.3f} / {max:.3f}".format(**change)
        shown = "-" if drift is None else f"{max(drift, 0.0):.0f} dB"
        lines.append(
            f"{branch['name']:6}  {branch['steps']:5}  {branch['computed']:8}  "
            f"{branch['reused']:6}  {seen:23}  {shown}"
        )
    shares = _shares(model)
    if shares:
        skipped = f"block calls skipped: {100 * model['skipped_fraction']:.0f} %"
        lines.append(f"{skipped}   cache {model['cache_bytes'] / 2**20:.2f} MiB   {shares}")
    calls = sum(branch["part_calls"] for branch in model["branches"])
    if calls:
        reused = sum(branch["part_calls_reused"] for branch in model["branches"])
        lines.append(f"sub-layer calls reused: {reused} of {calls} ({100 * reused / calls:.0f} %)")
    attention = screen(model["attention"]) if model["attention"] else []
    return "\n".join([*lines, *attention, *why])


def _shares(model: dict[str, Any]) -> str:
    """Which rule decided what share of all decisions; empty without rules."""
    totals: dict[str, int] = {}
    for branch in model["branches"]:
        for who, count in branch["decided"].items():
            totals[who] = totals.get(who, 0) + count
    all_of_them = sum(totals.values())
    if not all_of_them:
        return ""
    shares = sorted(totals.items(), key=lambda item: -item[1])
    return "decided by: " + ", ".join(f"{w} {100 * c / all_of_them:.0f} %" for w, c in shares)
