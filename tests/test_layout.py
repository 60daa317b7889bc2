"""The rooms and the arrows between them: kernels <- blockcache <- pipelines <- demo.

Imports are read from the syntax tree, so one inside a function counts as much as one at the top.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "pipelines", "demo")

# What each room may import of ours besides itself. "root" is what lies directly in blockcache/ and
# every name imported from the package itself: the top of the plugin, for users and the rooms above.
PLUGIN = {"errors", "kernels", "plan", "methods", "sparse", "engine", "api", "tuning", "root"}
ALLOWED = {
    "errors": set(),
    "kernels": set(),
    "plan": {"errors"},
    "methods": {"errors", "plan"},
    "sparse": {"errors", "plan", "kernels"},
    "engine": {"errors", "plan", "kernels", "sparse"},
    "api": PLUGIN - {"tuning", "root"},
    "tuning": PLUGIN - {"root"},
    "root": PLUGIN,
    "pipelines": PLUGIN,
    "demo": PLUGIN | {"pipelines"},
}
# `python -m blockcache` is the command line, which lives in pipelines.
ENTRY_POINTS = {"blockcache.__main__": {"pipelines"}}

HOSTS = {"torch", "diffusers", "transformers", "accelerate", "peft", "torchmetrics"}
FORBIDDEN = {"plan": HOSTS, "methods": HOSTS, "kernels": HOSTS - {"torch"}}

# Large, optional, or with side effects on import: only inside the function that needs them.
LAZY = {"triton", "gradio", "imageio", "imageio_ffmpeg", "lpips", "matplotlib", "peft"}


class Import(NamedTuple):
    name: str
    line: int
    runs_on_import: bool


def module_name(path: Path) -> str:
    """`kernels/common/runtime.py` is `blockcache.kernels.common.runtime`."""
    parts = list(path.with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "blockcache")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str | None:
    """The room of an imported name or module; None for what is not ours."""
    package, *rest = name.split(".")
    if package != "blockcache":
        return None
    return rest[0] if rest and rest[0] in ALLOWED else "root"


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import, `from a import b` as `a.b`, relative ones resolved against `package`."""
    yield from _imports(ast.parse(source), package, runs_on_import=True)


def _imports(node: ast.AST, package: str, runs_on_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, runs_on_import)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, runs_on_import)
    else:
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        only_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        inner = runs_on_import and not deferred and not only_typing
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package, inner)


