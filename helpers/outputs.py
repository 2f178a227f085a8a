"""The folder that a run writes to: where it is, and whether it can take a run. Imports loading, memory, files, profiles, errors."""

import shutil
from pathlib import Path

from helpers import files, loading, memory
from helpers.errors import OutputError
from helpers.profiles import ROOT, Profile


def run_folder(profile: Profile, output: str | Path | None = None) -> Path:
    """The run's folder: `output`, or runs/<profile>."""
    return Path(output) if output else ROOT / "runs" / profile.name


def output_folder(profile: Profile, output: str | Path | None = None) -> Path:
    """The run's folder (default runs/<profile>), made, cleaned of what killed runs left, proven writable, with room on its disk; OutputError if not."""
    folder = run_folder(profile, output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
        for name in ("adapter", "checkpoints", *loading.RECORDS):
            files.clean(folder / name)
    except OSError as error:
        raise OutputError(
            f"the output folder {str(folder)!r} cannot be written ({error.strerror}): choose another with --output"
        ) from error
    # Two checkpoints, a third while it is written, and the adapter: each holds float32 weights, the former three Adam's state too.
    adapter = memory.adapter_parameters(loading.load_config(profile), profile.lora_r, profile.target_modules)
    need, free = (3 * 12 + 4) * adapter, shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"the disk of {str(folder)!r} has {free / 1e6:,.0f} MB free and checkpoints and adapter take up to {need / 1e6:,.0f} MB: free some, or choose another disk with --output"
        )
    return folder
