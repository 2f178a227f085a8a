"""google.colab.drive: `mount` makes MyDrive appear, as Colab does once its owner has agreed."""

from pathlib import Path


def mount(mountpoint: str) -> None:
    (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
