"""What the setup cell of every notebook prints. Imports environment, plotting, profiles."""

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from helpers import environment, plotting, profiles

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def show_setup() -> None:
    """Set the figures' look; print where the notebook runs, on which versions and hardware, and the profile that suits it.

    RAM and disk in GB (10^9 bytes); the disk is the one that this repository lies on. No path and no host name is shown.
    """
    plotting.set_style()
    profile = profiles.resolve()
    rows = [("place", environment.place()), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "missing"))
    ram, disk = psutil.virtual_memory(), shutil.disk_usage(environment.ROOT)
    rows += [
        ("GPU", graphics_card()),
        ("dtype", profile.compute_dtype),
        ("RAM", f"{ram.total / 1e9:.0f} GB, {ram.available / 1e9:.0f} GB of it free"),
        ("disk", f"{disk.free / 1e9:.0f} GB free"),
        ("profile", profile.name),
    ]
    print("\n".join(f"{name:<13} {value}" for name, value in rows))


def graphics_card() -> str:
    """Name, memory and compute capability of the first GPU, or "none"."""
    if not torch.cuda.is_available():
        return "none"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 1e9:.1f} GB, compute capability {card.major}.{card.minor}"
