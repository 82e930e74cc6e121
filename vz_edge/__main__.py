"""``python -m vz_edge`` is the ``vz-edge`` command."""

from vz_edge.cli import main

main()
