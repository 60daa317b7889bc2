"""The door from the host's attention to the planners.

Every diffusers model ends up in `torch.nn.functional.scaled_dot_product_attention`: some
processors call it themselves, the others through `dispatch_attention_fn`. A `TorchFunctionMode`
around a block's call sees both, with queries and keys after norm and rotary embedding. It belongs
to the thread, goes with its `with` block, patches nothing and passes everything else on unchanged.
It costs about 3 microseconds per torch call, so it is there only while a block is to be sparse.

What is not understood stays dense, is counted with its reason, and is said once.
"""

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockcache.engine.attention_stats import AttentionStats
from blockcache.engine.blocks import Blocks
from blockcache.engine.geometry import Arrangement, Named, arrange
from blockcache.engine.groups import gathered_order, group_of
from blockcache.engine.padding import Paddings
from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry
from blockcache.plan.sparse_rule import Sparse
from blockcache.plan.steps import Step
from blockcache.sparse import Context, Decision, Planner, State, attend, sampled_recall

Call = Callable[..., Any]

MIN_LENGTH = {"cpu": 1024, "cuda": 8192}
"""Tokens from which sparse attention pays, by type of device; on the CPU measured, with planning,
at a density of 0.25 (1.2 to 1.5 times as fast there, twice at 2048), on the GPU an estimate."""

RETRY_AFTER = 10
"""Steps for which a site rests after its plan kept too much."""

RECALL_EVERY = 10
"""Steps between two samples of a site's recall."""

_SDPA = F.scaled_dot_product_attention
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD_ON_CUDA = 128


@dataclass
class Site:
    """One attention call of one block in one branch.

    granted: bytes of the budget. resting_until: the step in which it is tried again. recall_due:
    the step of the next sample. plan, density: the last ones, to see whether the plan is new.
    """

    state: State = field(default_factory=State)
    granted: int = 0
    resting_until: int = 0
    recall_due: int = 0
    plan: "weakref.ref[Any] | None" = None
    density: Tensor | None = None


@dataclass
class BranchSites:
    """What one branch remembers.

    sites: by (block, order of the attention call in it). objection: why the arrangement is not
    known. others: lengths of the sequences that only cross-attention sees. unread: sites whose new
    density was not yet compared with the limit.
    """

    arrangement: Arrangement | None = None
    objection: str = ""
    others: frozenset[int] = frozenset()
    sites: dict[tuple[int, int], Site] = field(default_factory=dict)
    paddings: Paddings = field(default_factory=Paddings)
    unread: list[Site] = field(default_factory=list)


class SparseRun:
    """The sparse rule in one run in one thread."""

    def __init__(
        self, rule: Sparse, denoiser: nn.Module, blocks: Blocks, say: Callable[[str], None]
    ) -> None:
        """Nothing is allocated before the first sparse call.

        say: tells the user, once for each message.

        Raises:
            PlanError: the rule's planner is none.
        """
        if not isinstance(rule.planner, Planner):
            raise PlanError(f"{type(rule.planner).__name__} is no planner")
        self.rule, self.denoiser, self.blocks = rule, denoiser, blocks
        self.stats = AttentionStats(type(rule.planner).__name__)
        self.planner = _Timed(rule.planner, self.stats)
        self._say, self._has_said = say, False
        self._backend = foreign_backend(denoiser)
        self._branches: dict[int, BranchSites] = {}
        self._compiled: dict[int, bool] = {}

    def forward(self, branch: int, step: Step, named: Named) -> "SparseForward":
        """A denoiser call of branch number `branch` begins.

        named: its arguments by parameter name.
        """
        kept = self._branches.get(branch)
        if kept is None:
            kept = self._branches[branch] = self._entered(named)
        kept.paddings.enter(named)
        self._look_back(kept, step)
        return SparseForward(self, kept, step)

    def drop(self, branch: int | None = None) -> None:
        """Forget what a branch, or every branch, remembers."""
        if branch is None:
            self._branches.clear()
        else:
            self._branches.pop(branch, None)

    def finish(self) -> None:
        """The run is over: say so if it had no effect and nobody was told why."""
        if not self.stats.sparse_calls and not self._has_said:
            reasons = ", ".join(self.stats.dense) or "no self-attention over the latents was seen"
            self._say(f"no attention was made sparse: {reasons}")

    def keep_dense(self, reason: str, is_news: bool = True) -> None:
        """Count what stays dense. News are said: that the schedule wants it so is none."""
        self.stats.dense[reason] += 1
        if is_news:
            self._has_said = True
            self._say(f"attention stays dense: {reason}")

    def objection(self, kept: BranchSites, index: int) -> str:
        """Why no attention of block `index` can be made sparse; empty where it can."""
        return self._backend or kept.objection or self._compiled_objection(index)

    def grants(self, site: Site, query: Tensor, geometry: Geometry) -> bool:
        """Whether the budget allows what `site` may come to remember."""
        if self.rule.budget_mib is None or site.granted:
            return True
        batch, heads, _, head_dim = query.shape
        wanted = self.planner.state_bytes(geometry, batch, heads, head_dim, query.element_size())
        spent = sum(other.granted for other in self._sites())
        if spent + wanted > self.rule.budget_mib * 2**20:
            return False
        site.granted = wanted
        return True

    def _entered(self, named: Named) -> BranchSites:
        others = frozenset(
            value.shape[1]
            for name, value in named.items()
            if "encoder" in name and isinstance(value, Tensor) and value.dim() == 3
        )
        try:
            return BranchSites(arrange(self.denoiser, named), others=others)
        except PlanError as error:
            return BranchSites(objection=str(error))

    def _look_back(self, kept: BranchSites, step: Step) -> None:
        """Take stock of the forward before: one read, and only where plans were made anew."""
        held = sum(site.state.nbytes for site in self._sites())
        self.stats.state_bytes = max(self.stats.state_bytes, held)
        if not kept.unread:
            return
        densities = torch.stack([s.density for s in kept.unread if s.density is not None]).tolist()
        for site, density in zip(kept.unread, densities, strict=True):
            if density > self.rule.max_density:
                site.resting_until = step.index + RETRY_AFTER
        kept.unread.clear()

    def _compiled_objection(self, index: int) -> str:
        if index not in self._compiled:
            parts = self.blocks.blocks[index].module.modules()
            self._compiled[index] = any(_is_compiled(part) for part in parts)
        return "the block is compiled, so its attention is not seen" * self._compiled[index]

    def _sites(self) -> list[Site]:
        return [site for kept in self._branches.values() for site in kept.sites.values()]


