"""Rules and recipes: a published method is one recipe."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from blockcache.plan.correctors import Corrector
from blockcache.plan.forecasts import ProbeRatio, ScaleShift
from blockcache.plan.guards import Guard
from blockcache.plan.policies import (
    Codebook,
    Gate,
    MaskTable,
    Policy,
    Ranked,
    StaticPolicy,
    Verified,
)
from blockcache.plan.predictors import Copy, Predictor
from blockcache.plan.sites import Layout, Scope, Site
from blockcache.plan.sparse_rule import Sparse
from blockcache.plan.spec import Count, spec
from blockcache.plan.steps import Step

Schedule = tuple[tuple[str, ...], ...]
"""[units][steps]: the name of what asks for computing, empty where the unit is reused."""

Payload = Literal["residual", "output"]
Branches = Literal["joint", "leader", "independent"]


@spec
class Rule:
    """Where, what, when and how to reuse, and what overrides it.

    site: where. policy: when to compute. predictor: how the payload is rebuilt. guards: what
    forces computing. payload: "residual" stores output - input and adds it to the fresh input;
    "output" stores the output, and the fresh input has no influence. What a sub-layer puts out is
    stored before the block scales it (un-gated) and is its output in any case. branch: the one
    denoiser call of a step that the rule is for (0 the first, 1 the second, which under guidance
    usually is the unconditional one); None for all of them. corrector: what a computed step makes
    good; it does nothing where the sampler is no Euler.
    """

    site: Site
    policy: Policy
    predictor: Predictor = Copy()
    guards: tuple[Guard, ...] = ()
    payload: Payload = "residual"
    branch: Count | None = None
    corrector: Corrector | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        policy, scope = self.policy, self.site.scope
        if self.branch is not None and not isinstance(policy, StaticPolicy):
            raise ValueError("a rule for one branch needs a static policy")
        if self.corrector is not None:
            self._check_corrector()
        if isinstance(policy, Gate):
            self._check_gate(policy)
        elif isinstance(self.predictor, ProbeRatio):
            raise ValueError("ProbeRatio needs a gate with a probe in front of the site")
        if isinstance(policy, Ranked) and (scope != "block" or self.predictor.depth < 2):
            raise ValueError("Ranked needs a 'block' site and a predictor with two anchors")
        if isinstance(policy, (Codebook, Verified)) and scope not in ("stack", "span"):
            raise ValueError(f"{type(policy).__name__} needs a 'stack' or 'span' site")

    def _check_gate(self, gate: Gate) -> None:
        scope = self.site.scope
        if (gate.signal == "latent") != (scope == "model"):
            raise ValueError("the signal 'latent' and the site 'model' go together")
        if scope not in ("stack", "span", "model"):
            raise ValueError(f"a gate needs a 'stack', 'span' or 'model' site, not {scope!r}")
        if isinstance(self.predictor, ProbeRatio) and not gate.needs_probe:
            raise ValueError("ProbeRatio needs the signal 'first_block' or 'probe'")
        if gate.batch == "sample" and (self.predictor.depth != 1 or scope == "model"):
            raise ValueError("batch='sample' needs the predictor Copy and blocks as the site")

    def _check_corrector(self) -> None:
        if self.site.scope != "model" or self.payload != "output":
            raise ValueError("a corrector needs the site 'model' and the payload 'output'")
        if isinstance(self.predictor, (ProbeRatio, ScaleShift)):
            raise ValueError(
                f"a corrector cannot follow {type(self.predictor).__name__}, only plain weights"
            )

    @property
    def depth(self) -> int:
        """How many computed steps are kept."""
        return max(self.predictor.depth, self.corrector.depth if self.corrector else 0)

    def is_for(self, branch: int) -> bool:
        """Whether it is about this denoiser call of every step."""
        return self.branch in (None, branch)

    def schedule(self, steps: Sequence[Step], units: int) -> Schedule | None:
        """What asks for computing at each step of each unit, or None for an online policy."""
        if not isinstance(self.policy, StaticPolicy):
            return None
        return tuple(self._guarded(row, steps) for row in self.policy.mask(steps, units))

    def _guarded(self, row: Sequence[bool], steps: Sequence[Step]) -> tuple[str, ...]:
        asked: list[str] = []
        streak = 0
        for step, wanted in zip(steps, row, strict=True):
            asked.append(type(self.policy).__name__ if wanted else self.forced(step, streak))
            streak = 0 if asked[-1] else streak + 1
        return tuple(asked)

    def forced(self, step: Step, streak: int) -> str:
        """The name of the first guard that asks for computing, or an empty string."""
        for guard in self.guards:
            if guard.must_compute(step, streak):
                return type(guard).__name__
        return ""


def each_sub_layer(
    policy: Policy, predictor: Predictor | None = None, guards: tuple[Guard, ...] = ()
) -> tuple[Rule, ...]:
    """One rule for each kind of sub-layer; a model without cross-attention has no use for its."""
    how = predictor or Copy()
    scopes: tuple[Scope, ...] = ("attn", "cross", "mlp")
    return tuple(Rule(Site(scope), policy, how, guards, "output") for scope in scopes)


@spec
class Recipe:
    """What is reused, what attention is thinned out, or both.

    rules: tried in order; where two of them cover a block, the earlier one's reuse wins.
    branches: how the denoiser calls of one step (cond, uncond, ...) decide for online policies.
    "joint": the first call of the step decides for all. "leader": the same, and only its changes
    are measured. "independent": each for itself. State is always kept per branch.
    sparse: makes the self-attention of computed blocks sparse.
    """

    rules: tuple[Rule, ...] = ()
    branches: Branches = "joint"
    name: str = "custom"
    sparse: Sparse | None = None

    def __post_init__(self) -> None:
        """A recipe without rules would silently do nothing."""
        if not self.rules and self.sparse is None:
            raise ValueError("a recipe needs at least one rule")

    def is_static(self) -> bool:
        """Whether every decision is known before the first forward."""
        return all(isinstance(rule.policy, StaticPolicy) for rule in self.rules)

    def written_down(
        self, steps: Sequence[Step], layout: Layout, with_sigmas: bool = True
    ) -> "Recipe":
        """The same recipe with every static policy replaced by its mask table for `steps`.

        with_sigmas: write the steps' noise levels into the table; False where they are made up.
        """
        rules = tuple(_written(rule, steps, layout, with_sigmas) for rule in self.rules)
        return Recipe(rules, self.branches, self.name, self.sparse)


def _written(rule: Rule, steps: Sequence[Step], layout: Layout, with_sigmas: bool) -> Rule:
    if rule.site.is_sub_layer and isinstance(rule.policy, MaskTable):
        # Its rows count sub-layers, which the layout does not know.
        return rule
    schedule = rule.schedule(steps, len(rule.site.units(layout)))
    if schedule is None:
        return rule
    rows = {tuple(i for i, asked in enumerate(row) if asked): None for row in schedule}
    computed = (
        tuple(rows)
        if len(rows) == 1
        else tuple(tuple(i for i, asked in enumerate(row) if asked) for row in schedule)
    )
    sigmas = tuple(step.sigma for step in steps) if with_sigmas else ()
    table = MaskTable(computed, len(steps), sigmas)
    return replace(rule, policy=table, guards=())
