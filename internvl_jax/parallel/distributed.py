"""Runs of several processes: start-up, and collectives on the host.

A pod slice is several hosts, and the same command must start on all of them. jax.distributed waits five minutes for
missing processes, then ends from C++ with a stack trace that names none of them. So a roll call comes first: the
processes connect to the coordinator's port, process 0 reports which are missing, and jax.distributed starts only when
all are present.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PORT = 8482  # the port that jax itself uses on Cloud TPU
WAIT_SECONDS = 300
_RETRY_SECONDS = 0.5
_GREETING = "internvl-jax"


class DistributedError(ValueError):
    """Processes did not find each other; the message says which are missing and what was detected."""


@dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
        source: where this was detected, for messages.
        coordinator: host:port of process 0.
        num_processes: their number.
        process_id: the number of this one, from 0.
        hosts: host names by process id, as far as they are known.
    """

    source: str
    coordinator: str
    num_processes: int
    process_id: int
    hosts: Mapping[int, str]

    def describe(self) -> str:
        """One line for messages."""
        return (
            f"detected: {self.source}; this is process {self.process_id} of {self.num_processes} on "
            f"{socket.gethostname()}, the coordinator is {self.coordinator}"
        )


# Detection.


def detect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    metadata: Callable[[str], str | None] | None = None,
) -> Cluster | None:
    """Detect the processes of this run from the arguments, else from the environment.

    In this order: the three arguments; GKE (TPU_WORKER_ID with TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES); the
    metadata server of a Cloud TPU VM, where there are TPU chips and no TPU_SKIP_MDS_QUERY; Slurm's srun. MEGASCALE_*
    adds the slices of a multislice job to both of Google's.

    Args:
        coordinator: host:port of process 0. The three arguments are given together or not at all.
        num_processes: the number of processes.
        process_id: the number of this process.
        environ: environment variables.
        metadata: reads an attribute of the metadata server (for tests).

    Returns:
        The cluster; None for a single process.

    Raises:
        DistributedError: arguments or variables contradict each other.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        return _cluster("--coordinator, --num-processes and --process-id", coordinator, num_processes, process_id, {})
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        raise DistributedError(
            f"--{', --'.join(missing)} must be given too: the coordinator's host:port (the same on every process), "
            "the number of processes, and this one's number from 0"
        )
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if workers and "TPU_WORKER_ID" in environ:
        hosts = [worker.strip().rsplit(":", 1)[0] for worker in workers.split(",")]
        return _tpu_slices("GKE (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES)", environ["TPU_WORKER_ID"], hosts, environ.get)
    if metadata is None and "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu_chips():
        metadata = _read_metadata
    if metadata is not None and (worker_id := metadata("agent-worker-number")) is not None:
        # Two formats: "host,host" and, older, "name:id:ip,name:id:ip".
        hosts = [worker.split(":")[-1] for worker in (metadata("worker-network-endpoints") or "").split(",")]
        tpu_env = dict(re.findall(r"^(\w+)\s*:\s*'?(.*?)'?\s*$", metadata("tpu-env") or "", re.MULTILINE))
        return _tpu_slices(
            "Cloud TPU VM (metadata server)", worker_id, hosts, lambda name: environ.get(name) or tpu_env.get(name)
        )
    return _slurm(environ)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """The processes that srun started; None where it did not, or started one."""
    if not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"} <= set(environ):
        return None
    source, nodes = "Slurm (SLURM_PROCID, SLURM_STEP_NODELIST)", environ["SLURM_STEP_NODELIST"]
    count = _number("SLURM_STEP_NUM_TASKS", environ["SLURM_STEP_NUM_TASKS"])
    if count == 1:
        return None
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise DistributedError(f"{source}: the node list {nodes!r} is not understood; pass --coordinator instead")
    host = first.group(1) + (first.group(2) or "")
    port = 61440 + _number("SLURM_JOB_ID", environ["SLURM_JOB_ID"]) % 4096  # jobs that share a node do not collide
    return _cluster(source, f"{host}:{port}", count, _number("SLURM_PROCID", environ["SLURM_PROCID"]), {})


def _tpu_slices(source: str, worker_id: str, hosts: list[str], get: Callable[[str], str | None]) -> Cluster | None:
    """One process per TPU host; with MEGASCALE_* there are several slices of as many hosts each."""
    slices = _number("MEGASCALE_NUM_SLICES", get("MEGASCALE_NUM_SLICES") or "1")
    slice_id = _number("MEGASCALE_SLICE_ID", get("MEGASCALE_SLICE_ID") or "0")
    if len(hosts) * slices == 1:
        return None
    coordinator = hosts[0]
    if slices > 1:
        source += f" with MEGASCALE_* ({slices} slices, this is slice {slice_id})"
        address = get("MEGASCALE_COORDINATOR_ADDRESS")
        if not address:
            raise DistributedError(f"{source}: MEGASCALE_COORDINATOR_ADDRESS is not set, so the slices cannot meet")
        coordinator = address.split(":")[0]
    first = slice_id * len(hosts)
    return _cluster(
        source,
        f"{coordinator}:{PORT}",
        len(hosts) * slices,
        first + _number("the worker id", worker_id),
        dict(enumerate(hosts, first)),
    )


def _cluster(source: str, coordinator: str, count: int, process_id: int, hosts: Mapping[int, str]) -> Cluster:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise DistributedError(f"{source}: the coordinator {coordinator!r} must be HOST:PORT")
    if not 0 <= process_id < count:
        raise DistributedError(f"{source}: process {process_id} of {count} does not exist: they count from 0")
    return Cluster(source, coordinator, count, process_id, hosts)


def _number(name: str, value: str) -> int:
    if not value.strip().isdigit():
        raise DistributedError(f"{name} must be a number, it is {value!r}")
    return int(value)


def _has_tpu_chips() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _read_metadata(attribute: str) -> str | None:
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{attribute}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return None


# Start-up.


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    wait_seconds: float = WAIT_SECONDS,
) -> Cluster | None:
    """Join the other processes, if there are any. Call it before anything uses a device.

    Args:
        coordinator: address of process 0, as `detect` takes it.
        num_processes: the number of processes, as `detect` takes it.
        process_id: the number of this process, as `detect` takes it.
        wait_seconds: how long to wait for the others.

    Returns:
        The cluster; None for a single process.

    Raises:
        DistributedError: some processes are missing after `wait_seconds`; or two have the same number, expect different
            numbers of processes, or run different versions of jax.
    """
    cluster = detect(coordinator, num_processes, process_id)
    if cluster is None:
        return None
    deadline = time.monotonic() + wait_seconds
    roll_call(cluster, wait_seconds)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster_detection_method="deactivate",  # only what `detect` found
        initialization_timeout=max(30, int(deadline - time.monotonic())),
    )
    restore_handler(signal.SIGTERM)  # which jax's preemption service has replaced
    return cluster


def restore_handler(number: int) -> None:
    """Install Python's handler of a signal again, after C++ code has replaced it."""
    handler = signal.getsignal(number)
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(number, handler)