class SparseForward:
    """The sparse rule in one denoiser call."""

    def __init__(self, run: SparseRun, kept: BranchSites, step: Step) -> None:
        """Made by `SparseRun.forward`."""
        self.run, self.kept, self.step = run, kept, step

    def around(self, index: int, inner: Call) -> Call:
        """The call of block `index` with its self-attention made sparse, where that is due."""
        rule, layers = self.run.rule, len(self.run.blocks)
        scheduled = rule.dense_because(self.step, index, layers)
        if scheduled:
            self.run.keep_dense(scheduled, is_news=False)
            return inner
        objection = self.run.objection(self.kept, index)
        if objection:
            self.run.keep_dense(objection)
            return inner
        return functools.partial(self._through_door, index, inner)

    def _through_door(self, index: int, inner: Call, /, *args: Any, **kwargs: Any) -> Any:
        with _Door(self, index):
            return inner(*args, **kwargs)

    def geometry(self, query: Tensor, key: Tensor, order: int) -> Geometry | None:
        """The geometry of a self-attention over the latents; None for any other attention."""
        if self.kept.arrangement is None or query.dim() != 4 or query.shape[2] != key.shape[2]:
            return None
        length = query.shape[2]
        geometry = self.kept.arrangement.fit(length)
        if geometry is None:
            return None
        # A prompt as long as the latents: self-attention is the first in every block.
        if not geometry.others and length in self.kept.others and order > 0:
            return None
        return geometry

    def attention(
        self, site: Site, geometry: Geometry, context: Context, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor | None:
        """One self-attention through the planner; None where the host should compute it."""
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in qkv)
        output, decision = attend(
            self.run.planner, query, key, value, geometry, site.state, context
        )
        if output is None:
            self.run.keep_dense(decision.reason)
            return None
        self._note(site, decision, geometry, context, query, key)
        return output

    def _note(
        self, site: Site, decision: Decision, geometry: Geometry, context: Context,
        query: Tensor, key: Tensor,
    ) -> None:  # fmt: skip
        layer = self.run.stats.layer(context.layer)
        is_sparse = decision.plan is not None and not decision.refreshed
        known = None if site.plan is None else site.plan()
        if site.density is None or not is_sparse or decision.plan is not known:
            site.plan = None if decision.plan is None else weakref.ref(decision.plan)
            site.density = decision.density(geometry).mean().to(query.device)
            if is_sparse:
                self.kept.unread.append(site)
        layer.steps.append(self.step.index)
        layer.densities.append(site.density)
        if is_sparse and self.step.index >= site.recall_due:
            site.recall_due = self.step.index + RECALL_EVERY
            layer.recalls.append(sampled_recall(decision, query, key, geometry, context).mean())


