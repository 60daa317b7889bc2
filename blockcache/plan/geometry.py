"""Where the tokens of one self-attention lie: host-only, numbers in and numbers out."""

from typing import Annotated

from pydantic import Field

from blockcache.errors import PlanError
from blockcache.plan.spec import spec

Size = Annotated[int, Field(ge=1, le=10**9)]
Tokens = Annotated[int, Field(ge=0, le=10**9)]


class PlannerSpec:
    """Base class of a planner's parameters, for rules that name one.

    The tensor half is `blockcache.sparse.Planner`, which this room may not import.
    """


@spec
class Geometry:
    """A video of `frames x height x width` tokens, frame by frame, with other tokens around it.

    frames, height, width: the latent grid after patchify; 1 frame is an image.
    before, after: tokens in front of and behind the video: text, reference frames, audio. All of
    them are attended by everyone and attend to everyone.
    valid: for each batch entry the number of leading tokens that are no padding; None: all. Only
    tokens behind the video can be padding.

    Raises:
        PlanError: sizes below 1, or a valid length that ends inside the video or behind the end.
    """

    frames: Size
    height: Size
    width: Size
    before: Tokens = 0
    after: Tokens = 0
    valid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Padding is only possible behind the video."""
        low, high = self.before + self.video, self.tokens
        if self.valid is not None and not all(low <= length <= high for length in self.valid):
            raise ValueError(
                f"valid is {self.valid}; with {self.before} tokens before the video, {self.video} "
                f"in it and {self.after} behind it, each must be from {low} to {high}. Padding "
                "inside the video is not supported: use dense attention there."
            )

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.height * self.width

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.before + self.video + self.after

    @property
    def others(self) -> int:
        """Tokens outside the video."""
        return self.before + self.after

    @property
    def grid(self) -> tuple[int, int, int]:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def bare(self) -> "Geometry":
        """The video alone, for tables that do not depend on what is around it."""
        return Geometry(self.frames, self.height, self.width)

    def check(self, length: int, batch: int) -> None:
        """Refuse a sequence that is not this geometry's.

        Raises:
            PlanError: another length, or valid lengths for another batch size.
        """
        if length != self.tokens:
            around = f" + {self.others} others" if self.others else ""
            raise PlanError(
                f"the sequence has {length} tokens; {self.frames} frames of {self.height} x "
                f"{self.width}{around} make {self.tokens}. Give the grid after patchify, and how "
                "many tokens lie before and after it."
            )
        if self.valid is not None and len(self.valid) != batch:
            raise PlanError(f"valid has {len(self.valid)} lengths for a batch of {batch}")
