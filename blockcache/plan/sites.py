"""Sites: where in the denoiser reuse happens."""

from dataclasses import dataclass
from typing import Literal

from blockcache.errors import PlanError
from blockcache.plan.spec import spec

Scope = Literal["model", "stack", "span", "deep", "block", "transformer", "attn", "cross", "mlp"]

SUB_LAYERS = ("transformer", "attn", "cross", "mlp")
"""Scopes whose units are module calls within a block; which there are is seen when they are called.
"""


@dataclass(frozen=True)
class Layout:
    """What a site needs to know of a model: chain lengths in calling order, and its shape.

    chains: lengths of the runs of blocks that hand their streams straight to one another; between
    two chains the model itself rearranges the streams, so nothing is skipped across.
    unet: the blocks are down, mid and up blocks joined by skip connections.
    """

    chains: tuple[int, ...]
    unet: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(self.chains)


@spec
class Site:
    """A place in the model.

    scope: "stack" is every block as one; "span" the blocks lo..hi-1 as one; "deep" the same of a
    U-Net, between its outer blocks; "block" each of the blocks lo..hi-1 for itself; "attn" (self or
    joint attention), "cross" and "mlp" each sub-layer of that kind in those blocks; "transformer"
    each transformer block inside the blocks of a U-Net; "model" the denoiser's output.
    lo, hi: block numbers in calling order; hi None means the end, negative numbers count from it,
    and a float between 0 and 1 is a share of the blocks.
    """

    scope: Scope = "stack"
    lo: int | float = 0
    hi: int | float | None = None

    def __post_init__(self) -> None:
        """Refuse limits on the scopes that have none, and floats that are no share."""
        if self.scope in ("stack", "model") and (self.lo, self.hi) != (0, None):
            raise ValueError(f"a {self.scope!r} site takes no lo and hi; use 'span' for a part")
        for end in (self.lo, self.hi):
            if isinstance(end, float) and not 0.0 < end < 1.0:
                raise ValueError(f"a limit is a block number or a share between 0 and 1, not {end}")

    @property
    def is_sub_layer(self) -> bool:
        """Whether its units are parts of blocks."""
        return self.scope in SUB_LAYERS

    def limits(self, n_blocks: int) -> tuple[int, int]:
        """`(lo, hi)` as plain block numbers.

        Raises:
            PlanError: the site is empty or reaches outside a model of `n_blocks` blocks.
        """
        lo = _block_number(self.lo, n_blocks)
        hi = n_blocks if self.hi is None else _block_number(self.hi, n_blocks)
        if not 0 <= lo < hi <= n_blocks:
            raise PlanError(
                f"{self.scope} site {self.lo}..{self.hi} does not fit a model of {n_blocks} blocks"
            )
        return lo, hi

    def check(self, layout: Layout) -> None:
        """Refuse what the model's shape rules out.

        Raises:
            PlanError: the site does not fit the model, wants a U-Net that is none, or leaves a
                skip connection of a U-Net open.
        """
        lo, hi = self.limits(layout.blocks)
        if self.scope == "deep" and not layout.unet:
            raise PlanError(
                "a 'deep' site is the inside of a U-Net, whose outer blocks are joined by skip "
                "connections; this model is a plain chain of blocks. Use the site 'stack' or 'span'"
            )
        # Block i of the way down feeds its mirror image on the way up.
        mirror = layout.blocks - 1 - lo
        if layout.unet and self.scope in ("span", "deep") and lo + 1 < hi <= mirror:
            raise PlanError(
                f"the {self.scope} site {lo}..{hi} does not fit a U-Net: block {lo} also feeds "
                f"block {mirror} by a skip connection. Use a site that ends at block {mirror} or "
                "later, 'stack', or 'block'"
            )

    def units(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """The pieces `(lo, hi)` that are reused for themselves; of sub-layers, their blocks."""
        lo, hi = self.limits(layout.blocks)
        if self.scope == "model":
            return ((lo, hi),)
        if self.scope == "block" or self.is_sub_layer:
            return tuple((i, i + 1) for i in range(lo, hi))
        pieces, start = [], 0
        for length in layout.chains:
            a, b = max(lo, start), min(hi, start + length)
            if a < b:
                pieces.append((a, b))
            start += length
        return tuple(pieces)


def _block_number(end: int | float, n_blocks: int) -> int:
    if isinstance(end, float):
        return round(end * n_blocks)
    return end + n_blocks if end < 0 else end
