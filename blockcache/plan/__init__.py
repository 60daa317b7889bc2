"""The language of plans. Host-only: numbers in, decisions out; no tensor, module or pipeline."""

from blockcache.plan.correctors import Corrector
from blockcache.plan.forecasts import (
    BackwardDifference,
    ChannelTable,
    Chebyshev,
    Damped,
    Hermite,
    ProbeRatio,
    ScaleShift,
)
from blockcache.plan.guards import Cooldown, Force, Guard, MaxStreak, Warmup
from blockcache.plan.plan import Fingerprint, Plan
from blockcache.plan.policies import (
    Bathtub,
    Codebook,
    Every,
    Gate,
    Geometric,
    Growing,
    MaskTable,
    Policy,
    Ranked,
    StaticPolicy,
    Verified,
    Within,
)
from blockcache.plan.predictors import Copy, Fitted, Predictor, Taylor
from blockcache.plan.recipe import Recipe, Rule
from blockcache.plan.sites import Layout, Site
from blockcache.plan.sparse_rule import Sparse
from blockcache.plan.steps import Step, even_steps, steps_from_sigmas

__all__ = [
    "BackwardDifference",
    "Bathtub",
    "ChannelTable",
    "Chebyshev",
    "Codebook",
    "Cooldown",
    "Copy",
    "Corrector",
    "Damped",
    "Every",
    "Fingerprint",
    "Fitted",
    "Force",
    "Gate",
    "Geometric",
    "Growing",
    "Guard",
    "Hermite",
    "Layout",
    "MaskTable",
    "MaxStreak",
    "Plan",
    "Policy",
    "Predictor",
    "ProbeRatio",
    "Ranked",
    "Recipe",
    "Rule",
    "ScaleShift",
    "Site",
    "Sparse",
    "StaticPolicy",
    "Step",
    "Taylor",
    "Verified",
    "Warmup",
    "Within",
    "even_steps",
    "steps_from_sigmas",
]
