"""Prints what pyproject.toml requires for building, testing and development, for pip's command line.

``requirements.py wheels`` prints the wheels that are downloaded for the files in them instead.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
extras = project["project"]["optional-dependencies"]


def expand(requirement: str) -> list[str]:
    own = re.fullmatch(r"attnkern\[([\w,]+)\]", requirement)
    if not own:
        return [requirement]
    return [r for extra in own[1].split(",") for inner in extras[extra] for r in expand(inner)]


if sys.argv[1:] == ["wheels"]:
    print(*project["tool"]["attnkern"]["wheels"])
    raise SystemExit
wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["dev"]]
print(*dict.fromkeys(r for line in wanted for r in expand(line)))
