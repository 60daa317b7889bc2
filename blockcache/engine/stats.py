"""What happened in a run: counted while it runs, read when somebody asks."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from blockcache.engine.attention_stats import AttentionStats

# Changes and drift are estimated on about this many elements of a payload.
SAMPLE = 1 << 15


@dataclass
class BranchStats:
    """One branch of one run. Device scalars stay on the device until `as_dict`.

    map: per step the numbers of the blocks that were skipped. changes: per computed (or gated)
    step the pair (sum of differences, sum of magnitudes). drift: the same against the prediction.
    """

    name: str
    n_blocks: int
    steps: int = 0
    computed: int = 0
    block_calls: int = 0
    skipped: int = 0
    part_calls: int = 0
    parts_reused: int = 0
    map: list[frozenset[int]] = field(default_factory=list)
    changes: list[Any] = field(default_factory=list)
    drift: list[Any] = field(default_factory=list)
    decided: Counter[str] = field(default_factory=Counter)

    def record(self, called: int, skipped: frozenset[int], is_reused: bool) -> None:
        """Count one finished forward; is_reused: anything of it beside sub-layers."""
        self.steps += 1
        self.computed += not is_reused
        self.block_calls += called
        self.skipped += len(skipped)
        self.map.append(skipped)

    def record_parts(self, called: int, reused: int) -> None:
        """Count one finished forward's calls of the sub-layers that rules are about."""
        self.part_calls += called
        self.parts_reused += reused

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "name": self.name,
            "steps": self.steps,
            "computed": self.computed,
            "reused": self.steps - self.computed,
            "block_calls": self.block_calls,
            "block_calls_skipped": self.skipped,
            "part_calls": self.part_calls,
            "part_calls_reused": self.parts_reused,
            "change": spread(ratios(self.changes)),
            "drift_db": drift_db(self.drift),
            "decided": dict(self.decided),
            "map": [[int(i not in row) for i in range(self.n_blocks)] for row in self.map],
        }


@dataclass
class RunStats:
    """One run of one denoiser."""

    number: int
    branches: list[BranchStats] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    cache_bytes: int = 0
    is_finished: bool = False
    attention: AttentionStats | None = None

    def reused_anything(self) -> bool:
        """Whether any call of the denoiser, a block or a sub-layer was not done."""
        return any(b.computed < b.steps or b.parts_reused for b in self.branches)

    def skipped_fraction(self) -> float:
        """Share of the block calls not done; 0 where there were none."""
        calls = sum(branch.block_calls for branch in self.branches)
        return sum(branch.skipped for branch in self.branches) / calls if calls else 0.0


def ratios(pairs: list[Any]) -> list[float]:
    """Relative changes from (difference, magnitude) pairs, with one read for all of them."""
    if not pairs:
        return []
    rows = torch.stack([torch.as_tensor(pair).detach().float().cpu() for pair in pairs]).tolist()
    return [d / m for d, m in rows if m > 0 and d == d]


def spread(values: list[float]) -> dict[str, float] | None:
    """Smallest, median and largest value, or None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def drift_db(pairs: list[Any]) -> float | None:
    """How well reuse would have hit the computed steps: -20 log10 of the median relative error."""
    errors = spread(ratios(pairs))
    if errors is None:
        return None
    return -20.0 * float(torch.log10(torch.tensor(max(errors["median"], 1e-6))))
