"""google.colab.userdata: secrets, from the environment variable FAKE_COLAB_SECRETS (JSON) and never from anywhere real."""

import json
import os


class SecretNotFoundError(Exception):
    """No secret of that name is stored."""


class NotebookAccessError(Exception):
    """The secret is stored, and this notebook was not given access to it."""


def get(key: str) -> str:
    secrets = json.loads(os.environ.get("FAKE_COLAB_SECRETS", "{}"))
    if key not in secrets:
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    if secrets[key] is None:
        raise NotebookAccessError(f"Notebook does not have access to secret {key}.")
    return secrets[key]
