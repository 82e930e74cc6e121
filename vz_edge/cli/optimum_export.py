"""``optimum-cli export vz-edge ...``: the same command, found by people who start from optimum.

The wheel installs this file into ``optimum/commands/register/``, where optimum looks for subcommands.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class VzEdgeExportCommand(BaseOptimumCLICommand):
    """Hands every argument on to ``vz-edge export``."""

    COMMAND = CommandInfo(name="vz-edge", help="Export a LLaVA checkpoint to a vz-edge bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> Any:
        """Take every word as it is: the options are declared once, in ``vz-edge export``."""
        parser.prefix_chars = "\0"  # so that --model is a word here, not an unknown option
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Run ``vz-edge export`` with the words after the subcommand."""
        from vz_edge.cli import app

        app(["export", *self.args.arguments], prog_name="vz-edge")


REGISTER_COMMANDS = [(VzEdgeExportCommand, ExportCommand)]
