"""Flags of the TPU compiler: how they are written, and that they reach it."""

import subprocess

import jax
import jax.numpy as jnp
import pytest

from internvl_jax.aot import compiled_program, flags, hlo
from internvl_jax.aot.topology import CHIPS, parse_topology
from internvl_jax.parallel.mesh import make_mesh

VMEM = "--xla_tpu_scoped_vmem_limit_kib=65536"


def test_flags_are_read():
    assert flags.compiler_flags("none", "v5e") == {}
    assert flags.compiler_flags("--xla_a=true --xla_b=2", "v5e") == {"xla_a": "true", "xla_b": "2"}
    for wrong in ("xla_a=true", "--xla_a", "off"):
        with pytest.raises(ValueError, match=r"is not understood: write default, none, or --NAME=VALUE"):
            flags.compiler_flags(wrong, "v5e")


@pytest.mark.parametrize("generation", CHIPS)
def test_the_default_is_what_the_scripts_set(generation):
    command = ["bash", "-c", f"source {flags.FILE}; echo $LIBTPU_FLAGS_{generation}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    expected = flags.compiler_flags(text, generation) if text else {}
    assert flags.compiler_flags("default", generation) == expected


def test_flags_reach_the_compiler():
    """More VMEM for one product makes its tiles larger."""
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e-1")
    mesh = make_mesh("tensor=1", topology.devices())
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(lambda a: a @ a).lower(x)

    def scoped(text):
        done = compiled_program.compile_program(topology, mesh, lowered, 1, flags.compiler_flags(text, "v5e"))
        assert hlo.parse(done.hlo_text).computations
        return done.hlo_text

    assert scoped("none") != scoped(VMEM)
    with pytest.raises(ValueError, match="the TPU compiler does not know the flag --xla_no_such"):
        scoped("--xla_no_such=1")
