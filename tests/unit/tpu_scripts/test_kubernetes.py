"""Manifests and commands for GKE, and the compiler flags of the TPU scripts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tpu_script_cases import PLACE, SCRIPTS, start

from internvl_jax.aot.topology import CHIPS
from internvl_jax.cli.main import build_parser

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


# Kubernetes.


def manifests(lines):
    """The objects that a dry run of gke.sh would apply."""
    yaml = pytest.importorskip("yaml")
    text = "\n".join(lines)
    return [yaml.safe_load(body) for body in re.findall(r"^kubectl apply -f - <<END\n(.*?)^END$", text, re.S | re.M)]


def validate(thing):
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(thing, validator.latest_version(), strict=True)


def test_jobset(env):
    question = 'Is "this" $(a) & b?'
    done = start("gke.sh", "--dry-run", "--accelerator=v6e-16", "run", "--", "chat", question, env=env)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout.split("spec:", 1)[1]
    (jobset,) = manifests(done.stdout.splitlines())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    # JobSet's own schema is in no package; what it makes is a plain Job, whose schema is.
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "n"}, "spec": job})
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["internvl-jax", "chat", question]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in container["env"][0]["value"]
    with pytest.raises(Exception, match="tpus"):  # the validation sees a wrong field
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n"}, "spec": {**pod, "tpus": 4}})


def test_replicas_of_the_server(env):
    yaml = pytest.importorskip("yaml")
    options = ["--checkpoint", "/bucket/model", "--mesh", "tensor=8"]
    done = start("gke.sh", "--dry-run", "--accelerator=v6e-8", "serve", "--", *options, env=env)
    assert done.returncode == 0, done.stderr
    (text,) = re.findall(r"^kubectl apply -f - <<END\n(.*?)^END$", done.stdout, re.S | re.M)
    objects = {thing["kind"]: thing for thing in yaml.safe_load_all(text)}
    assert "${" not in yaml.safe_dump_all(objects.values())
    for kind, thing in objects.items():
        if kind != "PodMonitoring":  # of Google Cloud, whose schema is in no package
            validate(thing)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # The command is one that the parser takes.
    args = build_parser().parse_args(container["command"][1:])
    assert (args.host, args.port, str(args.api_key_file), args.mesh) == ("0.0.0.0", 8000, "/keys/keys", "tensor=8")
    assert container["ports"][0]["containerPort"] == args.port
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= stop + args.drain_timeout + 10
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    refused = start("gke.sh", "--dry-run", "--accelerator=v6e-16", "serve", "--", *options, env=env)
    assert refused.returncode != 0
    assert "slices of one host" in refused.stderr


def test_gke_commands(dry, env):
    made = dry("gke.sh", "--accelerator", "v6e-16", "create")
    assert made[:2] == [
        f"gcloud container clusters create c {PLACE} --workload-pool=p.svc.id.goog --addons=GcsFuseCsiDriver "
        "--num-nodes=1 --machine-type=e2-standard-4",
        f"gcloud container node-pools create n --cluster=c {PLACE} --machine-type=ct6e-standard-4t --tpu-topology=4x4 "
        "--num-nodes=4 --scopes=cloud-platform --spot",
    ]
    (account,) = manifests(start("gke.sh", "--dry-run", "create", env=env).stdout.splitlines())
    validate(account)
    assert account["metadata"] == {"name": "sa", "namespace": "default"}
    (xpk,) = dry("gke.sh", "--accelerator", "v5litepod-16", "xpk", "--", "bench", "--batch-size", "1")
    assert xpk.startswith(
        f"xpk workload create {PLACE} --cluster=c --workload=n --tpu-type=v5litepod-16 --num-slices=1"
    )
    assert xpk.endswith("--command=internvl-jax bench --batch-size 1")
    (build,) = dry("gke.sh", "image")
    assert "--substitutions=_IMAGE=registry/image:1" in build
    assert dry("gke.sh", "delete") == [f"gcloud container clusters delete c {PLACE} --quiet"]


def test_gke_applies_what_the_dry_run_shows(env, notes):
    notes.answer(f"[[ $* != 'apply -f -' ]] || cat >{notes.log}.yaml", "kubectl")
    assert start("gke.sh", "run", "--", "chat", "x", env=env, path=notes.path).returncode == 0
    shown = start("gke.sh", "--dry-run", "run", "--", "chat", "x", env=env).stdout.splitlines()
    yaml = pytest.importorskip("yaml")
    assert [yaml.safe_load(Path(f"{notes.log}.yaml").read_text())] == manifests(shown)
    assert [call.split()[1] for call in notes.calls] == ["delete", "apply", "wait", "logs"]


# Compiler flags.

COMPILE = """
import sys, jax
from internvl_jax.aot.topology import parse_topology
device = parse_topology(sys.argv[1]).devices()[0]
x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda a: a @ a).lower(x).compile()
"""


def flags_of(generation):
    command = f"source {SCRIPTS}/libtpu_flags.env; echo $LIBTPU_FLAGS_{generation}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def compile_with(flags, topology):
    return subprocess.run(
        [sys.executable, "-c", COMPILE, topology],
        env={**os.environ, "LIBTPU_INIT_ARGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.parametrize(
    "generation", [name if name == "v6e" else pytest.param(name, marks=pytest.mark.long) for name in CHIPS]
)
def test_the_tpu_compiler_knows_every_flag(generation):
    pytest.importorskip("libtpu")
    done = compile_with(flags_of(generation), generation)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_tpu_compiler_refuses_a_flag_that_it_does_not_know():
    pytest.importorskip("libtpu")
    done = compile_with("--xla_tpu_no_such_flag=true", "v5e-1")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stdout


def test_the_example_can_be_sourced():
    command = f"set -eu; source {SCRIPTS}/env.example; printf '%s' \"$MESH\""
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == "tensor=8"
