"""A file is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_edge.cli.output_file import write_text
from vz_edge.errors import RequestError


def test_what_cannot_be_written_is_the_requests_fault_and_leaves_what_was_there(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_text(page, "one – two\n")
    assert page.read_text(encoding="utf-8") == "one – two\n"
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "absent" / "page.html", tmp_path / "folder"):
        with pytest.raises(RequestError, match=rf"{file.name} cannot be written \(.*\); name a file"):
            write_text(file, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html"]
