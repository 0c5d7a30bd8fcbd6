"""Against what the published implementation made of tiny checkpoints (see parity/make_goldens.py)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.audio import audio_token_count, log_mel
from audio_grpo.config import Config
from audio_grpo.model.checkpoint import read_published, spec_from_published
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import extend, hear, output_head, prefill, thinker_table
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.types import AudioBatch, PromptBatch
