"""A pip that notes each call in PIP_SHIM_LOG (a JSON line) and links from PIP_SHIM_FROM to _TO.

Like pip it reads a constraints file; unlike pip it fails on what would replace a package."""

import json
import os
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement


def main(arguments: list[str]) -> None:
    file = arguments.index("--constraint") + 1 if "--constraint" in arguments else None
    wanted = [a for i, a in enumerate(arguments) if i and i != file and not a.startswith("-")]
    constraints = Path(arguments[file]).read_text().split() if file else []
    call = {"arguments": arguments, "wanted": wanted, "constraints": constraints}
    with open(os.environ["PIP_SHIM_LOG"], "a") as log:
        log.write(json.dumps(call) + "\n")
    source, target = (Path(os.environ[name]) for name in ("PIP_SHIM_FROM", "PIP_SHIM_TO"))
    here = {dist.name: dist.version for dist in distributions()}
    found = {dist.name: dist for dist in distributions(path=[str(source)])}
    for requirement in map(Requirement, wanted):
        if not requirement.specifier.contains(found[requirement.name].version):
            sys.exit(f"ERROR: No matching distribution found for {requirement}")
        for needed in [requirement, *map(Requirement, found[requirement.name].requires or [])]:
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            version = here.get(needed.name)
            if applies and version and not needed.specifier.contains(version, prereleases=True):
                sys.exit(f"ERROR: {needed} would replace {version}")
        for entry in source.glob(f"{requirement.name}*"):
            if not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)


if __name__ == "__main__":
    main(sys.argv[1:])
