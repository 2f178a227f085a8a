"""google.colab.files: `download` says what the browser would be given."""

from pathlib import Path


def download(filename: str) -> None:
    if not Path(filename).is_file():
        raise FileNotFoundError(f"Cannot find file: {filename}")
    print(f"downloaded {Path(filename).name}")
