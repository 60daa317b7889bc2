"""The language of plans. Host-only: numbers in, decisions out; no tensor, module or pipeline."""

from blockcache.plan.guards import Cooldown, Force, Guard, MaxStreak, Warmup
from blockcache.plan.plan import Fingerprint, Plan
from blockcache.plan.policies import Every, Gate, Geometric, MaskTable, Policy, StaticPolicy
from blockcache.plan.predictors import Copy, Predictor, Taylor
from blockcache.plan.recipe import Recipe, Rule
from blockcache.plan.sites import Layout, Site
from blockcache.plan.steps import Step, even_steps, steps_from_sigmas

__all__ = [
    "Cooldown",
    "Copy",
    "Every",
    "Fingerprint",
    "Force",
    "Gate",
    "Geometric",
    "Guard",
    "Layout",
    "MaskTable",
    "MaxStreak",
    "Plan",
    "Policy",
    "Predictor",
    "Recipe",
    "Rule",
    "Site",
    "StaticPolicy",
    "Step",
    "Taylor",
    "Warmup",
    "even_steps",
    "steps_from_sigmas",
]
