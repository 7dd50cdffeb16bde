"""Start-up of several processes; two real ones that load, answer and save together."""

import ctypes
import os
import signal
import socket
import threading

import jax
import numpy as np
import pytest
from support.processes import free_port, make_model, run_two

from internvl_jax import checkpoint
from internvl_jax.inference.loading import load
from internvl_jax.parallel import distributed
from internvl_jax.parallel.distributed import Cluster, DistributedError, detect, roll_call


def test_two_processes_equal_one(tmp_path):
    from support import two_processes

    params = make_model(tmp_path / "model")
    before = checkpoint.bytes_read()
    alone = load(tmp_path / "model", dtype="float32")
    whole = checkpoint.bytes_read() - before
    expected = two_processes.answer(alone)
    first, second = run_two("chat", tmp_path)
    count = alone.config.num_vision_layers
    params["vision_model"]["layers"] = jax.tree.map(lambda leaf: leaf[:count], params["vision_model"]["layers"])
    assert first["tokens"] == second["tokens"] == expected
    for name in ("fsdp", "tensor"):
        for result in (first[name], second[name]):
            assert not result["whole"]
            assert 0.45 * whole < result["read"] < 0.6 * whole, (result["read"], whole)
            done, total = result["announced"]
            assert done == total
            assert 0 <= result["read"] - total < 10_000  # beside the chunks, every leaf's .zarray
        saved = checkpoint.load(tmp_path / name, checkpoint.stored_tree(tmp_path / name))
        jax.tree.map(np.testing.assert_array_equal, saved, params)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["params"]


def test_an_error_on_one_process_stops_both(tmp_path):
    (tmp_path / "taken" / "params").mkdir(parents=True)
    first, second = run_two("refused", tmp_path)
    assert "exists already" in first["messages"][0]
    assert "process 0" in second["messages"][0]
    assert "exists already" in second["messages"][0]
    assert first["messages"][1] == "stopped here because of an error elsewhere: process 1: cable unplugged"
    assert second["messages"][1] == "cable unplugged"
    assert [len(one["messages"]) for one in (first, second)] == [3, 3]
    assert first["messages"][2] == "stopped here because of an error elsewhere: process 1: cable unplugged"
    assert not (tmp_path / "fails").exists()


# Detection.


def no_metadata(attribute):
    raise AssertionError(f"asked for {attribute}")


