"""The contract of planners, and the one function that carries a plan out.

A planner is the sparse-attention twin of a policy: it sees the queries and keys of one
self-attention, after norm and rotary embedding, and says which key blocks each query block attends.
It sees the video only. Text is everybody's business: `attend` gives every video query all text keys
and every text query all keys, exactly, whatever the planner chose, and merges the two by their
log-sum-exp. So no block mixes text and video, and no planner has to know where text lies.

Most planners are `score -> select -> force -> pack`; the pieces are in `pieces.py` and
`tilings.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from blockcache.errors import PlanError
from blockcache.kernels.common import needs_grad
from blockcache.kernels.dense_attention import dense_attention
from blockcache.kernels.sparse_attention import (
    Centroids,
    SparsePlan,
    merge_states,
    pack_bits,
    sparse_attention,
)
from blockcache.plan.geometry import Geometry, PlannerSpec
from blockcache.plan.steps import Step

Partial = tuple[Tensor, Tensor]
"""Output `[B, H, S, D]` and log-sum-exp `[B, H, S]` (natural, fp32) over some of the keys."""


class Card(NamedTuple):
    """One row of the table of methods, in words."""

    paper: str
    layout: str
    score: str
    select: str
    force: str = "none"
    remainder: str = "dropped"
    state: str = "none"


@dataclass(frozen=True)
class Context:
    """Where in the run an attention call stands.

    step: the sampler step. layer, layers: number of this self-attention and how many there are.
    scale: factor on the logits, None is `1 / sqrt(D)`. backend: of the attention itself, as the
    kernels take it; planning takes the best that is there.
    refresh: plan anew, whatever is remembered. text: filled in by `attend`: what the video queries
    get from the tokens outside the video, None where there are none.
    """

    step: Step
    layer: int = 0
    layers: int = 1
    scale: float | None = None
    backend: str | None = None
    refresh: bool = False
    text: Partial | None = None

    @property
    def dense_backend(self) -> str | None:
        """Of the dense parts: other people's kernels are asked for the sparse ones only."""
        return self.backend if self.backend in ("torch", "triton") else None


@dataclass
class State:
    """What a planner remembers for one (site, branch), from step to step of one run.

    tensors: by name. plan: the last plan, its mask as bits. refreshed: index of the step that made
    it. inner: the state of a planner inside this one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plan: SparsePlan | None = None
    refreshed: int | None = None
    inner: "State | None" = None
    _made_for: tuple[Any, ...] | None = None
    _last_step: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes held, including those of inner states."""
        held = list(self.tensors.values())
        if self.plan is not None:
            held.append(self.plan.bits)
            # Tables shared by all heads are shared by all states, too.
            orders = (self.plan.q_order, self.plan.k_order)
            held += [table for table in orders if table is not None and table.shape[1] > 1]
        own = sum(tensor.untyped_storage().nbytes() for tensor in held)
        return own + (0 if self.inner is None else self.inner.nbytes)

    def clear(self) -> None:
        """Forget everything."""
        self.tensors, self.plan, self.refreshed, self.inner = {}, None, None, None
        self._made_for, self._last_step = None, -1

    def nested(self) -> "State":
        """The state of the planner inside this one."""
        if self.inner is None:
            self.inner = State()
        return self.inner

    def prepare(self, query: Tensor, geometry: Geometry, context: Context) -> None:
        """Forget what belongs to other shapes, to another device or to an earlier run."""
        step = context.step
        made_for = (query.shape, query.dtype, query.device, geometry, step.total)
        if made_for != self._made_for or step.index < self._last_step:
            self.clear()
        self._made_for, self._last_step = made_for, step.index

    def is_due(self, every: int, context: Context) -> bool:
        """Whether what is remembered is missing, older than `every` steps or asked to be remade."""
        if context.refresh or self.refreshed is None:
            return True
        return context.step.index - self.refreshed >= every


