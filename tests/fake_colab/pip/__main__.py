"""A pip that records each call in PIP_SHIM_LOG (a JSON line) and installs by linking from PIP_SHIM_FROM into PIP_SHIM_TO.

Like pip it reads a constraints file; unlike pip it refuses, with exit status 1, whatever would replace an installed package.
"""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions, version
from pathlib import Path

from packaging.requirements import Requirement


def would_replace(requirement: Requirement) -> str | None:
    """What installing `requirement` would do to an installed package, None if nothing."""
    try:
        here = version(requirement.name)
    except PackageNotFoundError:
        return None
    return None if requirement.specifier.contains(here, prereleases=True) else f"{requirement} would replace {here}"


def main(arguments: list[str]) -> int:
    wanted, constraints, position = [], [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--constraint":
            position += 1
            constraints = Path(arguments[position]).read_text().split()
        elif argument != "install" and not argument.startswith("-"):
            wanted.append(argument)
        position += 1
    with open(os.environ["PIP_SHIM_LOG"], "a") as log:
        log.write(json.dumps({"arguments": arguments, "wanted": wanted, "constraints": constraints}) + "\n")
    source, target = (Path(os.environ[name]) for name in ("PIP_SHIM_FROM", "PIP_SHIM_TO"))
    found = {dist.metadata["Name"]: dist for dist in distributions(path=[str(source)])}
    for requirement in map(Requirement, wanted):
        if requirement.name not in found or not requirement.specifier.contains(found[requirement.name].version):
            print(f"ERROR: No matching distribution found for {requirement}", file=sys.stderr)
            return 1
        for needed in map(Requirement, found[requirement.name].requires or []):
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and (problem := would_replace(needed)):
                print(f"ERROR: {problem}", file=sys.stderr)
                return 1
        if problem := would_replace(requirement):
            print(f"ERROR: {problem}", file=sys.stderr)
            return 1
    for requirement in map(Requirement, wanted):
        for entry in source.glob(f"{requirement.name}*"):
            if not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
        distribution(requirement.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
