"""What a visitor asks for: checked, compared, and carried in a link."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

from blockcache.errors import BlockCacheError, PlanError
from blockcache.plan import Plan

WAYS = ("preset", "target", "recipe", "plan")
"""How a plan is chosen: a word, a quality in dB, a recipe by name, or a plan file."""

_MOST_SEED = 2**53
"""What a browser can count to without losing a one."""
_MOST_GUIDANCE = 50.0
_LONGEST_NAME = 200
_MOST_PLAN_BYTES = 2**20


class SettingsError(BlockCacheError):
    """Something was asked for that is not offered here."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for.

    prompt: characters. steps: of the sampler. side: pixels of the longer side. frames: of a video.
    minutes: that one job may take.
    """

    prompt: int = 1000
    steps: int = 200
    side: int = 1024
    frames: int = 129
    minutes: float = 10.0


@dataclass(frozen=True)
class Settings:
    """One comparison. None leaves it to the model.

    way: one of `WAYS`. what: a preset's word, the quality in dB, a recipe's name or a plan's name.
    knobs: of the recipe, as `interval=3, order=1`.
    """

    model: str
    prompt: str
    seed: int = 0
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    way: str = "preset"
    what: str = "balanced"
    knobs: str = ""

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline call that were asked for."""
        asked = {
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "guidance_scale": self.guidance,
        }
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def uncached(self) -> tuple[Any, ...]:
        """What the picture without the cache depends on."""
        return (self.model, self.prompt, self.seed, *sorted(self.call.items()))


def checked(asked: Mapping[str, Any], limits: Limits) -> Settings:
    """Settings from what came in, whoever sent it.

    Raises:
        SettingsError: a value that is no number, or outside the limits.
    """
    prompt = _text(asked, "prompt", limits.prompt).strip()
    if not prompt:
        raise SettingsError("the prompt is empty; describe what is to be seen")
    way = _text(asked, "way", _LONGEST_NAME) or "preset"
    if way not in WAYS:
        raise SettingsError(f"the way must be one of {', '.join(WAYS)}, found {way!r}")
    seed = _whole(asked, "seed", 0, _MOST_SEED)
    return Settings(
        model=_text(asked, "model", _LONGEST_NAME).strip(),
        prompt=prompt,
        seed=0 if seed is None else seed,
        steps=_whole(asked, "steps", 1, limits.steps),
        height=_whole(asked, "height", 16, limits.side),
        width=_whole(asked, "width", 16, limits.side),
        frames=_whole(asked, "frames", 1, limits.frames),
        guidance=_number(asked, "guidance", 0.0, _MOST_GUIDANCE),
        way=way,
        what=_text(asked, "what", _LONGEST_NAME).strip() or ("balanced" if way == "preset" else ""),
        knobs=_text(asked, "knobs", _LONGEST_NAME).strip(),
    )


def _text(asked: Mapping[str, Any], name: str, longest: int) -> str:
    value = asked.get(name)
    text = "" if value is None else str(value)
    if len(text) > longest:
        raise SettingsError(
            f"the {name} may have {longest:,} characters, found {len(text):,}; shorten it"
        )
    return text


def _number(asked: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = asked.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(f"{name} must be a number, found {str(value)[:40]!r}") from None
    # Also refuses what is not a number: it compares with nothing.
    if not low <= number <= high:
        raise SettingsError(f"{name} must lie between {low:g} and {high:g}, found {number:g}")
    return number


def _whole(asked: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    number = _number(asked, name, low, high)
    if number is None:
        return None
    if number != int(number):
        raise SettingsError(f"{name} must be a whole number, found {number:g}")
    return int(number)


# ---- links --------------------------------------------------------------------------------------


def to_query(settings: Settings, plan: Plan | None = None) -> str:
    """The settings as the query of a link; a plan file travels inside it."""
    values = {k: v for k, v in asdict(settings).items() if v is not None and v != ""}
    if plan is not None and settings.way == "plan":
        text = json.dumps(plan.to_json(), separators=(",", ":"))
        packed = zlib.compress(text.encode(), 9)
        values["plan"] = base64.urlsafe_b64encode(packed).decode().rstrip("=")
    return urlencode(values)


def from_query(query: Mapping[str, str]) -> tuple[dict[str, str], Plan | None]:
    """What a link asks for, not checked yet, and the plan that travelled in it.

    Raises:
        PlanError: what should be the plan is none.
    """
    names = {field.name for field in fields(Settings)}
    asked = {name: value for name, value in query.items() if name in names}
    packed = query.get("plan")
    return asked, None if packed is None else _unpacked(packed)


def _unpacked(packed: str) -> Plan:
    try:
        data = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
        # A few bytes may unpack to gigabytes.
        opened = zlib.decompressobj()
        text = opened.decompress(data, _MOST_PLAN_BYTES)
        if not opened.eof:
            raise PlanError("the plan in this link is cut off or too large")
        return Plan.from_json(json.loads(text))
    except PlanError:
        raise
    except (ValueError, zlib.error, RecursionError):
        raise PlanError("the plan in this link cannot be read; copy the whole link") from None