def test_alone():
    assert detect(environ={}) is None
    assert detect(environ={"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert detect(environ={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None  # sbatch, not srun


def test_arguments_come_first():
    environ = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}
    cluster = detect("10.0.0.1:1234", 3, 2, environ=environ, metadata=no_metadata)
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("10.0.0.1:1234", 3, 2)
    with pytest.raises(DistributedError, match="--coordinator, --process-id must be given too"):
        detect(num_processes=2, environ={})
    with pytest.raises(DistributedError, match="process 2 of 2 does not exist"):
        detect("a:1", 2, 2, environ={})
    with pytest.raises(DistributedError, match=r"'10\.0\.0\.1' must be HOST:PORT"):
        detect("10.0.0.1", 2, 1, environ={})


def test_gke():
    environ = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc"}
    cluster = detect(environ=environ, metadata=no_metadata)
    assert cluster == Cluster(
        "GKE (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES)", "w-0.svc:8482", 2, 1, {0: "w-0.svc", 1: "w-1.svc"}
    )
    assert "process 1 of 2" in cluster.describe()
    addresses = {"TPU_WORKER_ID": "0", "TPU_PROCESS_ADDRESSES": "10.1.0.1:8476,10.1.0.2:8476"}
    assert detect(environ=addresses).hosts == {0: "10.1.0.1", 1: "10.1.0.2"}
    with pytest.raises(DistributedError, match="worker id must be a number, it is 'x'"):
        detect(environ={**environ, "TPU_WORKER_ID": "x"})


def test_gke_multislice():
    environ = {
        "TPU_WORKER_ID": "1",
        "TPU_WORKER_HOSTNAMES": "b-0,b-1",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "a-0:8080",
    }
    cluster = detect(environ=environ)
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("a-0:8482", 6, 5)
    assert cluster.hosts == {4: "b-0", 5: "b-1"}
    assert "3 slices, this is slice 2" in cluster.source
    del environ["MEGASCALE_COORDINATOR_ADDRESS"]
    with pytest.raises(DistributedError, match="MEGASCALE_COORDINATOR_ADDRESS is not set"):
        detect(environ=environ)


@pytest.mark.parametrize("endpoints", ["unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", "10.0.0.2,10.0.0.3"])
def test_compute_engine(endpoints):
    values = {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'z'\n"}
    cluster = detect(environ={}, metadata=values.get)
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("10.0.0.2:8482", 2, 1)
    values["tpu-env"] = (
        "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1'\n"
    )
    cluster = detect(environ={}, metadata=values.get)
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("10.9.0.1:8482", 4, 3)
    assert detect(environ={}, metadata=lambda attribute: None) is None  # a Google VM that is no TPU worker


@pytest.mark.parametrize(
    ("nodes", "first"), [("node007", "node007"), ("a,b", "a"), ("tpu[003-005,9],x", "tpu003"), ("t[1,2]", "t1")]
)
def test_slurm(nodes, first):
    environ = {
        "SLURM_JOB_ID": "5000",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NODELIST": nodes,
    }
    cluster = detect(environ=environ)
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == (f"{first}:62344", 2, 1)
    assert detect(environ={**environ, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


# The roll call.


def call(*processes, wait=10.0, hosts=None):
    """Roll calls of (id, count) pairs, each in a thread; returns what each raised, "" for nothing."""
    port, results = free_port(), {}

    def one(index, number, count):
        try:
            roll_call(Cluster("a test", f"127.0.0.1:{port}", count, number, hosts or {}), wait)
            results[index] = ""
        except DistributedError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(processes))]


def test_all_present():
    assert call((2, 3), (0, 3), (1, 3)) == ["", "", ""]


def test_missing_processes_are_named():
    for message in call((0, 4), (2, 4), wait=1.0, hosts={1: "worker-1", 3: "worker-3"}):
        assert "after 1 s 2 of 4 processes are missing: 1 (worker-1), 3 (worker-3)" in message
        assert f"present: 0 ({socket.gethostname()}), 2 ({socket.gethostname()})" in message
        assert "detected: a test; this is process" in message


def test_process_0_is_missing():
    (message,) = call((1, 2), wait=0.6)
    assert "process 0 was not reached at 127.0.0.1:" in message
    assert "refused" in message


def test_processes_that_do_not_fit_together():
    assert all("both started as process 1" in message for message in call((0, 3), (1, 3), (1, 3)))
    for message in call((0, 3), (1, 2)):
        assert "process 1 of 2" in message
        assert "one of 3" in message
    mine = {"id": 0, "count": 2, "host": "a", "jax": "1"}
    other = {"id": 1, "count": 2, "host": "b", "jax": "2"}
    assert "b runs jax 2, a jax 1: install the same" in distributed.disagreement({0: mine}, mine, other)


def test_strangers_are_ignored():
    port = free_port()
    clusters = [Cluster("a test", f"127.0.0.1:{port}", 2, number, {}) for number in range(2)]
    caller = threading.Thread(target=roll_call, args=(clusters[0], 10.0))
    caller.start()
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": "hello"}\n', b"[1]\n"):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(words)
                    break
            except ConnectionRefusedError:
                pass
    roll_call(clusters[1], 10.0)
    caller.join(timeout=10)
    assert not caller.is_alive()


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DistributedError, match=f"port {port} cannot be opened"):
            roll_call(Cluster("a test", f"127.0.0.1:{port}", 2, 0, {}), 5.0)


def test_a_handler_that_cpp_has_replaced_comes_back():
    """As jax's preemption service replaces the one for SIGTERM."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("python"))
    try:
        ctypes.CDLL(None).signal(signal.SIGUSR1, 1)  # SIG_IGN, behind Python's back
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == []
        distributed.restore_handler(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == ["python"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_errors_of_any_text_reach_the_others(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "is_multi_process", lambda: True)
    monkeypatch.setattr(distributed, "all_gather", lambda message: sent.append(message) or [message, b""])
    with pytest.raises(ValueError, match="\ud800"), distributed.barrier():
        raise ValueError("\ud800")
    assert len(sent) == 1
    assert b"ud800" in sent[0]


def test_collectives_of_one_process():
    assert distributed.all_gather(b"x") == [b"x"]
    with pytest.raises(KeyError), distributed.barrier():
        raise KeyError("an error keeps its type")
