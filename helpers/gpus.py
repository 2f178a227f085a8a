"""Common cards and the memory that torch finds on them. Imports errors."""

from helpers.errors import PlanError

GIB = 2**30
# Total capacity as torch reports it, rounded down; it is less than the number on the box. T4, RTX 4090, A100 and L40S as seen in published
# out-of-memory messages ("GPU 0 has a total capacity of 14.56 GiB"), the others estimated from them in proportion.
GPUS = {
    "RTX 3060": int(11.6 * GIB),
    "T4": int(14.5 * GIB),
    "L4": int(22.0 * GIB),
    "RTX 4090": int(23.6 * GIB),
    "A100-40GB": int(39.3 * GIB),
    "L40S": int(44.5 * GIB),
    "A100-80GB": int(79.1 * GIB),
    "H100-80GB": int(79.0 * GIB),
}
HEADROOM = 0.04  # an allowance for what the allocator reserves and cannot use, not a measurement


def capacity(gpu: str) -> int:
    """Bytes of the card `gpu`; PlanError with the choices for a name that is not in the table."""
    if gpu not in GPUS:
        raise PlanError(f"there is no GPU {gpu!r} in the table: choose one of {', '.join(GPUS)}")
    return GPUS[gpu]