def roll_call(cluster: Cluster, wait_seconds: float) -> None:
    """Wait until all processes have connected to process 0.

    Raises:
        DistributedError: on every process that is present, if others are missing after `wait_seconds` or do not match.
    """
    deadline = time.monotonic() + wait_seconds
    hello = {
        "greeting": _GREETING,
        "id": cluster.process_id,
        "count": cluster.num_processes,
        "host": socket.gethostname(),
        "jax": jax.__version__,
    }
    if cluster.process_id == 0:
        problem = _collect_processes(cluster, hello, deadline, wait_seconds)
    else:
        problem = _report_to_process_0(cluster, hello, deadline, wait_seconds)
    if problem:
        raise DistributedError(f"{problem}\n{cluster.describe()}")


def _collect_processes(cluster: Cluster, hello: dict[str, Any], deadline: float, wait_seconds: float) -> str:
    """Process 0: wait for all others and send them the verdict. Returns the problem, or ""."""
    port = int(cluster.coordinator.rsplit(":", 1)[1])
    present, problem = {0: hello}, ""
    answers: list[socket.socket] = []
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=cluster.num_processes, dualstack_ipv6=dual)
    except OSError as error:
        return f"port {port} cannot be opened ({error}): does another run still use it? Choose another --coordinator"
    with server:
        while not problem and len(present) < cluster.num_processes:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                other = json.loads(_read_line(connection))
                if other["greeting"] != _GREETING:
                    raise ValueError(other)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    problem = _missing(cluster, present, wait_seconds)
                continue
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # a port scanner, or a process that gave up
                continue
            answers.append(connection)
            problem = disagreement(present, hello, other)
            present[other["id"]] = other
        verdict = json.dumps({"problem": problem}) + "\n"
        for connection in answers:
            with connection:
                try:
                    connection.sendall(verdict.encode())
                    connection.recv(1)  # the other side closes first, so that the port is free for jax at once
                except OSError:
                    pass
    return problem


