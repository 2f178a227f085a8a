"""google.colab.drive: `mount` makes MyDrive appear below the mount point, as Colab does once its owner has agreed."""

from pathlib import Path


def mount(mountpoint: str, force_remount: bool = False) -> None:
    (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount() -> None:
    pass
