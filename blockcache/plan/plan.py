"""Plans: a recipe evaluated for one (model, sampler, steps), with provenance, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from blockcache.errors import PlanError, PlanMismatchError
from blockcache.plan.policies import MaskTable
from blockcache.plan.recipe import Recipe
from blockcache.plan.sites import Layout
from blockcache.plan.spec import Count, from_json, shown, spec, to_json
from blockcache.plan.steps import Step

FORMAT = 1
MAX_BYTES = 32 * 2**20


@spec
class Fingerprint:
    """What a plan was made for. Model and config must agree to use it; the rest only warns.

    config: hash of the denoiser's config. blocks: its number of blocks. The rest is as seen when
    the plan was made, and empty where nothing was run. size: shape of one sample as the denoiser
    gets it. adapter: active adapters with their scales. guidance: the pipeline's guidance scale.
    """

    model: str
    config: str
    blocks: Annotated[int, Field(ge=0)]
    sampler: str = ""
    dtype: str = ""
    size: tuple[Count, ...] = ()
    adapter: str | None = None
    guidance: float | None = None

    def differences(self, other: "Fingerprint") -> list[str]:
        """What is known of both and differs, in words: figures measured with one do not hold."""
        pairs = {
            "sampler": (self.sampler or None, other.sampler or None),
            "dtype": (self.dtype or None, other.dtype or None),
            "sample size": (self.size or None, other.size or None),
            "adapter": (self.adapter, other.adapter),
            "guidance": (self.guidance, other.guidance),
        }
        return [
            f"{name} {_shown(found)} instead of {_shown(made_for)}"
            for name, (made_for, found) in pairs.items()
            if made_for is not None and found is not None and made_for != found
        ]

    def check(self, other: "Fingerprint") -> None:
        """Refuse a plan made for another model.

        Raises:
            PlanMismatchError: the model class or its config differs.
        """
        if self.model != other.model:
            raise PlanMismatchError(
                f"this plan was made for {self.model}, the model here is {other.model}; "
                "make a plan for it or use a preset"
            )
        if (self.config, self.blocks) != (other.config, other.blocks):
            raise PlanMismatchError(
                f"this plan was made for a {self.model} of another configuration "
                f"({self.blocks} blocks, config {self.config}; "
                f"here {other.blocks} blocks, config {other.config})"
            )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


@spec
class Plan:
    """A recipe whose static policies are written down as mask tables, ready to be replayed.

    total: steps of the run it was made for. reached: figures measured with it (for example
    `{"psnr_db_median": 41.2}`), empty when none were. note: free text on where it comes from.
    """

    recipe: Recipe
    fingerprint: Fingerprint
    total: Annotated[int, Field(ge=1)]
    reached: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        """Keep the file readable: "kind" marks a spec there."""
        if "kind" in self.reached:
            raise ValueError("reached may not have a figure named 'kind'")
        for rule in self.recipe.rules:
            if isinstance(rule.policy, MaskTable) and rule.policy.total != self.total:
                raise ValueError(
                    f"a mask table of {rule.policy.total} steps in a plan for {self.total}"
                )

    @classmethod
    def make(
        cls,
        recipe: Recipe,
        fingerprint: Fingerprint,
        steps: Sequence[Step],
        layout: Layout,
        note: str = "",
        with_sigmas: bool = True,
    ) -> "Plan":
        """Evaluate `recipe` for `steps` of the model that `fingerprint` names.

        with_sigmas: False where the steps' noise levels are not the sampler's.
        """
        written = recipe.written_down(steps, layout, with_sigmas)
        return cls(written, fingerprint, len(steps), {}, note)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"blockcache_plan": FORMAT, **to_json(self)}

    def save(self, path: str | Path) -> None:
        """Write the plan as indented JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """Rebuild a plan.

        Raises:
            PlanError: not a plan, another format version, unknown keys, or impossible values.
        """
        if not isinstance(data, dict) or "blockcache_plan" not in data:
            raise PlanError("not a blockcache plan: the key 'blockcache_plan' is missing")
        version = data["blockcache_plan"]
        if version != FORMAT or isinstance(version, bool):
            raise PlanError(f"plan format {shown(version)} is not supported (supported: {FORMAT})")
        fields = {key: value for key, value in data.items() if key != "blockcache_plan"}
        if fields.pop("kind", None) != "Plan":
            raise PlanError("not a blockcache plan: 'kind' must be 'Plan'")
        try:
            return cls(**from_json(fields))
        except RecursionError:
            raise PlanError("the plan is nested too deeply") from None

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file.

        Raises:
            PlanError: no such file, a directory, larger than 32 MiB, no JSON, or no valid plan.
        """
        file = Path(path)
        try:
            if file.is_dir():
                raise PlanError(f"cannot read the plan {file}: it is a directory")
            if file.stat().st_size > MAX_BYTES:
                raise PlanError(f"the plan {file} is larger than {MAX_BYTES >> 20} MiB; not read")
            text = file.read_bytes()
        except PlanError:
            raise
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise PlanError(f"cannot read the plan {shown(str(file))}: {why}") from None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan {file} is not readable JSON: {error}") from None
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise type(error)(f"{file}: {error}") from None
