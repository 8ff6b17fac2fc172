"""Files inside wheels that are read, not imported: trained networks that ship in other projects' packages.

`make setup` downloads the wheels that pyproject.toml lists under tool.attnkern.wheels and leaves them
as archives.  Installed, mediapipe would hold numpy below 2, and both refuse Python 3.13; an archive
asks for nothing.  A package that is installed all the same serves as well.
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".venv" / "wheels"


def find(package: str) -> Path | None:
    """The archive that holds ``package``, or the folder where it is installed."""
    archives = sorted(FOLDER.glob(f"{package}-*.whl"))
    if archives:
        return archives[-1]
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def advice(package: str) -> str:
    return (
        f"{package} is neither in .venv/wheels nor installed; make setup downloads it "
        "(the version is in pyproject.toml, under tool.attnkern.wheels)"
    )


def read(package: str, path: str) -> bytes:
    """What the file ``path``, relative to the package, holds."""
    place = find(package)
    if place is None:
        raise FileNotFoundError(advice(package))
    if place.suffix != ".whl":
        return (place / path).read_bytes()
    with zipfile.ZipFile(place) as archive:
        return archive.read(f"{package}/{path}")
