"""One run of one denoiser in one thread, and one forward in it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from blockcache.engine.attention import SparseForward, SparseRun
from blockcache.engine.branch import Branch, Role, Unit
from blockcache.engine.deciding import Decider, Verdict
from blockcache.engine.parts import Seen
from blockcache.engine.stats import RunStats
from blockcache.engine.tracker import BranchNames
from blockcache.engine.wiring import Values, Watch
from blockcache.plan.recipe import Recipe, Schedule
from blockcache.plan.steps import Step


@dataclass
class Run:
    """One run in one thread."""

    recipe: Recipe
    steps: tuple[Step, ...]
    stats: RunStats
    group: Any = None
    """The processes that share its samples."""
    branches: list[Branch] = field(default_factory=list)
    names: BranchNames = field(default_factory=BranchNames)
    step: int = -1
    calls: int = 0
    calls_before: int = 0
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    """Online rule to what this step's first branch decided."""
    adapter: Any = None
    objection: str = ""
    """Why the whole run is computed plainly."""
    schedules: dict[tuple[int, int], Schedule | None] = field(default_factory=dict)
    sparse: SparseRun | None = None
    """The recipe's sparse rule in this run."""


@dataclass
class Forward:
    """One denoiser call under way."""

    step: Step
    branch: Branch
    latents: torch.Tensor | None
    """What the denoiser got; a copy where a rule needs it."""
    bound: dict[str, Any] = field(default_factory=dict)
    """Arguments by name of the block that is being entered."""
    sparse: SparseForward | None = None
    watch: Watch | None = None
    reused: frozenset[int] = frozenset()
    """Numbers of the reused units."""
    cells: frozenset[int] = frozenset()
    """Numbers of the reused cells."""
    partly: dict[Unit, tuple[bool, ...]] = field(default_factory=dict)
    """Computed units of which only these samples are taken; the others are reused."""
    unneeded: frozenset[Unit] = frozenset()
    """Units whose payload no later step looks back on, as far as that is known."""
    decided: Counter[str] = field(default_factory=Counter)
    """What decided how often; into the statistics when the forward is done."""
    roles: dict[int, Role] = field(default_factory=dict)
    inputs: dict[Unit | Decider, Values] = field(default_factory=dict)
    open: dict[Unit, Values] = field(default_factory=dict)
    edges: dict[int, tuple[Values, Any]] = field(default_factory=dict)
    """While watching: copies of what entered and left the blocks where units may begin or end."""
    seen: list[Seen] = field(default_factory=list)
    """While watching: the calls of parts."""
    passed: Any = None
    """What the last skipped block inside a unit put out."""
    called: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    """Parts called."""
    is_whole: bool = False
    """The denoiser's own output is reused."""
    has_stored: bool = False
    is_rejected: bool = False
    """A verified rule disagreed with its forecast: compute the step after all."""
    is_retry: bool = False
    """The same step again, where nothing is reused whatever is measured."""
