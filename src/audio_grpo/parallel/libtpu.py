"""TPU's library on machines without a TPU, where it is installed for `audio-grpo plan`."""

import os
from pathlib import Path


def quiet_without_tpu() -> None:
    """Keep libtpu from seeking chips and complaining of their absence; comes before JAX's first use."""
    if [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]:
        return
    settings = {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
