"""The caches that come with diffusers, over their knobs."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import hooks

from benchmarks.peers.ground import PEERS, Contender, Ground, Impossible, Lane

Configure = Callable[[Any, Ground], Any]
"""A fresh pipeline to the configuration that its transformer is given."""

# What TaylorSeer predicts. Its own patterns for attention miss Wan's `attn1` and `attn2`.
_PREDICTED = {
    "attention": [r".*blocks\.\d+\.attn\d?"],
    "blocks": [r"(single_)?(transformer_)?blocks\.\d+"],
}
_ALL_BUT_FIRST = (-1, 999)


def contenders(steps: int) -> Iterator[Contender]:
    """Every setting that is tried, for runs of `steps` steps."""
    yield from _first_block()
    yield from _taylor_seer(steps)
    yield from _mag_cache(steps)
    yield from _sea_cache()
    yield from _faster_cache()
    yield from _pyramid()


def _contender(family: str, setting: str, configure: Configure, prepare: Any = None) -> Contender:
    def enter(ground: Ground) -> Lane:
        pipe = ground.fresh()
        if prepare is not None:
            prepare(pipe)
        pipe.transformer.enable_cache(configure(pipe, ground))
        return ground.lane(pipe)

    return Contender(PEERS, f"diffusers {family}", setting, enter)


def _first_block() -> Iterator[Contender]:
    for threshold in (0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        yield _contender(
            "FirstBlockCache",
            f"threshold {threshold:g}",
            lambda pipe, ground, t=threshold: hooks.FirstBlockCacheConfig(threshold=t),
        )


def _taylor_seer(steps: int) -> Iterator[Contender]:
    shipped = [("attention as shipped", 3, 1, (3, 0))]
    attention = itertools.product(["attention"], (2, 3, 4, 6), [1], [(3, 0)])
    blocks = itertools.product(["blocks"], (2, 3, 4, 6), (1, 2), [(3, 0)])
    guards = [(3, 0), (6, 0), (10, 0), (6, 2)]
    lite = itertools.product(["lite"], (2, 3, 4, 6, 8, 10), (1, 2), guards)
    for where, interval, order, (warm_up, cool_down) in (*shipped, *attention, *blocks, *lite):
        settings: dict[str, Any] = {
            "cache_interval": interval,
            "max_order": order,
            "disable_cache_before_step": warm_up,
            "disable_cache_after_step": steps - cool_down if cool_down else None,
            # Its default, bfloat16, costs it quality.
            "taylor_factors_dtype": torch.float32,
            "use_lite_mode": where == "lite",
            "cache_identifiers": _PREDICTED.get(where),
        }
        yield _contender(
            "TaylorSeer",
            f"{where}, interval {interval}, order {order}, warm-up {warm_up}"
            + (f", cool-down {cool_down}" if cool_down else ""),
            lambda pipe, ground, s=settings: hooks.TaylorSeerCacheConfig(**s),
        )


def _mag_cache(steps: int) -> Iterator[Contender]:
    grid = itertools.product((0.06, 0.12, 0.25, 0.5, 1.0), (2, 3, 5, 8), (0.1, 0.2))
    for threshold, streak, kept in grid:
        settings = {"threshold": threshold, "max_skip_steps": streak, "retention_ratio": kept}
        yield _contender(
            "MagCache",
            f"threshold {threshold:g}, streak {streak}, retention {kept:g}",
            lambda pipe, ground, s=settings: hooks.MagCacheConfig(
                num_inference_steps=steps, mag_ratios=list(ground.magnitudes), **s
            ),
        )


def _sea_cache() -> Iterator[Contender]:
    # As a user would: nothing but the configuration.
    yield _contender(
        "SeaCache", "threshold 1, as shipped", lambda pipe, ground: hooks.SeaCacheConfig(1.0)
    )
    grid = itertools.product((0.1, 0.2, 0.4, 0.8, 1.6), (0, 1), (2, 4, 0))
    for threshold, order, streak in grid:
        yield _contender(
            "SeaCache",
            f"threshold {threshold:g}, order {order}, streak {streak or 'any'}",
            lambda pipe, ground, t=threshold, o=order, s=streak: hooks.SeaCacheConfig(
                threshold=t,
                residual_order=o,
                max_consecutive_cached=s,
                raw_vision_callback=_latents if _is_packed(pipe) else None,
            ),
            _tell_steps,
        )


def _is_packed(pipe: Any) -> bool:
    return type(pipe).__name__.startswith("Flux")


def _latents(transformer: Any, arguments: Any, named: dict[str, Any]) -> list[torch.Tensor]:
    """Flux' token rows as square latents `[C, 1, H, W]`, which SeaCache cannot find by itself."""
    tokens = named["hidden_states"]
    side = round(tokens.shape[1] ** 0.5)
    return [row.T.reshape(-1, 1, side, side) for row in tokens]


def _tell_steps(pipe: Any) -> None:
    """Tell SeaCache the step and its noise level where the pipeline does not: then it never fires.

    Wan does, Flux does not.
    """
    plain = pipe.transformer.cache_context

    def told(name: str, **known: Any) -> Any:
        if "step_index" not in known:
            step = pipe.scheduler.step_index or 0
            known |= {
                "step_index": step,
                "sigma": float(pipe.scheduler.sigmas[step]),
                "num_inference_steps": len(pipe.scheduler.timesteps),
            }
        return plain(name, **known)

    pipe.transformer.cache_context = told


def _faster_cache() -> Iterator[Contender]:
    def config(pipe: Any, distilled: bool, **settings: Any) -> Any:
        return hooks.FasterCacheConfig(
            is_guidance_distilled=distilled,
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BCHW" if _is_packed(pipe) else "BCFHW",
            **settings,
        )

    def guided(pipe: Any, ground: Ground) -> Any:
        if _is_packed(pipe):
            raise Impossible("skips the unconditional branch, and this model has none")
        return config(pipe, distilled=False)

    yield _contender("FasterCache", "guidance and attention, defaults", guided)
    for interval, latest, weight in itertools.product((2, 3, 5), (681, 999), (0.0, 0.5)):
        yield _contender(
            "FasterCache",
            f"attention, interval {interval}, below {latest}, weight {weight:g}",
            lambda pipe, ground, n=interval, t=latest, w=weight: config(
                pipe,
                distilled=True,
                spatial_attention_block_skip_range=n,
                spatial_attention_timestep_skip_range=(-1, t),
                attention_weight_callback=lambda _: w,
            ),
        )


def _pyramid() -> Iterator[Contender]:
    for spatial, cross in ((2, 2), (2, 4), (3, 3), (3, 6), (4, 4), (6, 6)):
        for reach in ((100, 800), _ALL_BUT_FIRST):
            yield _contender(
                "PyramidAttentionBroadcast",
                f"self {spatial}, cross {cross}, timesteps {max(reach[0], 0)} to {reach[1]}",
                lambda pipe, ground, s=spatial, c=cross, r=reach: (
                    hooks.PyramidAttentionBroadcastConfig(
                        spatial_attention_block_skip_range=s,
                        cross_attention_block_skip_range=c,
                        spatial_attention_timestep_skip_range=r,
                        cross_attention_timestep_skip_range=r,
                        current_timestep_callback=lambda: pipe.current_timestep,
                    )
                ),
            )
