"""The ``vz-edge`` command: one lazy table, one file a command.

Only the command asked for is imported, and each command imports what is heavy inside its function, so that
``vz-edge --help`` starts in a fraction of a second on a small board.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from vz_edge.cli.verbosity import reset_verbosity, set_verbosity
from vz_edge.errors import VzEdgeError

COMMANDS = ("export", "run", "watch", "serve", "inspect", "verify", "models", "devices", "plan", "profile", "doctor")
DEBUG_VARIABLE = "VZ_EDGE_DEBUG"
STATUS_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
VERBOSE_HELP = "Say on stderr what is done; -vv: in detail."
QUIET_HELP = "Say nothing on stderr but errors."


class LazyCommands(typer.core.TyperGroup):
    """A command group that imports ``vz_edge.cli.<name>`` when the command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command's module and make its ``command`` function a command."""
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        function = importlib.import_module(f"vz_edge.cli.{cmd_name}").command
        single.command(cmd_name)(one_line_errors(function))
        command = typer.main.get_command(single)
        _add_verbosity(command)
        return command


def one_line_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Print this package's errors, and those of files, as one line and exit with status 2; with 130 after Ctrl-C.

    Any other error is a bug and keeps its traceback.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except VzEdgeError as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            print(f"vz-edge: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            raise typer.Exit(STATUS_INTERRUPTED) from None
        except BrokenPipeError:  # who read the output has gone, which typer sees to
            raise
        except OSError as error:
            if os.environ.get(DEBUG_VARIABLE) or error.filename is None:
                raise
            print(f"vz-edge: {_about_file(error)}", file=sys.stderr)
            raise typer.Exit(2) from error

    return wrapped


def _verbose(count: int) -> None:
    if count:
        set_verbosity(count)


def _quiet(wanted: bool) -> None:
    if wanted:
        set_verbosity(-1)


def _verbosity(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, callback=_verbose, expose_value=False, help=VERBOSE_HELP)
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, expose_value=False, help=QUIET_HELP)] = False,
) -> None:
    """The options that every command has, behind its name as before it."""


def _add_verbosity(command: Any) -> None:
    """Give a command -v and -q; names that it has itself are left to it."""
    taken = {name for parameter in command.params for name in parameter.opts}
    declared = typer.Typer(add_completion=False)
    declared.command()(_verbosity)
    for option in typer.main.get_command(declared).params:
        option.opts = [name for name in option.opts if name not in taken]
        if option.opts:
            command.params.append(option)


def _about_file(error: OSError) -> VzEdgeError:
    """A name that no file can have, a folder that may not be written to, a disk that is full."""
    return VzEdgeError(f"{error.filename}: {error.strerror}; check the name, its permissions and the room on the disk")


app = typer.Typer(cls=LazyCommands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vz_edge import __version__

        print(f"vz-edge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help=VERBOSE_HELP)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET_HELP)] = False,
) -> None:
    """Put a vision-language model on an edge device: export it once, then ask it about pictures."""
    context.call_on_close(reset_verbosity)
    set_verbosity(-1 if quiet else verbose)
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main() -> None:
    """Entry point of the ``vz-edge`` script."""
    app()
