"""Programs of true size compiled for TPU slices; no TPU is needed, nothing runs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
