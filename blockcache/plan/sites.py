"""Sites: where in the denoiser reuse happens."""

from dataclasses import dataclass
from typing import Literal

from blockcache.errors import PlanError
from blockcache.plan.spec import spec

Scope = Literal["model", "stack", "span", "block", "attn", "cross", "mlp", "guided"]


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

    scope: "stack" is every block as one; "span" the blocks lo..hi-1 as one; "block" each of the
    blocks lo..hi-1 for itself; "attn", "cross", "mlp" the sub-layers of those blocks; "model" the
    denoiser's output; "guided" the output after guidance.
    lo, hi: block numbers in calling order; hi None means the end, negative numbers count from it.
    """

    scope: Scope = "stack"
    lo: int = 0
    hi: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits on the scopes that have none."""
        if self.scope in ("stack", "model", "guided") and (self.lo, self.hi) != (0, None):
            raise ValueError(f"a {self.scope!r} site takes no lo and hi; use 'span' for a part")

    def limits(self, n_blocks: int) -> tuple[int, int]:
        """`(lo, hi)` as plain block numbers.

        Raises:
            PlanError: the site is empty or reaches outside a model of `n_blocks` blocks.
        """
        lo = self.lo + n_blocks if self.lo < 0 else self.lo
        hi = n_blocks if self.hi is None else self.hi + n_blocks if self.hi < 0 else self.hi
        if not 0 <= lo < hi <= n_blocks:
            raise PlanError(
                f"{self.scope} site {self.lo}..{self.hi} does not fit a model of {n_blocks} blocks"
            )
        return lo, hi

    def units(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """The pieces `(lo, hi)` that are reused for themselves."""
        lo, hi = self.limits(layout.blocks)
        if self.scope == "block":
            return tuple((i, i + 1) for i in range(lo, hi))
        pieces, start = [], 0
        for length in layout.chains:
            a, b = max(lo, start), min(hi, start + length)
            if a < b:
                pieces.append((a, b))
            start += length
        return tuple(pieces)
