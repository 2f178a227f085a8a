"""Shared loading, prompting and training code of the notebooks; imports run downwards only.

Three messages of the libraries say nothing that a reader could act on: they are silenced here."""

import logging
import warnings

# bitsandbytes looks for an optional CPU inference kernel of another package; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# On a CPU there is no memory to page to: the optimizer is the same without. See notebook 03.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
# peft 0.21 calls transformers by former names.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing.*` is deprecated")
