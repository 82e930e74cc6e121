"""Jetson boards: the JetPack of the L4T that runs, and what the power mode means."""

from __future__ import annotations

import re

from vz_edge.device.doctor.finding import Finding
from vz_edge.device.machine import RELEASE_FILE

JETPACK_OF_L4T = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}  # docs/jetson.md names the sources


def jetpack_finding(release: str | None) -> Finding:
    """The JetPack of an L4T release."""
    if release is None:
        return Finding("JetPack", "ok", "not a Jetson", needed_for="run")
    if not release:
        detail = f"/{RELEASE_FILE} names no L4T release"
        return Finding("JetPack", "warning", detail, "see which JetPack is flashed: apt show nvidia-jetpack", "run")
    major = int(release.split(".")[0])
    jetpack = JETPACK_OF_L4T.get(major)
    detail = f"L4T {release} (JetPack {jetpack or 'unknown'})"
    if major < 36:
        return Finding(
            "JetPack",
            "warning",
            f"{detail} has CUDA 11 or older, for which there is no onnxruntime new enough; the CPU works",
            "flash JetPack 6 or later to use the GPU",
            "run",
        )
    return Finding("JetPack", "ok", detail, needed_for="run")


def power_finding(query: str | None) -> Finding:
    """The power mode out of ``nvpmodel -q``: anything below MAXN caps the clocks."""
    match = re.search(r"NV Power Mode:\s*(\S+)", query or "")
    if match is None:
        return Finding("power mode", "warning", "nvpmodel does not tell it", "run 'sudo nvpmodel -q' yourself", "run")
    if match[1].upper().startswith("MAXN"):
        return Finding("power mode", "ok", match[1], needed_for="run")
    fix = "sudo nvpmodel -m ID, with the ID that 'grep POWER_MODEL /etc/nvpmodel.conf' gives for MAXN"
    return Finding("power mode", "warning", f"{match[1]} caps the clocks of CPU, GPU and memory", fix, "run")
