"""SpeCa, speculative caching (2509.11628).

All blocks but the last are forecast on trust, the last one runs on the forecast, and its output is
compared with a forecast of itself; if they disagree, the step is computed after all. Kept: the
relative error and its falling limit, the fewest and most forecasts in a row, the order. Different:
the residual of all blocks but the last is forecast as one, not each sub-layer's output; polynomials
are TaylorSeer's through the stored payloads (see there). A rejected step costs the last block once
more. U-Nets are refused: their first block feeds the last one by a skip connection. State: `order`
+ 1 residuals and outputs of the last block per branch, one host read per verified step.
"""

from blockcache.plan import Recipe, Rule, Site, Taylor, Verified, Warmup


def spe_ca(
    threshold: float = 0.1,
    decay: float = 0.01,
    least: int = 2,
    most: int = 5,
    order: int = 4,
    warmup: int = 3,
) -> Recipe:
    """Forecast all blocks but the last, and let the last one verify it.

    threshold: relative error of the last block's forecast that is accepted at the beginning, no
    unit, useful 0.05 to 0.5. decay: what it has fallen to at the end, as a factor, never below
    0.01. least, most: forecasts in a row that are not verified, and that are made at all. order: of
    the extrapolation, 0 to 4. warmup: first steps always computed.
    """
    policy = Verified(threshold, decay, 0.01, least, most)
    rule = Rule(Site("span", 0, -1), policy, Taylor(order), (Warmup(warmup),))
    return Recipe((rule,), name=f"spe_ca {threshold:g}")