def wrong_imports(path: Path, source: str) -> list[str]:
    """What in the file at `path` (relative to the root) breaks a rule, one line each."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    room = room_of(module) or "root"
    allowed = ALLOWED[room] | {room} | ENTRY_POINTS.get(module, set())
    wrong = []
    for name, line, runs_on_import in imports(source, package):
        target, top = room_of(name), name.partition(".")[0]
        if target is not None and target not in allowed:
            wrong.append(f"{path}:{line}: {room} imports {name}, which is in {target}")
        if top in LINKED:
            wrong.append(f"{path}:{line}: {name} has to be imported as blockcache.{name}")
        if top in FORBIDDEN.get(room, set()):
            wrong.append(f"{path}:{line}: {room} must not depend on {top}")
        is_kernel = room == "kernels" and path.name == "kernel.py" and top == "triton"
        if runs_on_import and top in LAZY and not is_kernel:
            wrong.append(f"{path}:{line}: {top} has to be imported inside a function")
    return wrong


def our_files() -> list[Path]:
    """Every module once, by its path at the top, relative to the root."""
    rooms = [ROOT / room for room in ("blockcache", *LINKED)]
    files = (path for room in rooms for path in room.rglob("*.py"))
    # Before Python 3.13 `rglob` follows links to folders, after it does not: keep the real paths.
    return sorted({path.resolve().relative_to(ROOT) for path in files})


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter at the root of the checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def test_imports_run_one_way():
    files = our_files()
    assert {path.parts[0] for path in files} >= {"blockcache", "kernels", "pipelines"}
    wrong = [line for path in files for line in wrong_imports(path, (ROOT / path).read_text())]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("kernels/op/api.py", "import blockcache.plan", "which is in plan"),
        ("kernels/op/api.py", "def f():\n    from blockcache.errors import E", "in errors"),
        ("kernels/op/api.py", "import triton", "inside a function"),
        ("kernels/op/api.py", "from ...plan import Plan", "which is in plan"),
        ("kernels/op/api.py", "import diffusers", "must not depend on diffusers"),
        ("blockcache/plan/plan.py", "import torch", "must not depend on torch"),
        ("blockcache/plan/plan.py", "from blockcache.engine import hooks", "in engine"),
        ("blockcache/plan/plan.py", "from blockcache import enable", "in root"),
        ("blockcache/plan/policies/static.py", "from ... import engine", "in engine"),
        ("blockcache/methods/tea.py", "from blockcache.engine.stats import Stats", "in engine"),
        ("blockcache/engine/runner.py", "from blockcache.tuning import tune", "in tuning"),
        ("blockcache/engine/runner.py", "from blockcache.api import enable", "in api"),
        ("blockcache/engine/runner.py", "import blockcache", "in root"),
        ("blockcache/sparse/radial.py", "from blockcache.engine import attention", "in engine"),
        ("blockcache/api.py", "def f():\n    from blockcache.tuning import t", "in tuning"),
        ("blockcache/tuning/tune.py", "from blockcache import pipelines", "in pipelines"),
        ("blockcache/tuning/tune.py", "from blockcache import enable", "in root"),
        ("blockcache/api.py", "from blockcache.pipelines.presets import P", "in pipelines"),
        ("pipelines/cli.py", "def f():\n    import blockcache.demo.app", "in demo"),
        ("pipelines/video.py", "try:\n    import imageio\nexcept ImportError: pass", "inside"),
        ("pipelines/x.py", "from kernels.op import f", "imported as blockcache.kernels.op.f"),
        ("demo/ui.py", "import gradio as gr", "inside a function"),
    ],
)
def test_wrong_imports_are_found(path, source, complaint):
    (found,) = wrong_imports(Path(path), source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/op/kernel.py", "import triton\nimport triton.language as tl"),
        ("kernels/op/api.py", "def f():\n    import triton\n    from .kernel import launch"),
        ("blockcache/plan/plan.py", "from blockcache.errors import PlanError\nimport json"),
        ("blockcache/engine/runner.py", "import torch\nfrom blockcache.plan import Plan"),
        ("blockcache/__main__.py", "from blockcache.pipelines.cli import main"),
        ("pipelines/cli.py", "import blockcache\nfrom blockcache.kernels.op import f"),
        ("demo/ui.py", "if TYPE_CHECKING:\n    import gradio\ndef f():\n    import gradio"),
    ],
)
def test_right_imports_pass(path, source):
    assert wrong_imports(Path(path), source) == []


def test_folders_are_linked_and_not_packages_themselves():
    """A top-level `kernels` with an `__init__.py` breaks HuggingFace's own `kernels` package."""
    for name in LINKED:
        if (ROOT / name).is_dir():
            link = ROOT / "blockcache" / name
            assert link.is_symlink(), link
            assert os.readlink(link) == f"../{name}"
            assert not (ROOT / name / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_import_is_silent_and_light():
    code = """
import sys, json, blockcache
heavy = [m for m in ("gradio", "triton", "matplotlib", "imageio", "lpips") if m in sys.modules]
import torch
print(json.dumps([blockcache.__file__, heavy, torch.cuda.is_initialized()]))
"""
    silent = run_python("import blockcache")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    file, heavy, touched_gpu = json.loads(result.stdout)
    assert Path(file).resolve() == ROOT / "blockcache" / "__init__.py"
    assert heavy == []
    assert touched_gpu is False


def test_every_module_imports_under_its_full_name_only():
    """Without the kernels proper, which are what Triton is loaded for, and the embedded policy,
    whose classes derive from diffusers' own: importing these loads what diffusers likes to."""
    skipped = {"kernel.py", "__main__.py"}
    files = [path for path in our_files() if path.name not in skipped]
    names = [module_name(path) for path in files if path.parent.name != "policy"]
    code = f"""
import sys, json, importlib
for name in {names!r}:
    importlib.import_module(name)
ours = [m for m in sys.modules if m.partition(".")[0] in {LINKED!r} and "." in m]
lazy = [m for m in {sorted(LAZY)!r} if m in sys.modules]
print(json.dumps([ours, lazy]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout) == [[], []]


FAKE_KERNELS = """
from unittest.mock import MagicMock

def use_kernel_forward_from_hub(*args, **kwargs):
    return lambda decorated: decorated

use_kernelized_func = use_kernel_forward_from_hub

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""


@pytest.fixture
def hugging_face_kernels(tmp_path: Path) -> Path:
    """A folder in which something that looks like the `kernels` distribution is installed."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    info = tmp_path / f"kernels-{version}.dist-info"
    for path, text in {
        tmp_path / "kernels" / "__init__.py": FAKE_KERNELS,
        info / "METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
        info / "top_level.txt": "kernels\n",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


IMPORT_HOSTS = """
import sys, json, transformers, diffusers
from transformers.integrations import hub_kernels
from transformers import LlamaModel
from diffusers import FluxTransformer2DModel
import blockcache
file = getattr(sys.modules.get("kernels"), "__file__", None)
inside = [m.__file__ for n, m in sys.modules.items() if n.startswith("kernels.")]
print(json.dumps([file, inside]))
"""


def test_hosts_find_their_own_kernels_package(hugging_face_kernels):
    """From the root of a checkout, where our folder of that name comes first on the path."""
    code = IMPORT_HOSTS + "print(transformers.utils.import_utils.is_kernels_available())"
    result = run_python(code, hugging_face_kernels)
    assert result.returncode == 0, result.stderr
    *_, found, available = result.stdout.splitlines()
    assert json.loads(found) == [str(hugging_face_kernels / "kernels" / "__init__.py"), []]
    assert available == "True"


def test_hosts_load_nothing_from_our_folder():
    """Without HuggingFace's package: ours is a namespace, which hosts may touch but not run."""
    result = run_python(IMPORT_HOSTS)
    assert result.returncode == 0, result.stderr
    file, inside = json.loads(result.stdout.splitlines()[-1])
    ours = [
        name for name in (file, *inside) if name and Path(name).is_relative_to(ROOT / "kernels")
    ]
    assert ours == []
