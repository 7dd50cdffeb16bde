"""The shell scripts for pods: what they would run, what they ask, and what they do with a recorded gcloud."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tpu_script_cases import MACHINE, PHOTO, PLACE, SCRIPTS, SPOT, on_worker, start

from internvl_jax.aot.topology import CHIPS, slices

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (the extra 'test' has it)")
    files = [*map(str, SCRIPTS.glob("*.sh")), str(SCRIPTS / "libtpu_flags.env")]
    done = subprocess.run([shellcheck, "-x", *files], cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_every_script_is_strict_and_explains_itself(script, env):
    text = (SCRIPTS / script).read_text()
    if script in ("common.sh", "worker_setup.sh"):
        assert "set -euo pipefail" in text
        return
    assert '/common.sh"' in text
    done = start(script, "--help", env=env)
    assert done.returncode == 0
    assert f"tpu_scripts/{script}" in done.stdout
    assert "--dry-run" in done.stdout
    assert os.access(SCRIPTS / script, os.X_OK)


# Dry runs.


def test_create_queued_resource(dry):
    assert dry("create.sh") == [
        f"gcloud compute tpus queued-resources create n --node-id=n {PLACE} --accelerator-type=v5litepod-8 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot",
        f"gcloud compute tpus queued-resources describe n {PLACE} --format=value(state.state)",
    ]
    first, _ = dry("create.sh", "--capacity", "reserved", "--reservation=r", "--accelerator", "v5e-16")
    assert first.startswith("gcloud alpha compute tpus queued-resources create n")
    assert first.endswith(
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --reserved --reservation=r"
    )


def test_create_instance(dry):
    (command,) = dry("create.sh", "--accelerator", "v6e-8")
    assert command == f"gcloud compute instances create n {PLACE} --machine-type=ct6e-standard-8t {MACHINE} {SPOT}"
    (command,) = dry("create.sh", "--accelerator", "v5p-8", "--capacity", "on-demand")
    assert command == f"gcloud compute instances create n {PLACE} --machine-type=ct5p-hightpu-4t {MACHINE}"


def test_create_group(dry):
    reserved = "--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE"
    assert dry("create.sh", "--accelerator", "v6e-16", "--capacity=reserved", "--reservation", "r") == [
        "gcloud compute resource-policies create workload-policy n --project=p --region=us-west4 "
        "--type=HIGH_THROUGHPUT --accelerator-topology=4x4",
        f"gcloud compute instance-templates create n --project=p --machine-type=ct6e-standard-4t {MACHINE} {reserved} "
        "--reservation-affinity=specific --reservation=r",
        f"gcloud compute instance-groups managed create n {PLACE} --template=n --size=4 "
        "--workload-policy=projects/p/regions/us-west4/resourcePolicies/n --target-size-policy-mode=bulk "
        "--default-action-on-vm-failure=do-nothing",
        f"gcloud compute instance-groups managed wait-until n {PLACE} --stable",
    ]


def test_install(dry):
    archive, copy, run = dry("install.sh")
    assert archive.endswith("archive --format=tar.gz --prefix=internvl-jax/ --output=FOLDER/internvl-jax.tar.gz HEAD")
    files = f"FOLDER/internvl-jax.tar.gz {SCRIPTS}/worker_setup.sh {SCRIPTS}/libtpu_flags.env"
    assert copy == f"gcloud compute tpus tpu-vm scp {files} n:. {PLACE} --worker=all"
    assert run == f"gcloud compute tpus tpu-vm ssh n {PLACE} --worker=all --command=bash worker_setup.sh v5e b"
    group = dry("install.sh", "--accelerator", "v5p-16")
    assert group[1] == group[4]
    assert group[1].startswith("gcloud compute instance-groups managed list-instances n")
    assert group[2:4] == [f"gcloud compute scp {files} n-{worker}:. {PLACE}" for worker in (0, 1)]
    assert group[5:] == [
        f"gcloud compute ssh n-{worker} {PLACE} --command=bash worker_setup.sh v5p b" for worker in (0, 1)
    ]


def test_stage(dry, tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text("{}")
    assert dry("stage.sh", f"{published}/") == [
        f"internvl-jax convert {published} {published}-jax",
        "gcloud storage buckets create gs://b --project=p --location=us-west4 --uniform-bucket-level-access",
        f"gcloud storage rsync --recursive {published}-jax gs://b/model",
    ]
    (published / "params").mkdir()
    (published / "params" / "_METADATA").write_text("{}")
    assert dry("stage.sh", str(published))[1:] == [f"gcloud storage rsync --recursive {published} gs://b/model"]


def test_chat(dry):
    question = 'What\'s "this" & $HOME?'
    copy, run = dry("chat.sh", question, str(PHOTO))
    assert copy == f"gcloud compute tpus tpu-vm scp {PHOTO} n:. {PLACE} --worker=all"
    start_of_it = on_worker("chat --checkpoint internvl/bucket/model --mesh tensor=8 --image rgb.png ")
    assert run.startswith(start_of_it)
    assert shlex.split(run.removeprefix(start_of_it)) == [question]  # as the worker's shell reads it
    assert len(dry("chat.sh", "Who are you?")) == 1


def test_batch(dry, tmp_path):
    (tmp_path / "my questions.jsonl").write_text("")
    (tmp_path / "images").mkdir()
    assert dry("batch.sh", "--mesh=tensor=4", "my questions.jsonl", "images") == [
        "gcloud storage cp my questions.jsonl gs://b/batch/my questions/questions.jsonl",
        "gcloud storage rsync --recursive images gs://b/batch/my questions/images",
        on_worker(
            r"batch internvl/bucket/batch/my\ questions/questions.jsonl "
            r"--output internvl/bucket/batch/my\ questions/answers.jsonl "
            r"--root internvl/bucket/batch/my\ questions/images --checkpoint internvl/bucket/model --mesh tensor=4"
        ),
        "gcloud storage cp gs://b/batch/my questions/answers.jsonl my questions.answers.jsonl",
    ]


def test_bench_and_profile(dry):
    model = "--checkpoint internvl/bucket/model --mesh tensor=8"
    assert dry("bench.sh", "--", "--batch-size", "1", "8", "--json") == [
        on_worker(f"bench {model} --batch-size 1 8 --json")
    ]
    assert dry("profile.sh", "--", "--batch-size", "8") == [
        on_worker(f"bench {model} --profile internvl/bucket/profile --batch-size 8"),
        "mkdir -p profile",
        "gcloud storage rsync --recursive gs://b/profile profile",
    ]


def test_options_passed_on_exist():
    """What the scripts pass to internvl-jax, internvl-jax takes."""
    from internvl_jax.cli import main

    parser = main.build_parser()
    for line in (
        "chat --checkpoint m --mesh tensor=8 --image rgb.png Hello",
        "batch q.jsonl --output a.jsonl --root i --checkpoint m --mesh tensor=4",
        "bench --checkpoint m --mesh tensor=8 --profile p --batch-size 1 8 --prompt-tokens 9 --json",
        "convert a b",
    ):
        parser.parse_args(line.split())


def test_delete(dry):
    assert dry("delete.sh") == [f"gcloud compute tpus queued-resources delete n {PLACE} --force --quiet"]
    assert dry("delete.sh", "--accelerator", "v6e-1") == [f"gcloud compute instances delete n {PLACE} --quiet"]
    assert dry("delete.sh", "--accelerator", "v6e-32") == [
        f"gcloud compute instance-groups managed delete n {PLACE} --quiet",
        "gcloud compute instance-templates delete n --project=p --quiet",
        "gcloud compute resource-policies delete n --project=p --region=us-west4 --quiet",
    ]


def test_everything_created_is_deleted(dry):
    """Each kind of resource that create.sh makes, delete.sh takes away."""
    for accelerator in ("v5litepod-16", "v6e-4", "v5p-64"):
        made = [
            line.split(" create ")[0] for line in dry("create.sh", "--accelerator", accelerator) if " create " in line
        ]
        gone = [line.split(" delete ")[0] for line in dry("delete.sh", "--accelerator", accelerator)]
        assert sorted(made) == sorted(gone)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_slices_are_those_of_the_compile_report(dry, chip):
    for topology in slices(chip):
        if topology.chips > 256:
            continue
        name = topology.slice_name.replace("v5e", "v5litepod")
        pool = next(line for line in dry("gke.sh", "--accelerator", name, "create") if "node-pools" in line)
        assert f"--tpu-topology={'x'.join(map(str, topology.shape))} " in pool
        hosts, chips = re.search(r"--num-nodes=(\d+)", pool)[1], re.search(r"-(\d)t ", pool)[1]
        assert int(hosts) * int(chips) == topology.chips


# Settings and questions.


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("create.sh", ["--size", "3"], "there is no flag --size"),
        ("create.sh", ["--zone"], "--zone needs a value"),
        ("create.sh", ["--capacity", "cheap"], "capacity is spot, on-demand or reserved, not cheap"),
        ("create.sh", ["--capacity", "reserved"], "set RESERVATION in"),
        ("create.sh", ["--accelerator", "v6e-5"], "no slice of 5 v6e chips"),
        ("create.sh", ["--accelerator", "h100-8"], "accelerator h100-8 is not known"),
        ("create.sh", ["--accelerator", "v6e"], "is not understood"),
        ("create.sh", ["--accelerator", "tpu7x-8"], "use gke.sh"),
        ("stage.sh", [], "name one directory"),
        ("stage.sh", ["nowhere"], "has no config.json"),
        ("chat.sh", [], "ask something"),
        ("chat.sh", ["hello", "nowhere.png"], "there is no image nowhere.png"),
        ("batch.sh", ["nowhere.jsonl"], "there is no file nowhere.jsonl"),
        ("gke.sh", ["fly"], "say what to do"),
        ("gke.sh", ["run"], "what shall run?"),
    ],
)
def test_refused(env, script, arguments, words):
    done = start(script, "--dry-run", *arguments, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert "gcloud" not in done.stdout


def test_missing_settings_are_listed(tmp_path):
    empty = tmp_path / "empty.env"
    empty.touch()
    done = start("create.sh", "--zone=z", env=empty)
    assert done.returncode == 2
    assert "set PROJECT NAME CAPACITY in" in done.stderr
    done = start("create.sh", env=tmp_path / "absent.env")
    assert f"there is no file {tmp_path / 'absent.env'}" in done.stderr


def test_the_example_names_every_setting():
    named = set(re.findall(r"^([A-Z_]+)=", (SCRIPTS / "env.example").read_text(), re.MULTILINE))
    known = re.search(r"^SETTINGS=\((.*)\)$", (SCRIPTS / "common.sh").read_text(), re.MULTILINE)[1].split()
    assert named == set(known)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("create.sh", []), ("delete.sh", []), ("stage.sh", ["model"]), ("gke.sh", ["create"]), ("gke.sh", ["delete"])],
)
def test_nothing_is_spent_or_deleted_unasked(env, notes, script, arguments):
    (env.parent / "model").mkdir()
    (env.parent / "model" / "config.json").write_text("{}")
    done = start(script, *arguments, env=env, path=notes.path)
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert notes.calls == []


def test_dry_runs_run_nothing(env, notes):
    (env.parent / "q.jsonl").touch()
    for script, *arguments in (
        ["create.sh"],
        ["install.sh", "--accelerator", "v6e-16"],
        ["chat.sh", "hello"],
        ["batch.sh", "q.jsonl"],
        ["profile.sh"],
        ["delete.sh"],
        ["gke.sh", "create"],
        ["gke.sh", "run", "--", "chat", "hello"],
    ):
        assert start(script, "--dry-run", *arguments, env=env, path=notes.path).returncode == 0
    assert notes.calls == []


# With a gcloud that takes notes.


def test_create_waits_until_the_slice_is_there(env, notes):
    first = f"[[ $(grep -c describe {notes.log}) == 1 ]]"
    notes.answer(f"case $* in *describe*) {first} && echo PROVISIONING || echo ACTIVE ;; esac")
    notes.answer("", "sleep")
    done = start("create.sh", "--yes", env=env, path=notes.path)
    assert done.returncode == 0, done.stderr
    assert [call.split()[:5] for call in notes.calls] == [
        "gcloud compute tpus queued-resources create".split(),
        "gcloud compute tpus queued-resources describe".split(),
        ["sleep", "30"],
        "gcloud compute tpus queued-resources describe".split(),
    ]
    notes.answer("echo FAILED")
    done = start("create.sh", "--yes", env=env, path=notes.path)
    assert done.returncode == 2
    assert "n is FAILED" in done.stderr


def test_a_group_runs_on_every_instance(env, notes):
    notes.answer('case $* in *list-instances*) printf "n-a\\nn-b\\nn-c\\nn-d\\n" ;; esac')
    done = start("chat.sh", "--accelerator", "v6e-16", "Who?", env=env, path=notes.path)
    assert done.returncode == 0, done.stderr
    assert sorted(call.split()[3] for call in notes.calls if " ssh " in call) == ["n-a", "n-b", "n-c", "n-d"]
    notes.answer('case $* in *list-instances*) printf "n-a\\nn-b\\nn-c\\nn-d\\n" ;; *n-c*) exit 3 ;; esac')
    assert start("chat.sh", "--accelerator", "v6e-16", "Who?", env=env, path=notes.path).returncode != 0
    notes.answer('case $* in *list-instances*) echo "n-a" ;; esac')
    done = start("chat.sh", "--accelerator", "v6e-16", "Who?", env=env, path=notes.path)
    assert done.returncode == 2
    assert "n has 1 of 4 instances" in done.stderr


def test_a_failing_command_stops_the_script(env, notes):
    notes.answer("exit 1")
    done = start("create.sh", "--yes", "--accelerator", "v6e-16", env=env, path=notes.path)
    assert done.returncode == 1
    assert len(notes.calls) == 1


def test_worker_setup(tmp_path, notes):
    """On a worker whose uv, gcsfuse and mountpoint take notes."""
    home, here = tmp_path / "home", tmp_path / "here"
    (home / ".local" / "bin").mkdir(parents=True)
    here.mkdir()
    shutil.copy(SCRIPTS / "worker_setup.sh", here)
    (here / "libtpu_flags.env").write_text('LIBTPU_FLAGS_v5e=""\nLIBTPU_FLAGS_v6e="--xla_a=true --xla_b=2"\n')
    (tmp_path / "internvl-jax").mkdir()
    subprocess.run(["tar", "-czf", here / "internvl-jax.tar.gz", "-C", tmp_path, "internvl-jax"], check=True)
    notes.answer("", "gcsfuse")
    notes.answer("exit 1", "mountpoint")
    make_python = f'[[ $1 == venv ]] && mkdir -p "$4/bin" && ln -sf {notes.path}/python "$4/bin/python"; true'
    notes.answer(make_python, "uv")
    notes.answer("", "python")
    shutil.move(notes.path / "uv", home / ".local" / "bin" / "uv")
    environment = {"HOME": str(home), "PATH": f"{notes.path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(here / "worker_setup.sh"), "v6e", "b"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = home / "internvl"
    assert f"uv pip install --python {folder}/venv/bin/python --quiet {folder}/internvl-jax[tpu]" in notes.calls
    assert f"gcsfuse --implicit-dirs b {folder}/bucket" in notes.calls
    shown = subprocess.run(
        ["bash", "-c", f". {folder}/env && echo $LIBTPU_INIT_ARGS && echo $JAX_COMPILATION_CACHE_DIR && echo $PATH"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[0] == "--xla_a=true --xla_b=2"
    assert shown[1] == f"{folder}/bucket/xla-cache"
    assert shown[2].startswith(f"{folder}/venv/bin:")
