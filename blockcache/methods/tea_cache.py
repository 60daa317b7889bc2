"""TeaCache (2411.19108, CVPR 2025).

The change of the first block's time-modulated input, put through a polynomial fitted per model,
predicts the change of the output. The predictions are added up; below a threshold the whole stack's
residual is added again.

Kept: the signal (the modulated input of the first block or, where a model modulates inside its
blocks as Wan does, the time embedding), comparison with the step before, the sum, the polynomials
and thresholds. Listed are the published models whose signal is the one measured here. Different:
where a polynomial dips below zero the change counts as none, where the authors' code subtracts it;
the branches of guidance decide together and not by the parity of calls. Without a model's
polynomial the change itself is added up, or with a trace a polynomial of our own; where the signal
is the time embedding, which no prompt changes, that makes the whole schedule known before the run,
and it is compiled to a static plan. State: one residual and one signal per branch, one host read
per step; compiled none of the last two.
"""

from typing import NamedTuple

import numpy as np

from blockcache.errors import PlanError
from blockcache.plan import Cooldown, Gate, MaskTable, Policy, Recipe, Rule, Site, Warmup
from blockcache.plan.trace import Floats, SiteTrace, Trace


class Fit(NamedTuple):
    """A published polynomial, highest power first, its mildest threshold, and first full steps."""

    coefficients: tuple[float, ...]
    threshold: float
    warmup: int = 1


FITS = {
    "flux": Fit((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.25),
    "hunyuan_video": Fit((733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), 0.1),
    "lumina2": Fit((393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), 0.2),
    "mochi": Fit((-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719), 0.06),
    "wan_1.3b": Fit((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), 0.05, 5),
    "wan_14b": Fit((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.1, 5),
    "wan_i2v_480p": Fit((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), 0.2, 5),
    "wan_i2v_720p": Fit((8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401), 0.2, 5),
}
"""By model. Wan's are those for the time projection ("ret steps")."""

_NO_FIT = Fit((), 0.2)


_DEGREE = 4
_SAME = 1e-4
"""Changes that differ less between prompts, relatively, do not depend on them."""


def tea_cache(
    model: str = "",
    threshold: float | None = None,
    warmup: int | None = None,
    cooldown: int = 1,
    trace: Trace | None = None,
) -> Recipe:
    """Reuse the stack while the predicted changes of its output add up to less than `threshold`.

    model: whose polynomial to use: flux, hunyuan_video, lumina2, mochi, wan_1.3b, wan_14b,
    wan_i2v_480p or wan_i2v_720p; empty for none. threshold: summed relative L1 change, no unit; the
    published mildest one of the model, about 1.5x faster, or 0.2 without a model; up to three times
    as much is useful. warmup, cooldown: first and last steps always computed; 1, for Wan 5.
    trace: fit a polynomial to it instead.

    Raises:
        PlanError: no polynomial is known for `model`, a model and a trace, or a trace without
            signal.
    """
    if model and model not in FITS:
        raise PlanError(f"no TeaCache polynomial for {model!r} (known: {', '.join(FITS)})")
    if model and trace is not None:
        raise PlanError("tea_cache takes the polynomial of a model or of a trace, not both")
    fit = FITS[model] if model else _NO_FIT
    limit = fit.threshold if threshold is None else threshold
    guards = (Warmup(fit.warmup if warmup is None else warmup), Cooldown(cooldown))
    coefficients = fit.coefficients if trace is None else fitted(trace)
    gate = Gate(limit, "modulated", "previous", accumulate=True, rescale=coefficients)
    policy: Policy = gate if trace is None else _compiled(gate, trace)
    rule = Rule(Site("stack"), policy, guards=guards)
    return Recipe((rule,), name=f"tea_cache {f'{model} ' if model else ''}{limit:g}")


def fitted(trace: Trace) -> tuple[float, ...]:
    """The polynomial from the signal's change to the output's, highest power first.

    Least squares over all prompts and steps of the first branch.

    Raises:
        PlanError: the trace has no time-modulated input.
    """
    signal, output = trace.at("time", 0, "input"), trace.at("model", 0, "output")
    x, y = (_changes(seen) for seen in (signal, output))
    return tuple(map(float, np.polyfit(x.ravel(), y.ravel(), _DEGREE)))


def _changes(seen: SiteTrace) -> Floats:
    """`[P, T - 1]`: relative L1 change from the step before."""
    return np.diagonal(seen.l1, offset=1, axis1=1, axis2=2) / seen.size[:, :-1]


def _compiled(gate: Gate, trace: Trace) -> Policy:
    """The gate's decisions for the traced steps, if no prompt has a say in them."""
    changes = _changes(trace.at("time", 0, "input"))
    if np.ptp(changes, axis=0).max() > _SAME * changes.max():
        return gate
    computed, total = [0], 0.0
    for step, change in enumerate(changes.mean(0), start=1):
        total += gate.rescaled(float(change))
        if total >= gate.threshold:
            computed.append(step)
            total = 0.0
    return MaskTable((tuple(computed),), len(trace.sigmas), trace.sigmas)
