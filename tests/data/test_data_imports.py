import subprocess
import sys

SCRIPT = """
import sys
import {module}
print([name for name in ("jax", "grain", "av", "pyarrow", "espeakng_loader") if name in sys.modules])
"""


def test_packing_and_inspecting_start_without_jax_grain_and_the_extras():
    for module in ("audio_grpo.audio", "audio_grpo.data", "audio_grpo.data.stages"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(module=module)], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "[]", module
