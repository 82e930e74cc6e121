"""``vz-edge verify``: hash every file of a bundle, and show it the export's picture again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    bundle: Annotated[Path, typer.Argument(help="A folder written by 'vz-edge export'.")],
    hashes_only: Annotated[bool, typer.Option("--hashes-only", help="Do not run the model.")] = False,
    provider: Annotated[list[str] | None, typer.Option(help="As for 'vz-edge run'.")] = None,
    device_id: Annotated[int | None, typer.Option(help="As for 'vz-edge run'.")] = None,
) -> None:
    """Check that a bundle is what was exported and still sees the same."""
    from rich.console import Console
    from rich.progress import Progress

    from vz_edge.bundle import read_manifest, verify_files
    from vz_edge.errors import BundleError

    manifest = read_manifest(bundle)
    console = Console()
    total = sum(entry.size_bytes for entry in manifest.files.values())
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("hashing", total=total)
        verify_files(bundle, manifest, lambda name, count: bars.update(task, advance=count, description=name))
    console.print(f"{len(manifest.files)} files, {total / 1e9:.2f} GB: every hash is as recorded")
    if hashes_only:
        console.print("verdict: the files are what was exported; the model was not run")
        return
    from vz_edge.device.model import EdgeModel
    from vz_edge.device.verify import look_again

    look = look_again(EdgeModel.load(bundle, providers=provider, device=device_id))
    kept = "" if look.kept_agreement is None else f"{look.kept_agreement:.1%} of the kept positions, "
    token = {True: "the same next token", False: "another next token", None: "next token not recorded"}[look.same_token]
    console.print(f"parity picture: {kept}features within {look.feature_error:.1e}, {token}")
    if faults := look.faults(manifest.target):
        raise BundleError(
            f"{bundle} does not see what it saw when it was exported: {', '.join(faults)}; answers will be wrong: try "
            "--provider cpu to rule the provider out, or export it again"
        )
    console.print(f"verdict: {look.verdict(manifest.target)}", highlight=False)