@dataclass(frozen=True)
class Decision:
    """What a planner decided for the video's queries and keys.

    plan: the key blocks to attend. None: not sparse, and `reason` says why; then either the host's
    own attention computes everything, or, with `computed`, the planner already has exactly that.
    initial: `(output, LSE)` over keys that the plan leaves out, to be merged in.
    centroids: stand-ins for the key blocks that were not chosen.
    need_lse: `finish` wants the log-sum-exp.
    computed: output and LSE of the video queries over all video keys.
    refreshed: planning also did the work for all other blocks, so this call was not cheaper than
    dense attention.
    """

    plan: SparsePlan | None
    reason: str = ""
    initial: Partial | None = None
    centroids: Centroids | None = None
    need_lse: bool = False
    computed: Partial | None = None
    refreshed: bool = False

    @classmethod
    def dense(cls, reason: str, computed: Partial | None = None) -> "Decision":
        """Attend to everything, because of `reason`."""
        return cls(None, reason, computed=computed)

    @property
    def is_dense(self) -> bool:
        """Whether every key is attended."""
        return self.plan is None

    def density(self, geometry: Geometry) -> Tensor:
        """Kept fraction of all token pairs, text included, fp32 `[B|1, H|1]`; not read back."""
        if self.plan is None or self.refreshed:
            return torch.ones(1, 1)
        kept = self.plan.density(geometry.video, geometry.video)
        share = (geometry.video / geometry.tokens) ** 2
        return kept * share + (1.0 - share)


class Planner(PlannerSpec):
    """Base class of all methods. Parameters are the fields of a `spec`, hence data in plan files.

    A planner holds no tensor: whatever it remembers is in the `State` it is handed.
    """

    card: ClassVar[Card]

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, state: State, context: Context
    ) -> Decision:
        """Choose the key blocks.

        Args:
            q: Video queries `[B, H, geometry.video, D]`, after norm and rotary embedding, in
                frame-major order. Views with any strides but a last one of 1.
            k: Video keys, the same shape.
            v: Video values.
            geometry: Of the whole sequence.
            state: This site's and branch's memory, already fit for these shapes.
            context: Where in the run.
        """
        raise NotImplementedError

    def finish(self, output: Tensor, lse: Tensor | None, state: State, context: Context) -> Tensor:
        """Correct the video's output `[B, H, geometry.video, D]`, text keys merged in.

        lse: Of `output`, where the decision asked for it. Not called for dense decisions.
        """
        return output

    def state_bytes(
        self, geometry: Geometry, batch: int, heads: int, head_dim: int, itemsize: int
    ) -> int:
        """About how many bytes one state comes to hold, for budgets and tables."""
        return 0

    def describe(self) -> Card:
        """The card, with what the parameters change in it."""
        return self.card


class Attended(NamedTuple):
    """What `attend` hands back.

    output: `[B, H, S, D]`, or None where the decision is dense and the host should compute.
    """

    output: Tensor | None
    decision: Decision


def attend(
    planner: Planner,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    state: State,
    context: Context,
) -> Attended:
    """Plan one self-attention and carry the plan out, text included.

    Args:
        planner: The method.
        q: `[B, H, S, D]`, S = `geometry.tokens`, after norm and rotary embedding.
        k: Same shape, dtype and device.
        v: Same shape, dtype and device.
        geometry: Where video and text lie.
        state: One per (site, branch); cleared here when shapes or the run change.
        context: Where in the run.

    Raises:
        PlanError: a geometry that is not this sequence's.
        ValueError: a needed gradient (inference only), or tensors that do not fit together.
    """
    _check(q, k, v, geometry)
    state.prepare(q, geometry, context)
    finite = _finite(q, k, v)
    # Off the GPU a look costs nothing; on it, it would stall the queue (see _open_unfit).
    if not q.is_cuda and not finite.all():
        state.clear()
        return Attended(None, Decision.dense("not finite"))
    video = slice(geometry.before, geometry.before + geometry.video)
    inner = q[:, :, video], k[:, :, video], v[:, :, video]
    if geometry.others:
        context = replace(context, text=_over_text(inner[0], k, v, geometry, context))
    decision = planner.plan(*inner, geometry, state, context)
    if decision.plan is None and decision.computed is None:
        return Attended(None, decision)
    carried_out = decision
    if q.is_cuda and decision.plan is not None:
        carried_out = replace(decision, plan=_open_unfit(decision.plan, finite))
    output = _carry_out(planner, carried_out, *inner, state, context)
    return Attended(_with_text_rows(output, q, k, v, geometry, context), decision)


