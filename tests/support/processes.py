"""Processes that tests start: their environment, two of them joined by jax.distributed, the model that they load."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.paths import DATA, SUPPORT

from internvl_jax import checkpoint
from internvl_jax.checkpoint import layout
from internvl_jax.config import load_config
from internvl_jax.models import chat_model


def environment(devices=8):
    """For a process with that many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


GOLDEN = DATA / "internvl_chat_v1_1" / "checkpoint"


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_two(command, directory, devices=4):
    """Run two_processes.py's `command` on two processes; returns what each printed."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "two_processes.py"), str(number), str(port), command, str(directory)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=900) for process in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == 0, out[-2000:] + err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def make_model(directory):
    """A small checkpoint of random weights, every one of them, with the golden bundle's tokenizer, in small chunks."""
    directory.mkdir()
    values = json.loads((GOLDEN / "config.json").read_text())
    values["llm_config"].update(num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=2)
    values["vision_config"].update(num_hidden_layers=5)
    (directory / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / name, directory)
    shutil.copy(GOLDEN / "preprocessor_config.json", directory)
    config = load_config(directory)
    rng = np.random.default_rng(1)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32(0.1 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")),
        chat_model.abstract_params(config),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SMALLEST_PART", 256)
        checkpoint.save(directory, params)
    return params
