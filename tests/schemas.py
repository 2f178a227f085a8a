"""Files of GitHub and of citations, held against the schemas that check-jsonschema brings along: no network."""

from pathlib import Path

from check_jsonschema import main
from click.testing import CliRunner, Result


def against_schema(schema: str, *paths: Path) -> Result:
    """What check-jsonschema answers; exit code 0 if every file keeps the schema ("github-workflows", "dependabot", ...)."""
    return CliRunner().invoke(main, ["--builtin-schema", f"vendor.{schema}", *map(str, paths)])
