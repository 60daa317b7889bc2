"""cache-dit (vipshop/cache-dit), over its knobs."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.peers.ground import PEERS, Contender, Ground, Impossible, Lane
from blockcache.plan.policies.static import geometric_steps

_THRESHOLDS = (0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.5)
# Share of the steps in masks of our own making; cache-dit's four words are tried, too.
_SHARES = (0.48, 0.4, 0.32, 0.24, 0.18, 0.14)


def contenders(steps: int) -> Iterator[Contender]:
    """Every setting that is tried, for runs of `steps` steps."""
    for calibrator in ("", "TaylorSeer 1"):
        yield from _gates(calibrator, _gate_settings())
    few = [(1, 0, 4, -1, threshold) for threshold in (0.06, 0.12, 0.24, 0.5)]
    for calibrator in ("TaylorSeer 2", "FoCa", "DMD"):
        yield from _gates(calibrator, few)
    yield from _masks(steps)
    yield from _prune()


def _gate_settings() -> list[tuple[int, int, int, int, float]]:
    """Front and rear blocks, warm-up, longest streak (-1 is any), threshold."""
    found = [(1, 0, 4, -1, threshold) for threshold in _THRESHOLDS]
    found += [(1, 0, 8, -1, threshold) for threshold in _THRESHOLDS[1::2]]
    found += [(1, 0, 4, 3, threshold) for threshold in _THRESHOLDS[2:]]
    found += [(1, 1, 4, -1, threshold) for threshold in _THRESHOLDS[1::2]]
    found += [(4, 0, 4, -1, threshold) for threshold in _THRESHOLDS[1::2]]
    return [*found, (8, 0, 8, -1, 0.08)]


def _gates(
    calibrator: str, settings: Sequence[tuple[int, int, int, int, float]]
) -> Iterator[Contender]:
    name = calibrator.split()[0] if calibrator else ""
    family = f"cache-dit DBCache + {name}" if name else "cache-dit DBCache"
    for front, rear, warm_up, streak, threshold in settings:
        setting = f"F{front} B{rear} W{warm_up} R{threshold:g}"
        setting += f" MC{streak}" if streak > 0 else ""
        yield _contender(
            family,
            setting + (f", {calibrator}" if calibrator else ""),
            calibrator,
            Fn_compute_blocks=front,
            Bn_compute_blocks=rear,
            max_warmup_steps=warm_up,
            max_continuous_cached_steps=streak,
            residual_diff_threshold=threshold,
        )


def _masks(steps: int) -> Iterator[Contender]:
    words = itertools.product(("slow", "medium", "fast", "ultra"), ("", "TaylorSeer 1", "DMD"))
    for word, calibrator in words:
        yield _masked(f"mask {word}", calibrator, word)
    for share, calibrator in itertools.product(_SHARES, ("", "TaylorSeer 1")):
        chosen = geometric_steps(round(share * steps), steps)
        mask = [int(step in chosen) for step in range(steps)]
        yield _masked(f"geometric mask, {len(chosen)} steps", calibrator, mask)
    for word, threshold in itertools.product(("fast", "ultra"), (0.12, 0.24)):
        yield _masked(f"mask {word}, dynamic R{threshold:g}", "TaylorSeer 1", word, threshold)


def _masked(
    setting: str, calibrator: str, mask: str | list[int], threshold: float = 0.0
) -> Contender:
    return _contender(
        "cache-dit step masks",
        setting + (f", {calibrator}" if calibrator else ""),
        calibrator,
        Fn_compute_blocks=1,
        steps_computation_mask=mask,
        steps_computation_policy="dynamic" if threshold else "static",
        **({"residual_diff_threshold": threshold} if threshold else {}),
    )


def _prune() -> Iterator[Contender]:
    for threshold in (0.04, 0.08, 0.12, 0.2, 0.3):
        yield _contender(
            "cache-dit DBPrune",
            f"F1 W4 R{threshold:g}",
            "",
            prunes=True,
            Fn_compute_blocks=1,
            max_warmup_steps=4,
            residual_diff_threshold=threshold,
        )


def _contender(
    family: str, setting: str, calibrator: str, prunes: bool = False, **settings: Any
) -> Contender:
    def enter(ground: Ground) -> Lane:
        cache_dit = _library()
        pipe, chosen = ground.fresh(), dict(settings)
        if isinstance(mask := chosen.get("steps_computation_mask"), str):
            words = cache_dit.steps_mask(mask_policy=mask, total_steps=ground.steps)
            chosen["steps_computation_mask"] = words
        # Its configurations are changed by what they are given to: a new one each time.
        kind = cache_dit.DBPruneConfig if prunes else cache_dit.DBCacheConfig
        config = kind(**chosen)
        cache_dit.enable_cache(
            pipe, cache_config=config, calibrator_config=_calibrator(cache_dit, calibrator)
        )
        return ground.lane(pipe)

    return Contender(PEERS, family, setting, enter)


def _calibrator(cache_dit: Any, name: str) -> Any:
    if name.startswith("TaylorSeer"):
        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(name.split()[1]))
    kinds = {"FoCa": "FoCaCalibratorConfig", "DMD": "DMDCalibratorConfig"}
    return getattr(cache_dit, kinds[name])() if name else None


def _library() -> Any:
    # It logs ten lines for every pipeline, and reads this once.
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        import cache_dit
    except ImportError:
        raise Impossible("cache-dit is not installed (pip install blockcache[peers])") from None
    return cache_dit
