"""How XLA compiles the programs of the tests and of the processes that they start.

Tests compile thousands of small programs and run each a few times: without expensive optimizations they take less than
half as long. TEST_PROGRAMS=production tests the programs that users get; XLA_FLAGS from outside come last and win.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# XLA ends the process at a flag that it does not know, and this one is gone from later versions.
HAS_FUSION_EMITTERS_FLAG = version("jaxlib").startswith("0.10.")
# jaxlib 0.12 fuses products on CPU by YNNPACK, which adds in an order that depends on the length: logits of a prompt
# with and without padding differ by 1.1e-5, without these fusions by 3.5e-6.
HAS_YNN_FUSIONS = version("jaxlib").startswith("0.12.")
FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if HAS_FUSION_EMITTERS_FLAG else []),
    *(["--xla_cpu_experimental_ynn_fusion_type="] if HAS_YNN_FUSIONS else []),
)
# jax.jit(..., compiler_options=PRODUCTION) compiles one program as it is compiled outside the tests.
PRODUCTION = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if HAS_FUSION_EMITTERS_FLAG else {}),
}


def compile_fast():
    """Set XLA_FLAGS of this process and its children. To be called before jax starts; a second call changes nothing."""
    if os.environ.get("TEST_PROGRAMS") == "production":
        return
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in FAST]
    os.environ["XLA_FLAGS"] = " ".join([*FAST, *given])


def share_compiled_programs():
    """One cache on disk for the session: workers of pytest-xdist and the processes that tests start compile each
    program once. To be called before jax is imported."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # made by the process that started this one
        return
    directory = tempfile.mkdtemp(prefix="internvl-jax-tests-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
