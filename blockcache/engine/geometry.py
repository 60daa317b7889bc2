"""Where the video and the text lie in a denoiser's self-attention, from the arguments of its call.

One row per family in `FAMILIES`. Nothing is taken on trust: `Arrangement.fit` compares the row's
claim with the length that attention really sees, and where the two differ attention stays dense.
A model without a row is guessed from the shape of its latents, and the guess is checked likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry

Grid = tuple[int, int, int]
Named = dict[str, Any]
"""The arguments of a denoiser's call, by parameter name."""


@dataclass(frozen=True)
class Arrangement:
    """One denoiser call's tokens: the grid after patchify, and how many others lie around it.

    is_trimmed: text behind the video arrives without its padding, so the sequence may be shorter.
    """

    grid: Grid
    before: int = 0
    after: int = 0
    is_trimmed: bool = False

    @property
    def video(self) -> int:
        """Tokens of the video."""
        frames, height, width = self.grid
        return frames * height * width

    def fit(self, length: int) -> Geometry | None:
        """The geometry of a sequence of `length` tokens, or None if it is not of this call.

        A sequence of the video alone also fits: some blocks of joint models have one.
        """
        if length == self.before + self.video + self.after:
            return Geometry(*self.grid, self.before, self.after)
        if length == self.video:
            return Geometry(*self.grid)
        extra = length - self.before - self.video
        if self.is_trimmed and 0 < extra <= self.after:
            return Geometry(*self.grid, self.before, extra)
        return None


@dataclass(frozen=True)
class Family:
    """How one family of denoisers lays out its tokens.

    grid: reads frames, height and width, after patchify, off a call.
    before, after: arguments whose tokens (dim 1) lie in front of and behind the video.
    extra: reads further tokens behind the video off a call: reference images.
    is_trimmed: see `Arrangement`.
    """

    grid: Callable[[nn.Module, Named], Grid]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    extra: Callable[[Named, Grid], int] | None = None
    is_trimmed: bool = False

    def arrange(self, denoiser: nn.Module, named: Named) -> Arrangement:
        """This call's arrangement."""
        grid = self.grid(denoiser, named)
        behind = sum(_length(named, name) for name in self.after)
        behind += 0 if self.extra is None else self.extra(named, grid)
        front = sum(_length(named, name) for name in self.before)
        return Arrangement(grid, front, behind, self.is_trimmed)


def arrange(denoiser: nn.Module, named: Named) -> Arrangement:
    """Where the tokens of this denoiser call lie.

    Raises:
        PlanError: the family is not known and cannot be guessed, or the call lacks what its row
            reads.
    """
    family = FAMILIES.get(type(denoiser).__name__)
    if family is None:
        family = _guess(denoiser, named)
    return family.arrange(denoiser, named)


def _latents(axes: str) -> Callable[[nn.Module, Named], Grid]:
    """Reads the grid off latents whose axes are, for example, "BCFHW"."""

    def grid(denoiser: nn.Module, named: Named) -> Grid:
        latents = _tensor(named, "hidden_states", len(axes))
        size = dict(zip(axes, latents.shape, strict=True))
        return _patchified(denoiser, size.get("F", 1), size["H"], size["W"])

    return grid


def _counted(denoiser: nn.Module, named: Named) -> Grid:
    """LTX: latents arrive packed, their size beside them."""
    sizes = [named.get(name) for name in ("num_frames", "height", "width")]
    if not all(isinstance(size, int) for size in sizes):
        raise PlanError("the call gives no num_frames, height and width")
    return _patchified(denoiser, *sizes)


def _numbered(denoiser: nn.Module, named: Named) -> Grid:
    """Flux: rows and columns of the picture from the positions of its tokens."""
    ids = _ids(named)
    count = int((ids[:, 0] == ids[0, 0]).sum())
    rows, columns = (int(ids[:count, i].max()) + 1 for i in (1, 2))
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    if rows * columns != count or not torch.equal(ids[:count, 1:3].long(), expected):
        raise PlanError("img_ids do not number the rows and columns of one picture")
    return 1, rows, columns


def _listed(denoiser: nn.Module, named: Named) -> Grid:
    """Qwen-Image: the picture's size stands in `img_shapes`, the first of the entry's list."""
    return _shapes(named)[0]


def _references_numbered(named: Named, grid: Grid) -> int:
    """Tokens of Flux Kontext's reference pictures, behind the picture."""
    return len(_ids(named)) - grid[1] * grid[2]


def _references_listed(named: Named, grid: Grid) -> int:
    """Tokens of the pictures that Qwen-Image edits, behind the new one."""
    return sum(f * h * w for f, h, w in _shapes(named)[1:])


def _appended(named: Named, grid: Grid) -> int:
    """Tokens that LTX-2's conditioning appends to the packed latents."""
    frames, height, width = grid
    return max(0, _length(named, "hidden_states") - frames * height * width)


