"""Doctor's checks on machines that are fine, and on machines where something is missing, broken or lying."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.requirements import Requirement

from vz_edge.device import doctor, machine
from vz_edge.device.cuda_libraries import wanted_libraries
from vz_edge.device.doctor import cuda, jetson, matmul, packages, providers, resources, trial
from vz_edge.device.doctor.finding import Finding, reasons_against
from vz_edge.device.process import Outcome
from vz_edge.device.requirements import Declared, install_command
from vz_edge.device.runtime import CPU, CUDA
from vz_edge.host.quant.pack import dequantize

DEMANDS = Declared(
    ">=3.10",
    (
        "numpy>=1.26",
        "rich>=13",
        "tomli; python_version < '3'",
        "onnxruntime>=1.22; extra == 'cpu'",
        "torch>=2.6; extra == 'export'",
    ),
)
FINE = {"numpy": "2.1.0", "rich": "13.0", "torch": "2.8.0+cu126"}


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_problem_stands_in_the_way_of_what_it_is_needed_for() -> None:
    findings = [
        Finding("a", "problem", "is gone", needed_for="export"),
        Finding("b", "problem", "is gone", needed_for="run"),
        Finding("c", "problem", "is gone"),
        Finding("d", "warning", "is slow"),
    ]
    assert reasons_against(findings, "export") == ["a: is gone", "c: is gone"]
    assert reasons_against(findings, "run") == ["b: is gone", "c: is gone"]


# --- packages


def test_packages_that_meet_every_demand() -> None:
    findings = packages.package_findings(DEMANDS, FINE.get, "3.12.3")
    assert [finding.state for finding in findings] == ["ok", "ok", "ok"]
    assert findings[1].detail == "numpy 2.1.0, rich 13.0"


def test_what_is_old_or_missing_is_named_with_its_installation() -> None:
    found = by_name(packages.package_findings(DEMANDS, {"numpy": "1.24.0", "torch": "2.5.0a0+nv24.08"}.get, "3.8.10"))
    assert found["Python"].state == "problem" and "3.8.10, expected >=3.10" in found["Python"].detail
    assert found["base packages"].detail == "numpy 1.24.0 (expected >=1.26), rich missing (expected >=13)"
    assert found["base packages"].fix == "pip install 'numpy>=1.26' 'rich>=13'"
    assert found["export packages"].needed_for == "export"
    assert "torch 2.5.0a0+nv24.08" in found["export packages"].detail
    assert not packages.export_is_expected({"torch": "2.6"}.get)


def test_a_machine_that_only_runs_bundles_is_told_so_in_one_line() -> None:
    versions = {"numpy": "2.1.0", "rich": "13.0"}
    found = by_name(packages.package_findings(DEMANDS, versions.get, "3.12.3"))["export packages"]
    assert (found.state, found.needed_for) == ("problem", "export")
    assert found.detail == "not installed; only the machine that exports needs them"
    assert found.fix == "pip install 'torch>=2.6'"


def test_without_packaging_or_a_declaration_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.package_findings(None)[0].state == "warning"
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    (finding,) = packages.package_findings(DEMANDS, FINE.get)
    assert finding.state == "problem" and finding.fix == "pip install packaging"


def test_two_onnxruntimes_at_once_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in {
        "onnxruntime": "onnxruntime",
        "onnxruntime-gpu": "onnxruntime",
        "onnxruntime-genai": "onnxruntime_genai",
    }.items():
        info = tmp_path / f"{name.replace('-', '_')}-1.22.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.22.0\n")
        (info / "top_level.txt").write_text(f"{module}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = packages.onnxruntime_packages()
    assert found == {"onnxruntime": "1.22.0", "onnxruntime-gpu": "1.22.0"}
    finding = packages.onnxruntime_finding(found)
    assert finding.state == "problem" and "overwrite" in finding.detail
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu, then " + install_command("gpu")


def test_no_onnxruntime_is_a_problem_and_one_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.onnxruntime_finding({"onnxruntime-gpu": "1.22.0"}).state == "ok"
    assert "without package metadata" in packages.onnxruntime_finding({}).detail
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert install_command("cpu") in packages.onnxruntime_finding({}).fix


# --- the 4-bit product


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_model_by_hand_is_what_onnx_and_the_exporter_read(precision: str) -> None:
    case = matmul.make_matmul(precision)
    model = onnx.load_from_string(case.model)
    onnx.checker.check_model(model)
    tensors = [torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer]
    weight = dequantize(*tensors, bits=4, in_features=matmul.INPUTS).double().numpy()
    np.testing.assert_allclose(case.x.astype(np.float64) @ weight.T, case.expected, rtol=1e-4, atol=1e-5)


def test_this_cpu_multiplies_as_numpy_does() -> None:
    result = trial.try_provider(CPU)
    assert result["started"] and result["error"] == ""
    assert 0 < result["distance"] <= providers.MAX_DISTANCE
    assert [f.state for f in providers.provider_findings(CPU, Outcome(result), gpu=False)] == ["ok", "ok"]


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="CUDA may start here")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_provider_that_is_left_out_has_not_started() -> None:
    result = trial.try_provider(CUDA)
    assert result == {"started": False, "error": ""}


class Session:
    """A stand-in for onnxruntime.InferenceSession; what a class attribute says goes wrong does."""

    on_start: Exception | None = None
    on_run: Exception | None = None
    factor = 1.0

    def __init__(self, model: bytes, options: object, providers: list[str], enable_fallback: int) -> None:
        assert enable_fallback == 0
        if self.on_start:
            raise self.on_start
        self.providers = providers

    def get_providers(self) -> list[str]:
        return [*self.providers, CPU]

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.on_run:
            raise self.on_run
        expected = matmul.make_matmul(inputs["x"].dtype.name).expected
        return [(expected * self.factor).astype(inputs["x"].dtype)]


@pytest.mark.parametrize(
    ("session", "states", "words"),
    [
        ({}, ["ok", "ok"], "of numpy"),
        ({"factor": 1.5}, ["ok", "problem"], "wrong numbers: 5.0e-01 from numpy"),
        ({"factor": float("nan")}, ["ok", "problem"], "wrong numbers"),
        ({"on_run": RuntimeError("no\nkernel image")}, ["ok", "problem"], "does not run: no kernel image"),
        ({"on_start": RuntimeError("no device")}, ["problem"], "does not start: no device"),
    ],
)
def test_a_broken_provider_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, session: dict[str, object], states: list[str], words: str
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", type("Broken", (Session,), session))
    result = json.loads(json.dumps(trial.try_provider(CUDA)))  # as it crosses between the processes
    findings = providers.provider_findings(CUDA, Outcome(result), gpu=True)
    assert [finding.state for finding in findings] == states
    assert words in findings[-1].detail and (findings[-1].fix or states[-1] == "ok")
    assert all(finding.needed_for == "run" for finding in findings)


def test_what_is_not_needed_only_warns() -> None:
    left_out = Outcome({"started": False, "error": ""}, log="libnvinfer.so.10: cannot open shared object file: No such")
    (finding,) = providers.provider_findings("TensorrtExecutionProvider", left_out, gpu=True)
    assert finding.state == "warning" and finding.detail == "does not start: libnvinfer.so.10 is missing"
    assert providers.provider_findings(CUDA, left_out, gpu=False)[0].state == "warning"
    assert providers.provider_findings(CUDA, left_out, gpu=True)[0].state == "problem"
    assert providers.provider_findings(CPU, Outcome(None, "killed by SIGILL"), gpu=False)[0].needed_for == "both"


def test_the_build_is_imported_and_new_enough() -> None:
    build = Outcome(trial.describe_build())
    assert providers.build_finding(build, Requirement("onnxruntime>=1.22")).state == "ok"
    old = providers.build_finding(build, Requirement("onnxruntime>=99; extra == 'cpu'"))
    assert old.state == "problem" and "expected >=99" in old.detail
    broken = providers.build_finding(Outcome(None, "the process was killed by SIGILL"), None)
    assert broken.state == "problem" and "SIGILL" in broken.detail


# --- CUDA


def test_libraries_are_found_where_the_loader_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("usr/local/cuda/lib64/libcufft.so.11", "own/libcudnn.so.9"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "own"))
    cache = "1 libs found in cache\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1\n"
    monkeypatch.setattr(cuda, "command_output", lambda *command: cache)
    names = ["libcuda.so.1", "libcufft.so.11", "libcudnn.so.9", "libcublas.so.12"]
    assert cuda.find_libraries(names, tmp_path) == {"libcuda.so.1", "libcufft.so.11", "libcudnn.so.9"}


def test_cuda_is_judged_by_what_is_there() -> None:
    everything = set(wanted_libraries("12.8"))
    assert cuda.cuda_finding(None, False, False, False, set(), []).state == "ok"
    card = cuda.cuda_finding(None, True, False, False, set(), [])
    assert card.state == "warning" and install_command("gpu") in card.fix
    assert "docs/jetson.md" in cuda.cuda_finding(None, True, True, False, set(), []).fix
    assert cuda.cuda_finding("12.8", True, False, True, set(), []).state == "ok"
    cut = cuda.cuda_finding("12.8", True, False, False, everything - {"libcudnn.so.9"}, [])
    assert cut.state == "problem" and cut.detail == "not found: libcudnn.so.9 (CUDA 12.8)"
    packaged = cuda.cuda_finding(
        "12.8", True, False, False, set(), ["/site/nvidia/cudnn/lib", "/site/nvidia/cublas/lib"]
    )
    assert packaged.fix == "export LD_LIBRARY_PATH=/site/nvidia/cudnn/lib:/site/nvidia/cublas/lib"
    assert "does not start" in cuda.cuda_finding("12.8", True, False, False, everything, []).detail
    assert cuda.cuda_finding("12.8", False, False, False, set(), []).state == "warning"
    assert cuda.cuda_finding("", True, False, False, set(), []).state == "problem"


# --- Jetson


@pytest.mark.parametrize(
    ("line", "release", "state", "words"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64", "36.4.3", "ok", "JetPack 6"),
        ("# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "38.2.0", "ok", "JetPack 7"),
        ("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref", "35.4.1", "warning", "JetPack 5"),
        ("# R99 (release), REVISION: 1.0, GCID: 1", "99.1.0", "ok", "JetPack unknown"),
        ("\x00\x01 nothing", "", "warning", "names no L4T release"),
        (None, None, "ok", "not a Jetson"),
    ],
)
def test_the_release_file_gives_the_jetpack(
    tmp_path: Path, line: str | None, release: str | None, state: str, words: str
) -> None:
    if line is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / machine.RELEASE_FILE).write_text(line)
    assert machine.l4t_release(tmp_path) == release
    finding = jetson.jetpack_finding(release)
    assert finding.state == state and words in finding.detail


def test_the_matrix_in_the_documentation_agrees() -> None:
    text = (Path(__file__).parents[2] / "docs" / "jetson.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)[\d.]* \| (\d+)\.[\d.]+ \|", text, re.MULTILINE)
    assert len(rows) >= 10
    assert all(jetson.JETPACK_OF_L4T[int(l4t)] == int(jetpack) for jetpack, l4t in rows)


def test_power_modes() -> None:
    assert jetson.power_finding("NV Power Mode: MAXN_SUPER\n2\n").state == "ok"
    slow = jetson.power_finding("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n")
    assert slow.state == "warning" and slow.detail.startswith("15W") and "nvpmodel -m" in slow.fix
    assert jetson.power_finding(None).state == "warning"


# --- memory, disk, threads


def fake_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMORY = {"proc/meminfo": "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n"}
CGROUP_2 = {
    "proc/self/cgroup": "0::/robot/camera\n",
    "sys/fs/cgroup/robot/camera/cpu.max": "max 100000\n",
    "sys/fs/cgroup/robot/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/robot/memory.max": "4000000000\n",
    "sys/fs/cgroup/robot/camera/memory.max": "max\n",
    "sys/fs/cgroup/robot/memory.current": "1500000000\n",
    "sys/fs/cgroup/robot/memory.stat": "active_file 100000000\ninactive_file 400000000\nanon 1000000000\n",
}
CGROUP_1 = {
    "proc/self/cgroup": "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n1:name=systemd:/\n",
    "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "4000000000\n",
    "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes": "1500000000\n",
    "sys/fs/cgroup/memory/docker/1/memory.stat": "inactive_file 7\n"
    "total_inactive_file 400000000\ntotal_active_file 100000000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}


@pytest.mark.parametrize("group", [CGROUP_1, CGROUP_2], ids=["cgroup 1", "cgroup 2"])
def test_a_control_group_and_those_above_it_limit(tmp_path: Path, group: dict[str, str]) -> None:
    root = fake_system(tmp_path, MEMORY | group)
    assert machine.cpu_quota(root) == 1.5
    assert machine.memory_limit_bytes(root) == 4_000_000_000 and machine.memory_left_bytes(root) == 3_000_000_000
    finding = resources.memory_finding(root)
    assert finding.state == "warning" and "3.0 GB available of 4.0 GB, limited" in finding.detail


def test_memory_and_disk_without_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resources.memory_finding(tmp_path).state == "warning"
    assert machine.cpu_quota(tmp_path) is None and machine.memory_limit_bytes(tmp_path) is None
    finding = resources.memory_finding(fake_system(tmp_path, MEMORY))
    assert finding == Finding("memory", "ok", "12.3 GB available of 16.4 GB")
    assert resources.disk_finding(tmp_path / "gone").state == "warning"
    for free, state in ((1e9, "warning"), (1e12, "ok")):
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert resources.disk_finding(tmp_path).state == state


def test_threads_beyond_the_quota_are_a_warning() -> None:
    assert resources.threads_finding(8, 8, 8, None).state == "ok"
    assert resources.threads_finding(4, 8, 8, 4.0).state == "ok"
    throttled = resources.threads_finding(8, 8, 8, 2.5)
    assert throttled.state == "warning" and "--threads 2" in throttled.fix
    assert resources.threads_finding(8, 8, 8, 0.5).fix.startswith("vz-edge run --threads 1")
    states = {value: resources.omp_finding(value, 4).state for value in (None, "4", "8,2", "1", "many")}
    assert states == {None: "ok", "4": "ok", "8,2": "ok", "1": "warning", "many": "warning"}


# --- all of it


def test_a_machine_with_nothing_still_gets_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(doctor, "physical_cores", fail)
    monkeypatch.setattr(packages.metadata, "distributions", fail)
    monkeypatch.setenv("PATH", "")
    fake_system(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n"})
    findings = by_name(list(doctor.diagnose(tmp_path, lambda *arguments: Outcome(None, "killed by SIGILL"))))
    assert "broken in two lines" in findings["threads"].detail
    assert "broken in two lines" in findings["onnxruntime package"].detail
    assert findings["onnxruntime build"].state == "problem"
    assert findings["power mode"].state == "warning"
    for finding in findings.values():
        assert "\n" not in finding.detail + finding.fix
        assert (finding.fix == "") == (finding.state == "ok"), finding


def test_a_jetson_with_a_wheel_of_another_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_system(tmp_path, MEMORY | {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n"})
    monkeypatch.setattr(cuda, "command_output", lambda *command: None)
    monkeypatch.setattr(doctor, "folders_of_all", lambda names: [])  # not those of this environment
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    trials = {
        (): Outcome({"version": "1.23.0", "build": "", "providers": [CUDA, providers.REMOTE, CPU], "cuda": "12.6"}),
        (CPU,): Outcome({"started": True, "error": "", "distance": 0.005}),
        (CUDA,): Outcome({"started": False, "error": ""}, log="libcudnn.so.9: cannot open shared object file: No such"),
    }
    findings = list(doctor.diagnose(tmp_path, lambda module, *provider: trials[provider]))
    found = by_name(findings)
    assert found[CUDA].detail == "does not start: libcudnn.so.9 is missing"
    assert "docs/jetson.md" in found["CUDA libraries"].fix
    assert found["4-bit MatMulNBits on CPU"].state == "ok"
    assert {reason.split(":")[0] for reason in reasons_against(findings, "run")} >= {CUDA, "CUDA libraries"}
    assert not any(CUDA in reason for reason in reasons_against(findings, "export"))
