"""What every recipe does, read off the recipes: `blockcache recipes` and docs/methods.md."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from blockcache import methods
from blockcache.plan import Gate, MaskTable, Recipe, Rule, Within
from blockcache.plan.policies import StaticPolicy
from blockcache.plan.trace import Place, SiteTrace, Trace

COLUMNS = ("recipe", "paper", "what", "when", "how", "guards", "calibrated", "state")
LESS_URGENT = ("how", "guards", "state")

# FLUX.1-dev at 1024 x 1024 px: image and text tokens, width, blocks; 2 bytes each.
_TOKENS, _WIDTH, _BLOCKS, _LATENTS = 4096 + 512, 3072, 57, 4096 * 64
_MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One recipe with its defaults."""

    name: str
    paper: str
    what: str
    when: str
    how: str
    guards: str
    calibrated: str
    state: str
    settings: str

    def cells(self) -> tuple[str, ...]:
        """The cells of `COLUMNS`."""
        values = (self.name, self.paper, self.what, self.when, self.how, self.guards)
        return (*values, self.calibrated, self.state)


def rows() -> list[Row]:
    """One row per recipe."""
    return [_row(name) for name in methods.names()]


def markdown(table: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"`{row.name}`", *row.cells()[1:]) for row in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(name: str) -> Row:
    make = methods.function(name)
    needed = methods.needs(name)
    recipe = make(**{what: _EXAMPLES[what]() for what in needed})
    rules = recipe.rules
    return Row(
        name,
        paper(make),
        _joined(f"{_site(rule)} {rule.payload}" for rule in rules),
        _joined(_when(rule.policy, needed) for rule in rules),
        _joined(map(_how, rules)),
        _joined(type(g).__name__ + _values(g) for rule in rules for g in rule.guards) or "-",
        {"trace": "trace", "score": "real runs"}.get("".join(needed), "no"),
        _state(recipe),
        settings(make),
    )


def title(make: Callable[..., Recipe]) -> str:
    """The first sentence of the recipe's file."""
    about = inspect.getdoc(sys.modules[make.__module__]) or ""
    return about.split("\n\n")[0].replace("\n", " ")


def paper(make: Callable[..., Recipe]) -> str:
    """Name and number of the paper, or the name alone."""
    first = title(make)
    number = re.search(r"\b\d{4}\.\d{5}\b", first)
    named = re.match(r"[^:(,.]+", first)
    name = named[0].strip() if named else first
    return f"{name}, {number[0]}" if number else name


def settings(make: Callable[..., Recipe]) -> str:
    """Parameters with their defaults."""
    parameters = inspect.signature(make).parameters.values()
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters
    )


def _site(rule: Rule) -> str:
    site = rule.site
    is_all = (site.lo, site.hi) == (0, None)
    where = "" if is_all else f" {site.lo}..{'' if site.hi is None else site.hi}"
    call = "" if rule.branch is None else f" of branch {rule.branch}"
    return f"{site.scope}{where}{call}"


def _when(policy: Any, needed: Sequence[str]) -> str:
    if isinstance(policy, MaskTable):
        return "calibrated table" if needed else "table"
    if isinstance(policy, Within):
        inside = f"{policy.start:g}..{policy.stop:g} of {policy.axis}"
        return f"{_when(policy.policy, needed)} in {inside}"
    if isinstance(policy, Gate):
        how = "summed, " if policy.accumulate else ""
        return f"gate on {policy.signal} ({how}since {policy.reference}) < {policy.threshold:g}"
    kind = "" if isinstance(policy, StaticPolicy) else "online: "
    return f"{kind}{type(policy).__name__}{_values(policy)}"


def _values(spec: Any) -> str:
    """The short fields of a spec, in brackets; of a flag its name, if it is set."""
    named = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values = [(name if v else "") if isinstance(v, bool) else v for name, v in named.items()]
    short = [v for v in values if isinstance(v, (int, float, str)) and v != ""]
    shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in short)
    return f"({shown})" if short else ""


def _how(rule: Rule) -> str:
    parts = [part for part in (rule.predictor, rule.corrector) if part is not None]
    return " + ".join(type(part).__name__ + _values(part) for part in parts)


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(parts))


def _state(recipe: Recipe) -> str:
    """Bytes of state per branch for FLUX.1-dev at 1024 px in bf16."""
    size = sum(_payload(rule) * rule.depth + _reference(rule) for rule in recipe.rules)
    return f"{size / _MIB:,.0f} MiB" if size >= _MIB else f"{size / 1024:,.0f} KiB"


def _payload(rule: Rule) -> int:
    lo, hi = rule.site.limits(_BLOCKS)
    stream = 2 * _TOKENS * _WIDTH
    sizes = {"stack": stream, "span": stream, "model": 2 * _LATENTS, "cross": 0, "transformer": 0}
    # Only the 19 two-stream blocks keep their MLPs in modules.
    per_block = {"block": hi - lo, "attn": hi - lo, "mlp": min(hi, 19) - min(lo, 19)}
    return sizes.get(rule.site.scope, per_block.get(rule.site.scope, 0) * stream)


def _reference(rule: Rule) -> int:
    if isinstance(rule.policy, StaticPolicy):
        return 0
    return 4 * _LATENTS * 2 if rule.site.scope == "model" else 2 * (_TOKENS - 512) * _WIDTH


def _example_trace() -> Trace:
    """A trace with every place in it. A row shows what a recipe is made of, not these numbers."""
    steps, blocks = 20, 2
    site = SiteTrace.of(np.random.default_rng(0).normal(size=(1, steps, 8)).cumsum(1))
    places = [("stack", 0, kind) for kind in ("residual", "output")]
    places += [("model", 0, "output")]
    places += [("block", i, "residual") for i in range(blocks)]
    places += [(scope, i, "output") for scope in ("attn", "cross", "mlp") for i in range(blocks)]
    sites = {Place(scope, i, kind, "0"): site for scope, i, kind in places}
    return Trace.of(sites, block_ms=(1.0,) * blocks, segments=site.l1[0])


_EXAMPLES: dict[str, Callable[[], Any]] = {
    "trace": _example_trace,
    "score": lambda: lambda recipe: 1.0,
}
