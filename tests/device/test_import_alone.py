"""The device side needs nothing but what the extra ``cpu`` brings, whatever else is installed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_every_device_module_imports_with_the_extra_cpu_alone() -> None:
    script = Path(__file__).with_name("import_alone.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "numpy" in done.stdout and "onnxruntime" in done.stdout and "torch" not in done.stdout
