"""`select_blocks` and its four rules; published selections are one of them and a forced set."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import pick_backend
from . import reference

# The Triton kernel holds a row of scores in registers.
MAX_FUSED_BLOCKS = 4096


@dataclass(frozen=True)
class MassKept:
    """Rule A: the fewest blocks, largest first, whose scores sum to `tau` of the row's sum.

    XAttention, NABLA, SVG2, PBS. `tau` is a float or a tensor `[B|1, H|1]` in (0, 1]; 1 keeps
    every block.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_share("MassKept.tau", self.tau)


@dataclass(frozen=True)
class MassBelow:
    """Rule B: as many blocks, largest first, as sum to at most `tau` of the row; at least one.

    SpargeAttn. The block that would cross `tau` is dropped, so `tau` bounds the kept mass from
    above.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_share("MassBelow.tau", self.tau)


@dataclass(frozen=True)
class Count:
    """Rule C: the `count` largest blocks of each row.

    VSA, AdaSpa, MoBA. An int of at least 1, or an int tensor `[B|1, H|1]` for budgets per head.
    """

    count: int | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.count, Tensor):
            if self.count.dim() != 2 or self.count.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"Count.count is {self.count.dtype} {tuple(self.count.shape)}; budgets per "
                    "head must be int32 or int64 [B|1, H|1]."
                )
        elif self.count < 1:
            raise ValueError(f"Count.count is {self.count}; a row must keep at least 1 block.")


@dataclass(frozen=True)
class CostGreedy:
    """Rule D: blocks by score per cost, until the cost spent reaches `budget`.

    SVG-EAR. The block that crosses the budget is kept. `cost` broadcasts against the scores,
    usually key tokens per block `[B|1, H|1, 1, nK]`; `budget` is `[B|1, H|1, nQ|1]` in the same
    unit.
    """

    cost: Tensor
    budget: Tensor

    def __post_init__(self) -> None:
        if self.cost.dim() != 4 or self.budget.dim() != 3:
            raise ValueError(
                f"CostGreedy got cost {tuple(self.cost.shape)} and budget "
                f"{tuple(self.budget.shape)}; they must be [B|1, H|1, nQ|1, nK] and "
                "[B|1, H|1, nQ|1]."
            )


Rule = MassKept | MassBelow | Count | CostGreedy


def select_blocks(
    scores: Tensor,
    rule: Rule,
    *,
    forced: Tensor | None = None,
    min_blocks: int = 1,
    min_ratio: float = 0.0,
    max_ratio: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Choose key blocks for every query block.

    Blocks of equal score are taken in ascending order. NaN counts as the lowest score and as mass
    0.

    Args:
        scores: `[B, H, nQ, nK]`, higher is more important; masses (at least 0) for rules A and B.
        rule: Which prefix of the ranking is kept.
        forced: bool, broadcastable to the scores; always kept, in addition to what the rule chose.
        min_blocks: Fewest blocks that the rule keeps in a row; 0 allows empty rows.
        min_ratio: The same as a share of nK, rounded up.
        max_ratio: Most blocks in a row as a share of nK, rounded down but at least 1; gives flat
            latency. Forced blocks count against it and are kept even when they exceed it.
        backend: "torch", "triton" (rules A to C, nK up to 4096) or None for the best that can run
            here.

    Returns:
        bool `[B, H, nQ, nK]`.

    Raises:
        ValueError: Limits or shapes that do not fit, or a backend that cannot run.
    """
    if scores.dim() != 4 or not scores.is_floating_point():
        raise ValueError(
            f"scores are {scores.dtype} {tuple(scores.shape)}; they must be [B, H, nQ, nK] floats."
        )
    columns = scores.shape[3]
    if not 0 <= min_blocks <= columns or not 0 <= min_ratio <= max_ratio <= 1 or max_ratio == 0:
        raise ValueError(
            f"min_blocks {min_blocks}, min_ratio {min_ratio}, max_ratio {max_ratio} for {columns} "
            "key blocks; it must hold that 0 <= min_blocks <= nK and "
            "0 <= min_ratio <= max_ratio <= 1, max_ratio above 0."
        )
    if forced is not None and (forced.dtype != torch.bool or forced.device != scores.device):
        raise ValueError(
            f"forced is {forced.dtype} on {forced.device}; it must be bool on {scores.device}."
        )
    if forced is not None:
        forced = _expand("forced", forced, scores.shape)
    most = max(1, int(max_ratio * columns))
    least = min(most, max(min_blocks, -int(-min_ratio * columns // 1)))
    fusable = not isinstance(rule, CostGreedy) and columns <= MAX_FUSED_BLOCKS
    if pick_backend(backend, scores) == "triton" and (fusable or backend is not None):
        if not fusable or isinstance(rule, CostGreedy):
            raise ValueError(
                f"backend='triton' selects by rules A to C among up to {MAX_FUSED_BLOCKS} blocks, "
                f"not by {type(rule).__name__} among {columns}; use backend='torch' or None."
            )
        from .kernel import select_blocks_triton

        name, amount = _amount(rule, scores)
        return select_blocks_triton(scores, name, amount, forced, least, most)
    return reference.select_blocks_torch(*_ranking(rule, scores), forced, least, most)


def _amount(rule: MassKept | MassBelow | Count, scores: Tensor) -> tuple[str, Tensor]:
    """The rule's letter and its number for every head, fp32 `[B, H]`."""
    letter = {MassKept: "A", MassBelow: "B", Count: "C"}[type(rule)]
    amount: int | float | Tensor
    amount = rule.count if isinstance(rule, Count) else rule.tau
    if not isinstance(amount, Tensor):
        return letter, scores.new_full(scores.shape[:2], amount, dtype=torch.float32)
    if amount.device != scores.device:
        raise ValueError(f"the rule's tensor is on {amount.device}, scores on {scores.device}.")
    return letter, _expand("the rule's tensor", amount, scores.shape[:2]).float()


def _ranking(rule: Rule, scores: Tensor) -> tuple[Tensor, Tensor]:
    """What to rank by, and how many blocks of each row's ranking the rule keeps."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if isinstance(rule, CostGreedy):
        cost = _expand("CostGreedy.cost", rule.cost, scores.shape)
        budget = _expand("CostGreedy.budget", rule.budget, scores.shape[:3])
        return reference.count_by_cost(scores, cost, budget)
    letter, amount = _amount(rule, scores)
    if letter == "C":
        return scores, amount.long()[..., None].expand(scores.shape[:3])
    return scores, reference.count_by_mass(scores, amount, crossing_kept=letter == "A")


def _expand(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}; it must broadcast to {tuple(shape)}."
        ) from error


def _check_share(name: str, tau: float | Tensor) -> None:
    """A share is in (0, 1]; on a GPU the values are not read, which would stall it."""
    if isinstance(tau, Tensor):
        if tau.dim() != 2:
            raise ValueError(f"{name} is {tuple(tau.shape)}; a tensor must be [B|1, H|1].")
        if tau.is_cuda:
            return
    low, high = (tau.min(), tau.max()) if isinstance(tau, Tensor) else (tau, tau)
    if not (low > 0 and high <= 1):
        raise ValueError(f"{name} is {tau}; it must be above 0 and at most 1.")
