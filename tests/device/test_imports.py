"""The device side is light: no torch, no exporter, and nothing of the host."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vz_edge
from vz_edge import errors

PACKAGE = Path(vz_edge.__file__).parent
DEVICE_MODULES = sorted(
    f"vz_edge.device.{path.stem}" for path in (PACKAGE / "device").glob("*.py") if path.stem != "__init__"
)
HEAVY = [
    *("torch", "torchvision", "transformers", "bitsandbytes", "accelerate"),
    *("onnx", "onnx_ir", "onnxscript", "safetensors", "optimum"),
]
# What each part of the package may import of the others; the rest of a part's imports is below it.
ALLOWED = {
    "errors": set(),
    "strict": {"errors"},
    "arguments": {"errors"},
    "budget": {"errors"},
    "recipe": {"errors", "strict", "budget"},
    "no_bundle": {"recipe"},
    "bundle": {"errors", "strict", "arguments", "budget", "recipe", "no_bundle"},
    "device": {"errors", "strict", "arguments", "budget", "recipe", "bundle"},
    "backends": {"errors", "strict", "arguments", "budget", "recipe", "bundle", "device"},
    "metrics": set(),
    "watch": {"errors", "strict", "arguments", "budget", "recipe", "bundle", "device", "metrics"},
    "serve": {
        "errors",
        "strict",
        "arguments",
        "budget",
        "recipe",
        "bundle",
        "device",
        "metrics",
        "watch",
        "__version__",
    },
}
DOORS = {
    # The one file of the device side that reaches for a backend in torch, inside a function.
    PACKAGE / "device" / "backend.py": {"backends"},
    # EdgeModel.watch is made of the device side, and imported when it is called.
    PACKAGE / "device" / "model.py": {"metrics", "watch"},
    # Vision in torch is the host's own selection, not a second one.
    PACKAGE / "backends" / "torch_vision.py": {"host"},
}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("vz_edge.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part: str) -> None:
    files = [*(PACKAGE / part).rglob("*.py")] if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for path in files:
        assert parts(imported(path)) <= ALLOWED[part] | DOORS.get(path, set()) | {part}, path


def test_device_files_name_no_heavy_package() -> None:
    for path in [path for part in ("device", "watch", "serve") for path in (PACKAGE / part).rglob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & set(HEAVY), path


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_answering_loads_no_heavy_package(bundle: Path) -> None:
    code = f"""
import importlib, json, sys
for module in {DEVICE_MODULES}:
    importlib.import_module(module)
import numpy
from vz_edge import EdgeModel
model = EdgeModel.load({str(bundle)!r}, threads=1)
reply = model.ask(numpy.zeros((40, 50, 3), numpy.uint8), "What is this?", max_new_tokens=3)
assert reply.answer_tokens == 3
assert len(list(model.watch([numpy.zeros((40, 50, 3), numpy.uint8)], "What is this?"))) == 1
assert not {{"cv2", "rosbags"}} & set(sys.modules)  # extras, for the sources that need them
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    assert DEVICE_MODULES
    assert json.loads(run(code)) == []


def test_serving_loads_no_heavy_package() -> None:
    pytest.importorskip("uvicorn", reason="the packages of serve are not installed")
    code = f"""
import json, sys
from vz_edge.serve.server import run
from vz_edge.serve.app import create_app
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    assert json.loads(run(code)) == []


def test_importing_the_package_imports_nothing_else() -> None:
    code = """
import sys
before = set(sys.modules)
import vz_edge
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"numpy", "PIL", "yaml", "jinja2", "tokenizers", "onnxruntime"}))
"""
    assert run(code).strip() == "[]"


def test_public_names_are_all_there() -> None:
    for name in vz_edge.__all__:
        assert getattr(vz_edge, name).__name__ == name
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(vz_edge.__all__)
    with pytest.raises(AttributeError, match="Nonsense"):
        vz_edge.Nonsense  # noqa: B018
