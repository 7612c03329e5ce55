"""A PostgreSQL server for the tests: Debian's programs, a free port, a temporary folder, gone at the end.

The server's helper is a cell of nbs/etl/05_databases.ipynb; it is run from there, so that page and tests start the same.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gates
import pytest

from bigmodel_nb.etl.databases import connected


def page_helpers() -> dict[str, Any]:
    "What the page's cell about its server defines."
    page = gates.Notebook(gates.ROOT / "nbs" / "etl" / "05_databases.ipynb")
    [cell] = [text for text in map(gates.source, page.code()) if text.startswith("# the server of this page and of the tests")]
    names: dict[str, Any] = dict(
        re=re,
        shutil=shutil,
        tempfile=tempfile,
        Path=Path,
        Iterator=Iterator,
        contextmanager=contextmanager,
        connected=connected,
    )
    exec(compile(cell, "05_databases.ipynb", "exec"), names)
    return names


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    "The address of a server of our own, with its password."
    helpers = page_helpers()
    assert helpers["find_postgres"](), "PostgreSQL's programs are missing: run sh tests/system_parts.sh"
    with helpers["temporary_postgres"]() as uri:
        yield uri
