"""Batch inference in two processes."""

from support.parrot import read_lines, write_lines
from support.paths import DATA
from support.processes import make_model, run_two

from internvl_jax.inference import offline
from internvl_jax.inference.loading import load

IMAGES = DATA / "internvl_chat_v1_1" / "images"


def test_two_processes(tmp_path):
    """A model on each process, then one over both: the answers are those of one process."""
    make_model(tmp_path / "model")
    rows = [{"question": f"Question number {n}?"} for n in range(3)]
    rows[1]["images"] = [str(IMAGES / "rgb.png")]
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    offline.run(
        load(tmp_path / "model", dtype="float32"),
        offline.prepare(questions, tmp_path / "alone.jsonl"),
        batch_size=2,
        max_new_tokens=4,
    )
    run_two("answers", tmp_path, devices=1)
    alone = read_lines(tmp_path / "alone.jsonl")
    assert [answer["id"] for answer in alone] == [1, 2, 3]
    assert len({answer["answer"] for answer in alone}) > 1
    assert read_lines(tmp_path / "each.jsonl") == read_lines(tmp_path / "both.jsonl") == alone
