"""One of the two processes that test_distributed.py and test_batch.py start, with virtual CPU devices.

    python two_processes.py PROCESS_ID PORT COMMAND DIRECTORY

Prints one JSON object as its last line.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from support.mesh_training_cases import ADAMW, CONFIG, FULL
from support.paths import DATA
from support.training_cases import Shares, run

from internvl_jax import checkpoint
from internvl_jax.checkpoint.chunks import LeafFile
from internvl_jax.inference import offline
from internvl_jax.inference.loading import load
from internvl_jax.models import param_sharding
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe

IMAGES = DATA / "internvl_chat_v1_1" / "images"
QUESTIONS = ["What is in this picture?", "Name two colours.", "And in this one?"]
QUESTION_IMAGES = [[IMAGES / "rgb.png"], [], [IMAGES / "gray.png"]]


def answer(chat):
    """Greedy tokens of three questions, two of them with an image."""
    with jax.default_matmul_precision("highest"):
        replies = chat.batch_chat(QUESTIONS, QUESTION_IMAGES, max_new_tokens=6, eos_token_ids=())
    return [reply.tokens for reply in replies]


def meshes():
    """fsdp between the processes and tensor within them; and tensor between them."""
    devices = np.array(jax.devices()).reshape(2, 2, 2)  # process, pair, device
    crossed = list(devices.transpose(1, 0, 2).reshape(-1))
    return {
        "fsdp": mesh_lib.make_mesh("fsdp=2,tensor=4"),
        "tensor": mesh_lib.make_mesh("data=2,tensor=4", crossed),
    }


def chat(directory):
    """Load and save on both meshes, answer on the second."""
    results = {}
    for name, mesh in meshes().items():
        before, announced = checkpoint.bytes_read(), []
        model = load(directory / "model", mesh=mesh, dtype="float32", progress=partial(report, announced))
        results[name] = {"read": checkpoint.bytes_read() - before, "announced": announced[-1]}
        unpad = partial(param_sharding.unpad_params, config=model.config)
        places = param_sharding.storage_shardings(jax.eval_shape(unpad, model.params), mesh)
        true_shapes = jax.jit(unpad, out_shardings=places)(model.params)
        checkpoint.save(directory / name, true_shapes)
        results[name]["whole"] = any(leaf.is_fully_addressable for leaf in jax.tree.leaves(true_shapes))
    return {**results, "tokens": answer(model)}


def report(announced, done, total, what):
    announced.append((done, total))


def refused(directory):
    """Errors of one process reach the other: the directory exists, and one process fails while it writes."""
    messages = []
    params = {"mlp1": {"norm": {"scale": np.ones(4, np.float32)}}}
    for target, leaf in (("taken", 1.0), ("fails", "x" if jax.process_index() == 1 else 1.0)):
        try:
            checkpoint.save(
                directory / target, jax.tree.map(lambda x, leaf=leaf: x * leaf if leaf == 1.0 else Bad(x), params)
            )
            messages.append("")
        except (ValueError, OSError) as error:
            messages.append(str(error))
    checkpoint.save(directory / "good", {"scale": np.ones(4, np.float32)})
    if jax.process_index() == 1:  # one process alone meets a damaged chunk
        LeafFile.read = lambda *_: Bad.__array__(None)
    try:
        checkpoint.load(directory / "good", checkpoint.stored_tree(directory / "good"))
    except (ValueError, OSError) as error:
        messages.append(str(error))
    return {"messages": messages}


class Bad:
    """An array that cannot be read."""

    def __init__(self, like):
        self.shape, self.dtype = like.shape, like.dtype

    def __array__(self, *_, **__):
        raise OSError("cable unplugged")


def answers(directory):
    """Batch inference: a model per process, then one model over both."""
    options = {"max_new_tokens": 4}
    for name, mesh in (("each", None), ("both", "tensor=2")):
        job = offline.prepare(directory / "questions.jsonl", directory / f"{name}.jsonl", mesh)
        offline.run(load(directory / "model", mesh=job.mesh, dtype="float32"), job, batch_size=2, **options)
    return {}


def turns():
    """Devices of the processes by turns."""
    mine = jax.devices()
    return [mine[0], mine[2], mine[1], mine[3]]


def run_training(path, mesh, share, **options):
    batches = Shares(CONFIG, share, **options)
    placement = MeshPlacement(CONFIG, mesh)
    recipe = Recipe("full", FULL, ADAMW, 2, 48)
    done = run(path, 4, recipe, placement=placement, batches=batches, save_every=4)
    return {"step": done.step, "finished": done.finished, "parts": placement.row_shards, "batches": batches.next}


def train(directory):
    """Training where rows of the processes take turns on the mesh, stopped by one process and resumed."""
    process, fsdp = jax.process_index(), mesh_lib.make_mesh("fsdp=4", turns())
    return {
        "stopped": run_training(directory / "parts", fsdp, process, stop_at=None if process == 0 else 1),
        "resumed": run_training(directory / "parts", fsdp, process),
    }


def train_tensor(directory):
    """With a tensor axis over both processes, which then bring the same rows; and where rows were brought otherwise."""
    process, tensor = jax.process_index(), mesh_lib.make_mesh("data=2,tensor=2", turns())
    results = {"tensor": run_training(directory / "tensor", tensor, None)}
    run_training(directory / "parts", mesh_lib.make_mesh("fsdp=4", turns()), process, stop_at=1)
    try:
        run_training(directory / "parts", tensor, None)
    except ValueError as error:
        results["refused"] = str(error)
    return results


def train_elsewhere(directory):
    """Resumed on another mesh, on which each process has a tensor axis of its own."""
    process = jax.process_index()
    where = mesh_lib.make_mesh("fsdp=4", turns()), mesh_lib.make_mesh("data=2,tensor=2")
    stop_at = None if process == 0 else 1
    return {
        "stopped": run_training(directory / "parts", where[0], process, stop_at=stop_at),
        "resumed": run_training(directory / "parts", where[1], process),
    }


def main():
    process_id, port, command, directory = sys.argv[1:]
    distributed.start(f"127.0.0.1:{port}", 2, int(process_id), wait_seconds=60)
    print(json.dumps(globals()[command](Path(directory))))


if __name__ == "__main__":
    main()
