"""Processes of their own for tests: how many devices the CPU is, is fixed when jax starts."""

import os
import subprocess
import sys

from support.paths import ROOT, SUPPORT


def environment(devices=8):
    """For a process with that many virtual devices. Programs are compiled plainly: tests on meshes compile dozens of
    small ones, run each a few times, and took twice as long."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def run_file(name):
    """Run the tests of a file of this directory on eight devices."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / name)]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
