"""From a word on the command line to a pipeline: embedded models, local folders, hub ids."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blockcache.errors import BlockCacheError

SETTINGS = "blockcache.json"
"""Optional file in a pipeline folder: default arguments of the pipeline call, a JSON object."""

_EMBEDDED_ROOT = Path(__file__).parent / "embedded"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MAX_SETTINGS_BYTES = 1 << 20
_DEFAULT_PROMPTS, _DEFAULT_VIDEO_PROMPTS = 8, 3
_LONGEST_REASON = 160


class ModelError(BlockCacheError):
    """A model that does not exist, cannot be read or does not fit the device."""


def _shape_prompts() -> tuple[str, ...]:
    from blockcache.pipelines.embedded.world import held_out_prompts

    first, second, third, *others = held_out_prompts(_DEFAULT_PROMPTS, seed=0)
    # The one the model draws best greets the visitors of the demo.
    return (third, first, second, *others)


def _motion_prompts() -> tuple[str, ...]:
    from blockcache.pipelines.embedded.world_video import held_out_prompts

    return tuple(held_out_prompts(_DEFAULT_VIDEO_PROMPTS, seed=0))


@dataclass(frozen=True)
class Embedded:
    """A model that comes with the package. prompts: what to render if nothing is asked for."""

    folder: Path
    about: str
    prompts: Callable[[], tuple[str, ...]]


EMBEDDED = {
    "tiny-image": Embedded(
        _EMBEDDED_ROOT / "tiny_image",
        "FluxPipeline, coloured shapes, 64 x 64 px, trained on a CPU",
        _shape_prompts,
    ),
    "tiny-video": Embedded(
        _EMBEDDED_ROOT / "tiny_video",
        "WanPipeline, moving patterns, 128 x 128 px, 23 frames, trained on a CPU",
        _motion_prompts,
    ),
}


@dataclass(frozen=True)
class Family:
    """A kind of pipeline that the tests run with random weights."""

    name: str
    pipeline: str
    makes: str = "images"


FAMILIES = (
    Family("Flux", "FluxPipeline"),
    Family("Stable Diffusion 3", "StableDiffusion3Pipeline"),
    Family("PixArt-alpha", "PixArtAlphaPipeline"),
    Family("DiT", "DiTPipeline"),
    Family("Stable Diffusion 1.5", "StableDiffusionPipeline"),
    Family("Wan", "WanPipeline", "videos"),
    Family("CogVideoX", "CogVideoXPipeline", "videos"),
    Family("HunyuanVideo", "HunyuanVideoPipeline", "videos"),
    Family("LTX-Video", "LTXPipeline", "videos"),
    Family("Mochi", "MochiPipeline", "videos"),
)


@dataclass(frozen=True)
class Model:
    """A model that was found and not loaded yet.

    source: folder or hub id. call: default arguments of the pipeline call. prompts: what to
    render if nothing is asked for; often nothing.
    """

    name: str
    source: str
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    is_local: bool = True


def find(name: str) -> Model:
    """The model called `name`: an embedded one, a pipeline folder, or a hub id `owner/name`.

    Raises:
        ModelError: there is no such thing, or its folder holds no pipeline.
    """
    if name in EMBEDDED:
        entry = EMBEDDED[name]
        return Model(name, str(entry.folder), _settings(_checked(entry.folder)), entry.prompts())
    folder = Path(name).expanduser()
    if folder.exists():
        return Model(folder.resolve().name, str(folder), _settings(_checked(folder)))
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return Model(name, name, is_local=False)
    raise ModelError(
        f"unknown model {name!r}: expected {', '.join(EMBEDDED)}, an existing pipeline folder "
        "or a hub id (owner/name)"
    )


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        raise ModelError(f"expected a pipeline folder at {folder}, found {found}")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    return folder


def _settings(folder: Path) -> dict[str, Any]:
    """The folder's default call arguments."""
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_SETTINGS_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_SETTINGS_BYTES >> 20} MiB; not read")
        call = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(call, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(call).__name__}")
    return call


def device_for(wanted: str | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        ModelError: no such device here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    # What torch raises depends on the device: RuntimeError, AssertionError, NotImplementedError.
    except Exception as error:
        raise ModelError(f"device {wanted!r} cannot be used: {_first_line(error)}") from None
    return device


def load(model: Model, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline on `device`, without a progress bar for steps.

    Raises:
        ModelError: the hub cannot be reached, or the folder's contents cannot be loaded.
    """
    import diffusers

    # Renamed in 0.40; earlier versions do not know the new name, later ones warn about the old.
    is_new = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40)
    chosen = {"dtype" if is_new else "torch_dtype": dtype}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model.source, **chosen)
    # Hosts raise everything from OSError to SafetensorError here; the message is what counts.
    except Exception as error:
        raise ModelError(_why_not(model, error)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _why_not(model: Model, error: Exception) -> str:
    why = _first_line(error)
    if model.is_local:
        return f"cannot load the pipeline in {model.source}: {why}"
    return f"cannot load {model.source!r} from the hub (offline, or no such model?): {why}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0].rstrip(".") if lines else type(error).__name__
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."