def _natural_order(denoiser: nn.Module, named: Named) -> Grid:
    """Kandinsky 5: latents are channels-last; its own sparse attention reorders the tokens."""
    if named.get("sparse_params") is not None:
        raise PlanError("the model's own sparse attention (sparse_params) is on")
    return _latents("BFHWC")(denoiser, named)


def _guess(denoiser: nn.Module, named: Named) -> Family:
    """A row for an unknown family: latents by the place of their channels, nothing around them."""
    latents = named.get("hidden_states")
    shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else ()
    channels = getattr(getattr(denoiser, "config", None), "in_channels", None)
    if len(shape) == 4:
        return Family(_latents("BCHW"))
    if len(shape) == 5 and channels is not None:
        for axes in ("BCFHW", "BFCHW", "BFHWC"):
            if shape[axes.index("C")] == channels:
                return Family(_latents(axes))
    found = f"latents of shape {shape}" if shape else "latents that are no tensor"
    raise PlanError(f"{type(denoiser).__name__} is in no table of geometries and has {found}")


def _patchified(denoiser: nn.Module, frames: Any, height: Any, width: Any) -> Grid:
    config = getattr(denoiser, "config", None)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, (tuple, list)) and len(patch) == 3:
        along_time, down, across = patch
    elif isinstance(patch, int):
        along_time, down, across = getattr(config, "patch_size_t", None) or 1, patch, patch
    else:
        raise PlanError(f"{type(denoiser).__name__} has no patch size in its config")
    return frames // along_time, height // down, width // across


def _tensor(named: Named, name: str, dims: int) -> torch.Tensor:
    value = named.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != dims:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise PlanError(f"{name} is {found}; expected a tensor of {dims} dimensions")
    return value


def _length(named: Named, name: str) -> int:
    """Tokens of an argument; none where it is left out."""
    value = named.get(name)
    return 0 if value is None else _tensor(named, name, 3).shape[1]


def _ids(named: Named) -> torch.Tensor:
    """Token positions on the host. A read from the device, which callers make once per run."""
    ids = named.get("img_ids")
    if isinstance(ids, torch.Tensor) and ids.dim() == 3:
        ids = ids[0]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 3 or not len(ids):
        raise PlanError("the call gives no img_ids")
    return ids.detach().cpu()


def _shapes(named: Named) -> list[Grid]:
    """The sizes of the pictures in one sequence, of the batch's first entry."""
    shapes = named.get("img_shapes")
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise PlanError("the call gives no img_shapes")
    entry = [shapes[0]] if isinstance(shapes[0], tuple) else shapes[0]
    if any(other != shapes[0] for other in shapes[1:]):
        raise PlanError("img_shapes differ within the batch")
    return [(int(f), int(h), int(w)) for f, h, w in entry]


_TEXT = ("encoder_hidden_states",)
_VIDEO_ALONE = Family(_latents("BCFHW"))
_VIDEO_THEN_TEXT = Family(_latents("BCFHW"), after=_TEXT)
_TEXT_THEN_VIDEO = Family(_latents("BFCHW"), before=_TEXT)
_FLUX = Family(_numbered, before=_TEXT, extra=_references_numbered)

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _VIDEO_ALONE,
    "WanVACETransformer3DModel": _VIDEO_ALONE,
    "ChronoEditTransformer3DModel": _VIDEO_ALONE,
    "SkyReelsV2Transformer3DModel": _VIDEO_ALONE,
    "CosmosTransformer3DModel": _VIDEO_ALONE,
    "AllegroTransformer3DModel": _VIDEO_ALONE,
    "Kandinsky5Transformer3DModel": Family(_natural_order),
    "LTXVideoTransformer3DModel": Family(_counted),
    "LTX2VideoTransformer3DModel": Family(_counted, extra=_appended),
    "HunyuanVideoTransformer3DModel": _VIDEO_THEN_TEXT,
    "HunyuanVideo15Transformer3DModel": Family(
        _latents("BCFHW"), after=(*_TEXT, "encoder_hidden_states_2", "image_embeds")
    ),
    "MochiTransformer3DModel": Family(_latents("BCFHW"), after=_TEXT, is_trimmed=True),
    "CogVideoXTransformer3DModel": _TEXT_THEN_VIDEO,
    "ConsisIDTransformer3DModel": _TEXT_THEN_VIDEO,
    "EasyAnimateTransformer3DModel": Family(
        _latents("BCFHW"), before=(*_TEXT, "encoder_hidden_states_t5")
    ),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": Family(_latents("BCHW"), after=_TEXT),
    "CogView4Transformer2DModel": Family(_latents("BCHW"), before=_TEXT),
    "QwenImageTransformer2DModel": Family(_listed, before=_TEXT, extra=_references_listed),
}