def _missing(cluster: Cluster, present: Mapping[int, Mapping[str, Any]], wait_seconds: float) -> str:
    absent = [number for number in range(cluster.num_processes) if number not in present]
    names = ", ".join(f"{n} ({cluster.hosts[n]})" if n in cluster.hosts else str(n) for n in absent[:20])
    more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
    there = ", ".join(f"{number} ({hello['host']})" for number, hello in sorted(present.items())[:20])
    return (
        f"after {wait_seconds:.0f} s {len(absent)} of {cluster.num_processes} processes are missing: {names}{more}; "
        f"present: {there}. The same command must start on every host; look there for an error, and for a firewall "
        f"that closes port {cluster.coordinator.rsplit(':', 1)[1]}"
    )


def disagreement(present: Mapping[int, Mapping[str, Any]], mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why two processes cannot run together, as their greetings show; "" if they can."""
    if other["count"] != mine["count"]:
        return (
            f"{other['host']} was started as process {other['id']} of {other['count']}, {mine['host']} as one of "
            f"{mine['count']}: start all with the same number"
        )
    if other["id"] in present:
        return f"{present[other['id']]['host']} and {other['host']} were both started as process {other['id']}"
    if other["jax"] != mine["jax"]:
        return (
            f"{other['host']} runs jax {other['jax']}, {mine['host']} jax {mine['jax']}: install the same version on "
            "every host, or their compiled programs will not fit together"
        )
    return ""


def _report_to_process_0(cluster: Cluster, hello: dict[str, Any], deadline: float, wait_seconds: float) -> str:
    """Another process: connect to process 0 and receive the verdict. Returns the problem, or ""."""
    host, port = cluster.coordinator.rsplit(":", 1)
    failure = "nothing was tried"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall((json.dumps(hello) + "\n").encode())
                # Process 0 counts its own seconds: a little longer than ours, if it started later.
                connection.settimeout(max(0.01, deadline - time.monotonic()) + wait_seconds)
                return json.loads(_read_line(connection))["problem"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            failure = str(error) or type(error).__name__
            time.sleep(_RETRY_SECONDS)
    return (
        f"process 0 was not reached at {cluster.coordinator} within {wait_seconds:.0f} s ({failure}): is the command "
        "running there, is the name right, does a firewall close the port?"
    )


def _read_line(connection: socket.socket) -> str:
    with connection.makefile("r", encoding="utf-8") as lines:
        line = lines.readline(10_000)
    if not line.endswith("\n"):
        raise ConnectionError("the connection was closed")
    return line


# Collectives of the host.


def is_multi_process() -> bool:
    """Whether other processes take part. Does not start a backend in a single process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_process_0() -> bool:
    """Whether this is process 0, which prints and writes the outputs of all."""
    return not is_multi_process() or jax.process_index() == 0


def all_gather(message: bytes) -> list[bytes]:
    """Gather the messages of all processes, in the order of processes.

    All processes must call it. It is a barrier too.
    """
    if not is_multi_process():
        return [message]
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes() for row, length in zip(gathered, lengths)]


def broadcast_from_process_0(message: bytes) -> bytes:
    """Return process 0's message on all processes, which must all call it."""
    return all_gather(message if is_process_0() else b"")[0]


@contextmanager
def barrier() -> Iterator[None]:
    """Wait for all processes at the end of the block; an error on one is raised on all, so that none waits forever.

    Raises:
        DistributedError: on a process without an error, where others have one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if is_multi_process():
        problems = all_gather(str(error or "").encode(errors="backslashreplace") or (b"error" if error else b""))
        failed = [f"process {number}: {text.decode()}" for number, text in enumerate(problems) if text]
        if error is None and failed:
            raise DistributedError("stopped here because of an error elsewhere: " + "; ".join(failed[:3]))
    if error is not None:
        raise error


@contextmanager
def process_0_first() -> Iterator[bool]:
    """Run a block between two barriers; yields whether this is process 0, whose work the others wait for."""
    with barrier():
        pass
    with barrier():
        yield is_process_0()
