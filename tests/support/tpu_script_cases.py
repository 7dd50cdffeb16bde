"""The shell scripts of tpu_scripts/ run with settings for tests."""

import os
import subprocess

from support.paths import DATA, ROOT

SCRIPTS = ROOT / "tpu_scripts"
PHOTO = DATA / "internvl_chat_v1_1" / "images" / "rgb.png"
SETTINGS = {
    "PROJECT": "p",
    "ZONE": "us-west4-a",
    "NAME": "n",
    "ACCELERATOR": "v5litepod-8",
    "CAPACITY": "spot",
    "BUCKET": "b",
    "CHECKPOINT": "model",
    "MESH": "tensor=8",
    "CLUSTER": "c",
    "IMAGE": "registry/image:1",
    "SERVICE_ACCOUNT": "sa",
}
PLACE = "--project=p --zone=us-west4-a"
MACHINE = (
    "--image-project=ubuntu-os-accelerator-images --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e "
    "--boot-disk-size=200GB --maintenance-policy=TERMINATE --scopes=cloud-platform"
)
SPOT = "--provisioning-model=SPOT --instance-termination-action=DELETE"


def start(script, *arguments, env, path=None, home=None):
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    if home:
        environment["HOME"] = str(home)
    command = ["bash", str(SCRIPTS / script), "--env", str(env), *arguments]
    return subprocess.run(
        command, env=environment, cwd=env.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def on_worker(command):
    ssh = f"gcloud compute tpus tpu-vm ssh n {PLACE} --worker=all"
    return f'{ssh} --command=. "$HOME/internvl/env" && internvl-jax {command}'