class _Door(TorchFunctionMode):
    """Open while one block runs: takes over the attention calls that are to be sparse."""

    def __init__(self, forward: SparseForward, index: int) -> None:
        super().__init__()
        self._forward, self._index = forward, index
        self._order = 0

    def __torch_function__(
        self, func: Call, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and not torch.compiler.is_compiling():
            output = self._answer(*args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)

    def _answer(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:  # fmt: skip
        number, self._order = self._order, self._order + 1
        geometry = self._forward.geometry(query, key, number)
        if geometry is None:
            return None
        run, step = self._forward.run, self._forward.step
        site = self._forward.kept.sites.setdefault((self._index, number), Site())
        try:
            query, key, value = _as_cast(query, key, value)
            _check_options(query, key, value, dropout_p, is_causal)
            _check_length(query, run.rule)
            order = gathered_order(geometry, group_of(self._forward.run.denoiser))
            if attn_mask is not None:
                if order is not None:
                    raise PlanError("a mask over text and video that several processes share")
                lengths = self._forward.kept.paddings.lengths(attn_mask, geometry)
                geometry = replace(geometry, valid=lengths)
            if step.index < site.resting_until:
                raise PlanError(f"plans kept more than {run.rule.max_density:.0%} of the blocks")
            if not run.grants(site, query, geometry):
                raise PlanError(f"the budget of {run.rule.budget_mib:g} MiB is spent")
            backend = None if run.rule.backend == "auto" else run.rule.backend
            layers = len(run.blocks)
            context = Context(step, self._index, layers, scale, backend, run.rule.refreshes(step))
            if order is None:
                return self._forward.attention(site, geometry, context, (query, key, value))
            order = order.to(query.device)
            qkv = (query[:, :, order], key[:, :, order], value[:, :, order])
            output = self._forward.attention(site, geometry, context, qkv)
            return None if output is None else output[:, :, order.argsort()]
        except PlanError as error:
            run.keep_dense(str(error))
            return None


class _Timed(Planner):
    """A planner whose planning is timed where time passes on the host: not on a GPU."""

    def __init__(self, planner: Planner, stats: AttentionStats) -> None:
        self._planner, self._stats = planner, stats
        self.finish = planner.finish  # type: ignore[method-assign]
        self.state_bytes = planner.state_bytes  # type: ignore[method-assign]

    def plan(self, q: Tensor, *rest: Any) -> Decision:
        start = time.perf_counter()
        decision = self._planner.plan(q, *rest)
        if not q.is_cuda:
            self._stats.planning_s += time.perf_counter() - start
        return decision


def foreign_backend(denoiser: nn.Module) -> str:
    """What the user set in place of torch's own attention, as a reason; empty if nothing."""
    chosen = {
        getattr(getattr(module, "processor", None), "_attention_backend", None)
        for module in denoiser.modules()
    }
    names = {str(getattr(name, "value", name)) for name in chosen if name is not None}
    names = names or {_active_backend()}
    foreign = sorted(names - {"native"})
    if not foreign:
        return ""
    return f"the attention backend {foreign[0]!r} was chosen; reset_attention_backend() undoes it"


def _active_backend() -> str:
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    except ImportError:
        # Older hosts have no choice of backends.
        return "native"
    return str(registry.get_active_backend()[0].value)


def _is_compiled(module: nn.Module) -> bool:
    slot = module._compiled_call_impl
    # Our own hooks sit in that slot, too, and hold what was there before.
    call = getattr(slot, "inner", slot)
    is_plain = call is None or getattr(call, "__func__", None) is nn.Module._call_impl
    wraps = hasattr(module, "_orig_mod") or hasattr(module.forward, "_torchdynamo_orig_callable")
    return wraps or not is_plain


def _check_options(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool
) -> None:
    """Refuse what the kernels do not do.

    Raises:
        PlanError: it says what.
    """
    if is_causal or dropout_p:
        raise PlanError("the attention is causal" if is_causal else "the attention has dropout")
    if not query.shape == key.shape == value.shape:
        raise PlanError("queries, keys and values differ in heads (grouped queries)")
    if any(type(t) not in (Tensor, nn.Parameter) for t in (query, key, value)):
        raise PlanError(f"queries are {type(query).__name__}, no plain tensors")
    dtypes = {t.dtype for t in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise PlanError(f"queries, keys and values are {', '.join(sorted(map(str, dtypes)))}")
    if query.is_cuda and query.shape[3] > _LARGEST_HEAD_ON_CUDA:
        raise PlanError(f"heads of {query.shape[3]} are larger than {_LARGEST_HEAD_ON_CUDA}")


def _check_length(query: Tensor, rule: Sparse) -> None:
    least = rule.min_length
    if least is None:
        least = MIN_LENGTH.get(query.device.type, MIN_LENGTH["cuda"])
    if query.shape[2] < least:
        raise PlanError(f"{query.shape[2]} tokens are fewer than the {least} from which it pays")


def _as_cast(*tensors: Tensor) -> Iterator[Tensor]:
    """What torch's own attention would compute on: under autocast, tensors of its dtype."""
    device = tensors[0].device.type
    is_cast = torch.is_autocast_enabled(device)
    for tensor in tensors:
        may_cast = is_cast and tensor.dtype in _DTYPES
        yield tensor.to(torch.get_autocast_dtype(device)) if may_cast else tensor
