"""Limits that a child process sets for itself before it runs what strangers wrote.

The system keeps them, whatever native code does meanwhile: a signal ends the process when its processor time is used
up, and an allocation beyond its memory fails. Where the system has no such limits (Windows), the parent's wait is the
only one.
"""

from __future__ import annotations

import signal


def limit_memory(more_bytes: int) -> None:
    """Let the process take ``more_bytes`` of address space beyond what it has, and leave no core file."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):  # no such limit here, or a lower one is set already
        pass


def limit_processor_time(seconds: float) -> None:
    """End the process after ``seconds`` of processor time from now on; 0 takes the limit away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def resident_bytes() -> int:
    """What the process has in memory now; 0 where the system does not say so in /proc."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except (ImportError, OSError):
        return 0
