"""The stages of ``benchmarks.gpu.truth``, a module each with ``run(settings, record)``."""
