"""The axes of the search besides the mask: forecast, payload, site, branch, and attention.

A shape turns a mask into a recipe. All shapes are compared in the same time, not on the same mask:
what costs more per step computes fewer steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from blockcache import sparse
from blockcache.plan import Corrector, MaskTable, Recipe, Rule, Site, Sparse, Taylor
from blockcache.plan.paths import Path
from blockcache.plan.recipe import Payload, each_sub_layer

Guidance = Literal["every", "half", "late half"]
Axis = Literal["forecast", "payload", "site", "guidance", "attention"]

AXES: dict[str, tuple[Axis, ...]] = {
    "full": ("forecast", "payload", "site", "guidance", "attention"),
    "quick": ("forecast",),
}
SUB_LAYERS = Site("attn")
"""Stands for attentions, cross-attentions and MLPs alike."""
_WHAT: tuple[tuple[Site, Payload], ...] = (
    (Site("stack"), "residual"),
    (Site("stack"), "output"),
    (Site("model"), "output"),
)
_SPANS = (Site("span", 1), Site("span", 0, -1))
_GUIDANCE: tuple[Guidance, ...] = ("half", "late half")
_LATE = 0.35
"""Share of the run after which "late half" begins: by then the layout is decided."""
_SPARSE = (("cubes", 0.25), ("cubes", 0.12))


@dataclass(frozen=True)
class Shape:
    """How a mask becomes a recipe.

    site, payload: what is reused. order, fade: of the extrapolation. corrector: of the model's
    output, for Euler samplers. guidance: at which of the mask's steps the second branch is
    computed; in between, and where the mask reuses, the model's output for it is continued. sparse:
    of the computed steps.
    """

    site: Site = Site("stack")
    payload: Payload = "residual"
    order: int = 1
    fade: bool = False
    corrector: Corrector | None = None
    guidance: Guidance = "every"
    sparse: Sparse | None = None

    @property
    def name(self) -> str:
        """What is reused, in words."""
        words = [_PLACES[self.site] if self.site in _PLACES else str(self.site)]
        if self.site != SUB_LAYERS:
            words[0] = f"{self.payload} of {words[0]}"
        if self.order != 1:
            words.append(f"order {self.order}")
        if self.fade:
            words.append("fading")
        if self.corrector is not None:
            words.append("corrected")
        if self.guidance != "every":
            words.append(f"second branch at {self.guidance} of the steps")
        if self.sparse is not None:
            words.append(f"attention by {self.sparse.planner}")
        return ", ".join(words)

    @classmethod
    def first(cls, is_euler: bool) -> "Shape":
        """Where the search begins: with what can be corrected, if the sampler allows it."""
        return cls(Site("model"), "output", corrector=Corrector()) if is_euler else cls()

    def takes_as_long_as(self, other: "Shape") -> bool:
        """Whether a step costs the same, without measuring."""
        return (self.site, self.guidance, self.sparse) == (other.site, other.guidance, other.sparse)

    def recipe(self, computed: Path, sigmas: tuple[float, ...]) -> Recipe:
        """The mask's recipe for a run with these noise levels."""
        total = len(sigmas)
        table = MaskTable((tuple(map(int, computed)),), total, sigmas)
        rules = self._rules(table)
        if self.guidance != "every":
            rarely = MaskTable((thinned(table.computed[0], total, self.guidance),), total, sigmas)
            second = Rule(
                Site("model"),
                rarely,
                self._forecast,
                payload="output",
                branch=1,
                corrector=self.corrector,
            )
            rules = (*(replace(rule, branch=0) for rule in rules), second)
        return Recipe(rules, name=f"tuned {len(computed)}/{total}", sparse=self.sparse)

    def _rules(self, table: MaskTable) -> tuple[Rule, ...]:
        if self.site == SUB_LAYERS:
            return each_sub_layer(table, self._forecast)
        how = self._forecast
        return (Rule(self.site, table, how, payload=self.payload, corrector=self.corrector),)

    @property
    def _forecast(self) -> Taylor:
        return Taylor(self.order, fade=self.fade)

    def variants(self, axis: Axis, branches: int, sub_layers: bool) -> Iterator["Shape"]:
        """The other shapes along one axis, for a model with this many branches.

        sub_layers: whether those may be kept, which takes two outputs of each of them.
        """
        if axis == "forecast":
            yield replace(self, order=3 - self.order)
            yield replace(self, fade=not self.fade)
            if self.corrector is not None:
                yield replace(self, corrector=None)
        elif axis == "payload":
            others = [what for what in _WHAT if what != (self.site, self.payload)]
            for site, payload in others:
                yield replace(self, site=site, payload=payload, corrector=None)
        elif axis == "site":
            if self.site == Site("stack"):
                yield from (replace(self, site=span) for span in _SPANS)
            if sub_layers:
                yield replace(self, site=SUB_LAYERS, payload="output")
        elif axis == "guidance" and branches == 2:
            yield from (replace(self, guidance=how) for how in _GUIDANCE)
        elif axis == "attention":
            for name, density in _SPARSE:
                planner = sparse.by_name(name, density=density)
                yield replace(self, sparse=Sparse(planner))


_PLACES = {
    Site("stack"): "the stack",
    Site("model"): "the model",
    Site("span", 1): "all but the first block",
    Site("span", 0, -1): "all but the last block",
    SUB_LAYERS: "outputs of attentions and MLPs",
}


def thinned(computed: tuple[int, ...], total: int, guidance: Guidance) -> tuple[int, ...]:
    """Every second of the computed steps, from the beginning or from a third of the run on."""
    start = 0 if guidance == "half" else round(_LATE * total)
    early = tuple(step for step in computed if step < start)
    return early + tuple(step for step in computed if step >= start)[::2]
