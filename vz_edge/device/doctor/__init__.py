"""What this machine can run and what is wrong with it: the checks of ``vz-edge doctor`` that need no torch.

Nothing is imported here that could be missing or broken: what may fail runs in a process of its own, and a check that
fails in an unforeseen way is a finding itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vz_edge.device import machine
from vz_edge.device.cuda_libraries import DRIVER, folders_of_all, wanted_libraries
from vz_edge.device.doctor import cuda, jetson, packages, providers, resources
from vz_edge.device.doctor.finding import Finding, reasons_against
from vz_edge.device.process import Outcome, one_line, run_isolated
from vz_edge.device.requirements import Declared, declared, extra_requirements
from vz_edge.device.runtime import CUDA, physical_cores

__all__ = ["Finding", "diagnose", "guarded", "reasons_against"]

TRIAL = "vz_edge.device.doctor.trial"


def diagnose(root: Path = Path("/"), run: Callable[..., Outcome] = run_isolated) -> Iterator[Finding]:
    """Findings in the order of the report, each given as soon as it is there.

    ``root`` is where the system's files lie; ``run`` starts a trial in a process of its own. Never raises.
    """
    demands = declared()
    yield from guarded("packages", lambda: packages.package_findings(demands))
    yield from guarded("onnxruntime package", lambda: [packages.onnxruntime_finding(packages.onnxruntime_packages())])
    yield from guarded("onnxruntime", lambda: _onnxruntime_findings(demands, root, run))
    release = machine.l4t_release(root)
    yield from guarded("JetPack", lambda: [jetson.jetpack_finding(release)])
    if release is not None:
        yield from guarded("power mode", lambda: [jetson.power_finding(machine.query_power_mode())])
    yield from guarded("memory", lambda: [resources.memory_finding(root)])
    yield from guarded("disk", lambda: [resources.disk_finding()])
    yield from guarded("threads", lambda: _thread_findings(root))


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``check`` finds; where it raises, that it could not be made."""
    try:
        return check()
    except Exception as error:
        detail = f"could not be checked ({type(error).__name__}: {one_line(error)})"
        return [Finding(name, "warning", detail, "please report it, with this line")]


def _onnxruntime_findings(demands: Declared | None, root: Path, run: Callable[..., Outcome]) -> list[Finding]:
    build = run(TRIAL)
    demanded = extra_requirements(demands, "cpu")[0] if demands is not None else None
    findings = [providers.build_finding(build, demanded)]
    if build.result is None:
        return findings
    board = machine.l4t_release(root) is not None
    gpu = board or cuda.has_graphics_card(root)
    trials = {name: run(TRIAL, name) for name in build.result["providers"] if name != providers.REMOTE}
    for name, trial in trials.items():
        findings += providers.provider_findings(name, trial, gpu)
    version = build.result["cuda"] if CUDA in trials else None
    wanted = wanted_libraries(version or "")
    found = cuda.find_libraries(wanted, root)
    started = CUDA in trials and bool((trials[CUDA].result or {}).get("started"))
    return [
        *findings,
        cuda.cuda_finding(
            version,
            gpu,
            board,
            started,
            found,
            folders_of_all(name for name in wanted if name not in found and name != DRIVER),
        ),
    ]


def _thread_findings(root: Path) -> list[Finding]:
    cores, present = physical_cores(), os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    return [
        resources.threads_finding(cores, allowed, present, machine.cpu_quota(root)),
        resources.omp_finding(os.environ.get("OMP_NUM_THREADS"), cores),
    ]
