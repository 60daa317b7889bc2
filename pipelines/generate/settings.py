"""What can be asked for: of a run, and of a single row of its prompts."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from blockcache.errors import BlockCacheError

NO_PLAN = "none"
"""The plan that caches nothing."""

_MOST_PROMPT_BYTES = 64 * 2**10
_CALL_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "frames": "num_frames"}

Pixels = Annotated[int, Field(ge=1, le=2**15)]


def _or(name: str) -> Any:
    """Also under the name the pipelines use."""
    return AliasChoices(name, _CALL_NAMES[name])


class Settings(BaseModel):
    """What decides a picture, for a whole run or for one row. None leaves it to the run or model.

    steps, guidance, frames: `num_inference_steps`, `guidance_scale` and `num_frames` of the
    pipeline, under either name. plan: a preset or recipe, a plan file, or "none".
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int | None, Field(ge=1, le=10_000, validation_alias=_or("steps"))] = None
    height: Pixels | None = None
    width: Pixels | None = None
    guidance: Annotated[float | None, Field(validation_alias=_or("guidance"))] = None
    frames: Annotated[int | None, Field(ge=1, le=10**5, validation_alias=_or("frames"))] = None
    negative_prompt: str | None = None
    plan: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("prompt", "negative_prompt", check_fields=False)
    @classmethod
    def _is_of_sane_size(cls, text: str | None) -> str | None:
        if text is not None and len(text.encode()) > _MOST_PROMPT_BYTES:
            raise ValueError(f"longer than {_MOST_PROMPT_BYTES >> 10} KiB")
        return text

    def call(self) -> dict[str, Any]:
        """What is set, as arguments of the pipeline call."""
        names = ("steps", "height", "width", "guidance", "frames", "negative_prompt")
        given = {name: getattr(self, name) for name in names}
        return {_CALL_NAMES.get(k, k): v for k, v in given.items() if v is not None}


class Row(Settings):
    """One prompt of the file. number: among the rows, from 0. line: in the file, from 1."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    number: int
    line: int
    id: Annotated[str, Field(min_length=1, max_length=10_000)]
    prompt: Annotated[str, Field(min_length=1)]


class Config(Settings):
    """A whole run. `run.yaml` holds the same names.

    prompts: a .txt, .jsonl or .csv file, or rows. seed: of row 0, later rows count on from it.
    arguments: further ones of the pipeline call, for every item.
    batch_size: rows of equal settings in one pipeline call. baseline: render every item uncached as
    well. overwrite: render what is done already again. fps: of videos.
    """

    prompts: Any
    model: Any = "tiny-image"
    out: Path
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    plan: Annotated[str, Field(min_length=1)] = "balanced"
    arguments: dict[str, Any] = {}
    baseline: bool = False
    overwrite: bool = False
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    fps: Annotated[int, Field(ge=1, le=240)] = 16
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    skip_bad: bool = False
    fail_fast: bool = False

    @classmethod
    def of(cls, **settings: Any) -> "Config":
        """A checked configuration.

        Raises:
            BlockCacheError: unknown names or impossible values, in one line.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            raise BlockCacheError(in_one_line(error, cls)) from None

    def as_yaml(self) -> str:
        """The text of `run.yaml`. Rows or a pipeline that were handed over are only named."""
        import yaml  # type: ignore[import-untyped]

        plain = (str, int, float, bool, dict)
        given = self.model_dump(exclude_none=True)
        shown = {k: v if isinstance(v, plain) else _named(v) for k, v in given.items()}
        return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))


def _named(value: Any) -> str:
    return str(value) if isinstance(value, Path) else f"<{type(value).__name__}>"


def in_one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint: where, what, what was found."""
    first = error.errors()[0]
    where = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = [name for name in model.model_fields if name not in ("number", "line")]
        return f"unknown name {where!r:.60} (known: {', '.join(known)})"
    if first["type"] == "missing":
        return f"{where} is missing"
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}, found {first['input']!r:.60}"
