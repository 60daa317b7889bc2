"""What the sparse rule did in a run: counted while it runs, read when somebody asks."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

_PER_LINE = 16
"""Layers in a line of the screen."""


@dataclass
class LayerStats:
    """The sparse calls of one block. Scalars stay on the device until `as_dict`.

    steps: the step of each call.
    """

    steps: list[int] = field(default_factory=list)
    densities: list[torch.Tensor] = field(default_factory=list)
    recalls: list[torch.Tensor] = field(default_factory=list)


@dataclass
class AttentionStats:
    """One run.

    layers: by block number. dense: what kept a self-attention dense, and how often. planning_s:
    host seconds in planners, as long as tensors are on the CPU. state_bytes: most that was
    remembered at a time.
    """

    planner: str
    layers: dict[int, LayerStats] = field(default_factory=dict)
    dense: Counter[str] = field(default_factory=Counter)
    planning_s: float = 0.0
    state_bytes: int = 0

    def layer(self, index: int) -> LayerStats:
        """The figures of block `index`."""
        return self.layers.setdefault(index, LayerStats())

    @property
    def sparse_calls(self) -> int:
        """Self-attentions that were thinned out."""
        return sum(len(layer.densities) for layer in self.layers.values())

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data, with one read from the device for each kind of figure."""
        densities = {i: _mean(layer.densities) for i, layer in sorted(self.layers.items())}
        recalls = {i: _mean(layer.recalls) for i, layer in sorted(self.layers.items())}
        calls = {i: len(layer.densities) for i, layer in sorted(self.layers.items())}
        total = sum(calls.values())
        weighted = sum(calls[i] * value for i, value in densities.items() if value is not None)
        known = [value for value in recalls.values() if value is not None]
        return {
            "planner": self.planner,
            "sparse_calls": total,
            "dense_calls": dict(self.dense),
            "density": weighted / total if total else None,
            "recall": sum(known) / len(known) if known else None,
            "layers": [
                {"layer": i, "calls": calls[i], "density": densities[i], "recall": recalls[i]}
                for i in calls
            ],
            "map": self._map(),
            "planning_s": self.planning_s,
            "state_bytes": self.state_bytes,
        }

    def _map(self) -> list[list[float | None]]:
        """Density `[steps][layers]` as far as sparse calls go, mean over the branches; None: dense.

        One read from the device.
        """
        calls = [(step, i) for i, layer in self.layers.items() for step in layer.steps]
        if not calls:
            return []
        found = [density for layer in self.layers.values() for density in layer.densities]
        values = torch.stack([density.detach().float().mean() for density in found]).tolist()
        at: dict[tuple[int, int], list[float]] = {}
        for call, value in zip(calls, values, strict=True):
            at.setdefault(call, []).append(value)
        steps, layers = (max(numbers) + 1 for numbers in zip(*calls, strict=True))
        return [
            [fmean(at[step, i]) if (step, i) in at else None for i in range(layers)]
            for step in range(steps)
        ]


def screen(figures: dict[str, Any]) -> list[str]:
    """The figures of `AttentionStats.as_dict` as lines for people."""
    dense = sum(figures["dense_calls"].values())
    lines = [
        f"attention: {figures['planner']}   sparse calls {figures['sparse_calls']}   "
        f"density {_shown(figures['density'])}   recall {_shown(figures['recall'])}   "
        f"planning {figures['planning_s']:.2f} s   "
        f"memory {figures['state_bytes'] / 2**20:.2f} MiB"
    ]
    for start in range(0, len(figures["layers"]), _PER_LINE):
        shown = figures["layers"][start : start + _PER_LINE]
        lines.append("  layer    " + "".join(f"{row['layer']:>5}" for row in shown))
        for name in ("density", "recall"):
            lines.append(f"  {name:8} " + "".join(f"{_shown(row[name]):>5}" for row in shown))
    if dense:
        reasons = figures["dense_calls"].items()
        lines.append("  dense:   " + ", ".join(f"{reason} ({count})" for reason, count in reasons))
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: list[torch.Tensor]) -> float | None:
    if not values:
        return None
    return float(torch.stack([value.detach().float().mean() for value in values]).mean())
