"""Other people's kernels, each used only when it is asked for by name.

A backend is two functions. `objection` says why it cannot carry out a call, or nothing; `attend`
carries it out on `[B, H, S, D]`, after the checks of the api.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .flashinfer import flashinfer_objection, flashinfer_sparse_attention
from .flex import flex_objection, flex_sparse_attention
from .plan import SparsePlan
from .sparge import sparge_objection, sparge_sparse_attention


class OnRequest(NamedTuple):
    """One backend.

    extras: of the options "return_lse", "initial", "centroids" and "key_lengths" those it takes.
    """

    objection: Callable[[Tensor, SparsePlan], str]
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    extras: tuple[str, ...] = ()


ON_REQUEST = {
    "flashinfer": OnRequest(
        flashinfer_objection, flashinfer_sparse_attention, ("return_lse", "initial")
    ),
    "flex": OnRequest(flex_objection, flex_sparse_attention),
    "sparge": OnRequest(sparge_objection, sparge_sparse_attention),
}


def objection_of(name: str, query: Tensor, plan: SparsePlan, extras: dict[str, Any]) -> str:
    """Why backend `name` cannot carry out this call, or an empty string.

    extras: the options of `sparse_attention` beyond plan and scale; None or False where not used.
    """
    backend = ON_REQUEST[name]
    used = [key for key, value in extras.items() if value is not None and value is not False]
    missing = [key for key in used if key not in backend.extras]
    if missing:
        return f"it has no {', '.join(missing)}"
    return backend.objection(query, plan)
