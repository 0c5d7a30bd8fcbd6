"""CPU devices that XLA is asked for beyond the one there is, as programs for several devices are tried on a laptop."""

import os
import re

_THREADS_PER_DEVICE = 8
"""Exchanges of a device that are under way at once, and some more."""


def room_to_wait() -> None:
    """Ask XLA for threads enough for all that such devices wait for at once; comes before JAX's first use.

    XLA's pool has a thread for each device by default. An exchange keeps its thread until all devices have come to it,
    and a program may have several under way, so that the pool can run out before the last device has come to any. The
    process then ends after 40 seconds. A number of the user's own is kept.
    """
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = int((forced or [os.environ.get("JAX_NUM_CPU_DEVICES") or 1])[-1])
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(_THREADS_PER_DEVICE * count))
