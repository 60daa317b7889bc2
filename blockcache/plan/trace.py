"""Traces: what a calibration run measured, as host-only numbers for planners and recipes.

A trace holds, for every place of the model, how its payload moves over the steps of uncached runs.
The central table is the Gram matrix of the payloads: with it the error of any mask with any linear
predictor is a quadratic form, e_t = G_tt - 2 w.G_at + w.G_aa.w, and the best weights are a small
linear system. Such errors are *teacher-forced*: the history is that of the uncached run, so they
rank candidates and never replace a real run.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blockcache.errors import PlanError, PlanMismatchError
from blockcache.plan.plan import Fingerprint
from blockcache.plan.sites import Layout
from blockcache.plan.spec import from_json, shown, to_json
from blockcache.plan.steps import Step

Floats: TypeAlias = NDArray[np.float64]
Kind = Literal["residual", "output", "input"]

FORMAT = 1
ABOUT = "trace.json"


@dataclass(frozen=True, order=True)
class Place:
    """Where something was measured.

    scope: "model", "stack", "block", a sub-layer's, or "time". Of that, "input" is the
    time-modulated input of the first block (TeaCache's signal), or the time embedding where the
    block modulates inside itself.
    index: block number; for "stack" the chain; for sub-layers the row that they have in a mask of
    that scope, in calling order; 0 for "model" and "time".
    payload: "output", "residual" (output - input) or "input". branch: "0", "1", ... in the order
    of the denoiser's calls within a step.
    """

    scope: str
    index: int
    payload: str
    branch: str

    def __str__(self) -> str:
        """`branch/scope/index/payload`, as in files."""
        return f"{self.branch}/{self.scope}/{self.index}/{self.payload}"


@dataclass(frozen=True, eq=False)
class SiteTrace:
    """One payload at one place: P prompts, T steps in sampling order. NaN where it was not called.

    numel: elements of the payload. gram: `[P, T, T]`, mean over the elements of y_i * y_j. l1:
    `[P, T, T]`, mean |y_i - y_j|. size: `[P, T]`, mean |y_i|. magnitude: `[P, T]`, mean over tokens
    of |y_t[n]| / |y_{t-1}[n]| in the 2-norm (MagCache), 1 at the first step. sample: `[P, T, K]`
    values at fixed random elements, empty (K = 0) except for "stack" and "model".
    Where a payload is large, gram and l1 are means over a fixed random part of its elements.
    """

    numel: int
    gram: Floats
    l1: Floats
    size: Floats
    magnitude: Floats
    sample: NDArray[np.float32]

    @classmethod
    def of(cls, payloads: NDArray[Any]) -> "SiteTrace":
        """The tables of payloads that are known whole: `[P, T, tokens..., channels]`."""
        y = payloads.reshape(*payloads.shape[:2], -1).astype(np.float64)
        numel = y.shape[2]
        norms = np.linalg.norm(payloads, axis=-1).reshape(*payloads.shape[:2], -1)
        magnitude = np.ones(y.shape[:2])
        magnitude[:, 1:] = (norms[:, 1:] / norms[:, :-1]).mean(2)
        gram = y @ y.swapaxes(1, 2) / numel
        l1 = np.abs(y[:, :, None] - y[:, None]).mean(3)
        return cls(numel, gram, l1, np.abs(y).mean(2), magnitude, y.astype(np.float32))

    def mean_gram(self) -> Floats:
        """`[T, T]`, mean over the prompts."""
        return np.asarray(self.gram.mean(0))

    def relative_l1(self) -> Floats:
        """`[T, T]`: entry (i, j) is mean |y_i - y_j| / mean |y_j|, mean over the prompts."""
        return np.asarray((self.l1 / self.size[:, None, :]).mean(0))

    def change(self) -> Floats:
        """`[T]`: relative L1 change from the step before; 0 at the first step."""
        relative = self.relative_l1()
        return np.concatenate([[0.0], np.diagonal(relative, offset=-1)])

    def cosine(self) -> Floats:
        """`[T, T]`: cosine of the flattened payloads of two steps, mean over the prompts."""
        norms = np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))
        return np.asarray((self.gram / (norms[:, :, None] * norms[:, None, :])).mean(0))

    def errors(self, at: int, anchors: Sequence[int], weights: Sequence[float]) -> Floats:
        """`[P]`: mean square error of sum_j weights[j] * y_{anchors[j]} as a guess of y_at."""
        g, a = self.gram, list(anchors)
        w = np.asarray(weights, dtype=np.float64)
        cross, inner = g[:, a, at] @ w, w @ g[:, a][:, :, a] @ w
        return np.asarray(np.maximum(g[:, at, at] - 2 * cross + inner, 0.0))

    def best_weights(
        self, at: int, anchors: Sequence[int], ridge: float = 1e-4
    ) -> tuple[float, ...]:
        """The weights with the least squared error over all prompts (L2P in closed form).

        ridge: Pull towards copying the first anchor, as a share of the anchors' mean square.
        """
        a = list(anchors)
        # Normalised, so that no prompt counts for more because its payload is larger.
        gram = np.asarray((self.gram / self.gram[:, at, at][:, None, None]).mean(0))
        inner, cross = gram[np.ix_(a, a)], gram[a, at]
        copy = np.zeros(len(a))
        copy[0] = 1.0
        damping = ridge * np.trace(inner) / len(a) * np.eye(len(a))
        found = copy + np.linalg.solve(inner + damping, cross - inner @ copy)
        return tuple(float(w) for w in found)


@dataclass(frozen=True, eq=False)
class Trace:
    """What `blockcache.trace` measured.

    fingerprint: the model, checked on use. sigmas: the T steps' noise levels. prompts, seeds:
    P of each. settings: the arguments of the pipeline calls. early: `[P, C, ...]` latents after
    C early steps, C = 0 where the pipeline shows none. chains: lengths of the chains of
    blocks, as in `Layout`. sites: by place. latents: `[P, ...]` final latents (the picture, where
    the pipeline shows no latents). milliseconds: medians; "run" a whole uncached call, "fixed" of
    it outside the steps, "computed" and "reused" one step, "head" the part of a computed step's
    denoiser calls outside the blocks, "block/<class>" one block. block_ms: `[blocks]`.
    """

    fingerprint: Fingerprint
    sigmas: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    chains: tuple[int, ...]
    unet: bool
    sites: dict[Place, SiteTrace]
    latents: NDArray[np.float32]
    early: NDArray[np.float32]
    milliseconds: dict[str, float]
    block_ms: tuple[float, ...]
    segments: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """`[T, T]`: entry (i, j) is the relative L1 error of the *final* latents when only the steps
    between i and j are reused (LeMiCa), NaN where not measured; empty unless asked for."""

    @classmethod
    def of(cls, sites: dict[Place, SiteTrace], **known: Any) -> "Trace":
        """A trace of what was measured otherwise. Fields that are not given are left empty.

        The noise levels then fall evenly from 1, and the blocks are one chain.
        """
        prompts, steps = next((site.size.shape for site in sites.values()), (0, 0))
        blocks = 1 + max((place.index for place in sites), default=0)
        fields: dict[str, Any] = dict(
            fingerprint=Fingerprint("", "", blocks),
            sigmas=tuple(1 - i / steps for i in range(steps)),
            prompts=("",) * prompts,
            seeds=(0,) * prompts,
            settings={},
            chains=(blocks,),
            unet=False,
            latents=np.zeros((prompts, 0), np.float32),
            early=np.zeros((prompts, 0), np.float32),
            milliseconds={},
            block_ms=(),
        )
        return cls(sites=sites, **{**fields, **known})

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the traced runs."""
        total = len(self.sigmas)
        return tuple(Step(i, total, sigma) for i, sigma in enumerate(self.sigmas))

    @property
    def layout(self) -> Layout:
        """The model's shape, for `Site.units`."""
        return Layout(self.chains, self.unet)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the denoiser calls of one step."""
        return tuple(sorted({place.branch for place in self.sites}))

    def at(
        self, scope: str = "stack", index: int = 0, payload: Kind = "residual", branch: str = "0"
    ) -> SiteTrace:
        """What was measured at one place.

        Raises:
            PlanError: nothing was measured there; says what was.
        """
        place = Place(scope, index, payload, branch)
        if place not in self.sites:
            known = sorted({f"{p.scope} ({p.payload})" for p in self.sites})
            raise PlanError(
                f"the trace has no {payload} of {scope} {index} in branch {branch!r}; it has "
                f"{', '.join(known)} in branches {', '.join(self.branches)}"
            )
        return self.sites[place]

    def each(
        self, scope: str, payload: Kind = "output", branch: str = "0"
    ) -> Iterator[tuple[int, SiteTrace]]:
        """Block number and measurements of every place of a scope, in calling order."""
        for place in sorted(self.sites):
            if (place.scope, place.payload, place.branch) == (scope, payload, branch):
                yield place.index, self.sites[place]

    def check(self, fingerprint: Fingerprint, steps: int | None = None) -> None:
        """Refuse to be used for another model, or another number of steps.

        Raises:
            PlanMismatchError: the model class or config differs, or the number of steps.
        """
        self.fingerprint.check(fingerprint)
        if steps is not None and steps != len(self.sigmas):
            raise PlanMismatchError(
                f"the trace is of {len(self.sigmas)} steps, found a run of {steps}; trace again"
            )

    def about(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        return {
            "blockcache_trace": FORMAT,
            "fingerprint": to_json(self.fingerprint),
            "sigmas": list(self.sigmas),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "settings": self.settings,
            "chains": list(self.chains),
            "unet": self.unet,
            "milliseconds": self.milliseconds,
            "block_ms": list(self.block_ms),
        }

    def save(self, folder: str | Path) -> None:
        """Write `trace.json` and one `.safetensors` file per prompt."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for i in range(len(self.prompts)):
            save_prompt(self, i, place)
        save_about(self, place)

    @classmethod
    def load(cls, folder: str | Path) -> "Trace":
        """Read a trace; of one that was interrupted, the prompts that were finished.

        Raises:
            PlanError: no trace, another format version, damaged, or no prompt was finished.
        """
        place = Path(folder)
        about = read_about(place / ABOUT)
        parts = [read_prompt(place, i) for i in range(len(about["prompts"]))]
        found = [(i, part) for i, part in enumerate(parts) if part is not None]
        if not found:
            raise PlanError(f"the trace in {place} has no finished prompt; trace again")
        try:
            return assembled(about, found)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PlanError(f"the trace in {place} is damaged: {error}") from None


Arrays: TypeAlias = dict[str, NDArray[Any]]
_TABLES = ("gram", "l1", "size", "magnitude", "sample")


def assembled(about: dict[str, Any], found: Sequence[tuple[int, Arrays]]) -> Trace:
    """A trace from its description and the arrays of prompts by number."""
    names = sorted({key.rsplit("/", 1)[0] for key in found[0][1] if key.count("/") == 4})
    sites = {}
    for name in names:
        branch, scope, index, payload = name.split("/")
        tables = {t: np.stack([part[f"{name}/{t}"] for _, part in found]) for t in _TABLES}
        numel = int(found[0][1][f"{name}/numel"][0])
        sites[Place(scope, int(index), payload, branch)] = SiteTrace(numel, **tables)
    segments = [part["segments"] for _, part in found if "segments" in part]
    return Trace(
        fingerprint=from_json(about["fingerprint"]),
        sigmas=tuple(map(float, about["sigmas"])),
        prompts=tuple(about["prompts"][i] for i, _ in found),
        seeds=tuple(about["seeds"][i] for i, _ in found),
        settings=dict(about["settings"]),
        chains=tuple(about["chains"]),
        unet=bool(about["unet"]),
        sites=sites,
        latents=np.stack([part["latents"] for _, part in found]),
        early=np.stack([part["early"] for _, part in found]),
        milliseconds=dict(about["milliseconds"]),
        block_ms=tuple(about["block_ms"]),
        segments=np.mean(segments, 0) if segments else np.zeros((0, 0)),
    )


def arrays_of(trace: Trace, i: int) -> Arrays:
    """The arrays of prompt `i` by the names they have in files."""
    arrays: Arrays = {"latents": trace.latents[i], "early": trace.early[i]}
    if trace.segments.size:
        arrays["segments"] = trace.segments
    for place, site in trace.sites.items():
        arrays[f"{place}/numel"] = np.asarray([site.numel])
        for table in _TABLES:
            arrays[f"{place}/{table}"] = getattr(site, table)[i]
    return arrays


def save_prompt(trace: Trace, i: int, folder: Path) -> None:
    """Write the arrays of prompt `i`; the file appears complete or not at all."""
    write_prompt(arrays_of(trace, i), i, folder)


def write_prompt(arrays: Arrays, i: int, folder: Path) -> None:
    """Write one prompt's arrays; the file appears complete or not at all."""
    from safetensors.numpy import save_file

    partial = folder / f".{i:03}.partial"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
    partial.replace(folder / f"{i:03}.safetensors")


def read_prompt(folder: Path, i: int) -> Arrays | None:
    """The arrays of prompt `i`, or None where it has not been traced.

    Raises:
        PlanError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / f"{i:03}.safetensors"
    if not path.is_file():
        return None
    try:
        arrays: Arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path} cannot be read: {error}; delete it and trace again") from None
    return arrays


def save_about(trace: Trace, folder: Path) -> None:
    """Write the description."""
    write_about(trace.about(), folder)


def write_about(about: dict[str, Any], folder: Path) -> None:
    """Write a trace's description."""
    text = json.dumps(about, indent=1, allow_nan=False)
    partial = folder / f".{ABOUT}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / ABOUT)


def read_about(path: Path) -> dict[str, Any]:
    """A trace's description.

    Raises:
        PlanError: no such file, no JSON, or not a trace of this format.
    """
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanError(f"cannot read a trace from {path.parent}: {path.name}: {why}") from None
    if not isinstance(about, dict) or about.get("blockcache_trace") != FORMAT:
        found = about.get("blockcache_trace") if isinstance(about, dict) else about
        raise PlanError(f"{path} is no trace of format {FORMAT} (found {shown(found)})")
    return about
