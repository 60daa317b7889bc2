"""Turn an attention mask into lengths, where it does nothing but leave out padding at the end."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry

# What hosts add to a logit to switch a key off.
_OFF = -9000.0


@dataclass
class Paddings:
    """The masks of one branch, judged once each.

    Judging reads from the device, and a host may build the same mask anew in every layer. So a
    verdict holds while the masks that the denoiser was called with stay the same, unwritten
    objects.
    """

    _sources: tuple[tuple[Any, int], ...] = ()
    _verdicts: dict[Any, tuple[int, ...] | str] = field(default_factory=dict)

    def enter(self, named: dict[str, Any]) -> None:
        """A denoiser call begins: other masks than in the last one make old verdicts void."""
        given = [v for k, v in named.items() if "mask" in k and isinstance(v, torch.Tensor)]
        known = [source() for source, _ in self._sources]
        is_same = len(given) == len(known) and all(
            a is b and _version(a) == version
            for a, b, (_, version) in zip(given, known, self._sources, strict=True)
        )
        if not is_same:
            self._sources = tuple((weakref.ref(mask), _version(mask)) for mask in given)
            self._verdicts.clear()

    def lengths(self, mask: torch.Tensor, geometry: Geometry) -> tuple[int, ...] | None:
        """Leading valid tokens of each batch entry, or None where no token is padding.

        Raises:
            PlanError: the mask does more than that.
        """
        key = (mask.shape, mask.dtype, geometry)
        if key not in self._verdicts:
            self._verdicts[key] = _judge(mask, geometry)
        verdict = self._verdicts[key]
        if isinstance(verdict, str):
            raise PlanError(verdict)
        return None if all(length == geometry.tokens for length in verdict) else verdict


def _judge(mask: torch.Tensor, geometry: Geometry) -> tuple[int, ...] | str:
    """The lengths, or why the mask is none of padding alone."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != geometry.tokens:
        return f"a mask of shape {tuple(mask.shape)} is no padding mask [B, 1, 1, S]"
    keeps = mask if mask.dtype == torch.bool else mask == 0
    first = geometry.before if mask.shape[2] > 1 else 0
    keys = keeps[:, 0, first]
    lengths = keys.sum(-1)
    places = torch.arange(keys.shape[-1], device=keys.device)
    is_prefix = (keys == (places < lengths[:, None])).all()
    # Rows of padding queries may hold anything: nobody looks at what comes out there.
    rows = keeps[:, 0, first : first + geometry.video] if mask.shape[2] > 1 else keeps[:, 0]
    is_alike = (rows == keys[:, None]).all()
    is_hard = (
        torch.ones_like(is_alike) if mask.dtype == torch.bool else (keeps | (mask < _OFF)).all()
    )
    verdict = torch.cat((lengths, torch.stack((is_prefix, is_alike, is_hard)))).tolist()
    if not all(verdict[-3:]):
        return "the mask does more than leave out padding at the end"
    return tuple(int(length) for length in verdict[:-3])


def _version(tensor: torch.Tensor | None) -> int:
    """Rises with every write into the tensor, as far as torch counts them."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