def _carry_out(
    planner: Planner, decision: Decision, q: Tensor, k: Tensor, v: Tensor, state: State,
    context: Context,
) -> Tensor:  # fmt: skip
    """The video's rows `[B, H, Sv, D]`."""
    if decision.plan is None:
        made = _merged(decision.computed, context.text)
        return made[0].to(q.dtype) if made is not None else q
    result = sparse_attention(
        q, k, v, decision.plan, scale=context.scale, layout="BHSD", return_lse=decision.need_lse,
        initial=_merged(decision.initial, context.text), centroids=decision.centroids,
        backend=context.backend,
    )  # fmt: skip
    output, lse = result if isinstance(result, tuple) else (result, None)
    return planner.finish(output, lse, state, context)


def _over_text(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, context: Context) -> Partial:
    """What the video's queries get from the tokens around the video."""
    end = geometry.before + geometry.video
    keys, values = (torch.cat((t[:, :, : geometry.before], t[:, :, end:]), 2) for t in (k, v))
    lengths = None
    if geometry.valid is not None:
        lengths = torch.tensor(geometry.valid, device=q.device) - geometry.video
    output, lse = dense_attention(
        q, keys, values, scale=context.scale, layout="BHSD", return_lse=True, key_lengths=lengths,
        backend=context.dense_backend,
    )  # fmt: skip
    return output, lse


def _with_text_rows(
    video: Tensor, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, context: Context
) -> Tensor:
    """The whole output: the video's rows, and around them dense rows."""
    if not geometry.others:
        return video
    end = geometry.before + geometry.video
    rows = torch.cat((q[:, :, : geometry.before], q[:, :, end:]), 2)
    lengths = None
    if geometry.valid is not None:
        lengths = torch.tensor(geometry.valid, device=q.device)
    made = dense_attention(
        rows, k, v, scale=context.scale, layout="BHSD", key_lengths=lengths,
        backend=context.dense_backend,
    )  # fmt: skip
    text = cast(Tensor, made)
    return torch.cat((text[:, :, : geometry.before], video, text[:, :, geometry.before :]), 2)


def _merged(a: Partial | None, b: Partial | None) -> Partial | None:
    if a is None or b is None:
        return a if b is None else b
    return merge_states(*a, *b)


def _finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which heads hold numbers only, bool `[B, H]`, in one pass that stores nothing."""
    total = sum(t.sum((2, 3), dtype=torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    return torch.isfinite(torch.as_tensor(total))


def _open_unfit(plan: SparsePlan, finite: Tensor) -> SparsePlan:
    """The plan with every block chosen in heads that hold NaN: dense, without asking the GPU."""
    every = torch.ones(1, 1, 1, plan.num_k_blocks, dtype=torch.bool, device=finite.device)
    bits = torch.where(finite[:, :, None, None], plan.bits, pack_bits(every))
    return replace(plan, bits=bits)


def _check(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape != q.shape:
            raise PlanError(
                f"{name} is {tuple(tensor.shape)}, q is {tuple(q.shape)}; self-attention needs all "
                "three as [B, H, S, D]. Cross-attention stays with the host."
            )
    geometry.check(q.shape[2], q.shape[0])
    if needs_grad(q, k, v):
        raise ValueError(
            "sparse attention has no backward pass and a gradient is needed; call it under "
            "torch.no_grad(), or disable blockcache for training."
        )
