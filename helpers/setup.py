"""What the setup cell of every notebook prints. Imports profiles, plotting, errors."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from helpers import plotting, profiles

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def show_setup() -> None:
    """Set the figures' look; print the versions of what the series stands on, the device and the profile that suits it."""
    plotting.set_style()
    rows = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "missing: run the cell above again, or pip install -r requirements.txt"))
    rows.append(("device", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"))
    rows.append(("profile", profiles.resolve().name))
    print("\n".join(f"{name:<13} {value}" for name, value in rows))
