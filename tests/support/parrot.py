"""A stand-in for Chat in tests of batch inference, and JSONL files."""

import json
import time

from internvl_jax.inference.replies import Reply


class Parrot:
    """Answers as Chat.batch_chat does, and records the batches.

    broken: a question whose batch fails. pause: seconds per batch.
    """

    def __init__(self, name="parrot", broken="", pause=0.0):
        self.name, self.broken, self.pause, self.batches = name, broken, pause, []

    def check_ready(self):
        pass

    def batch_chat(self, questions, images, **options):
        if self.broken and self.broken in questions:
            raise ValueError(f"question {questions.index(self.broken) + 1}: unreadable")
        time.sleep(self.pause)
        self.batches.append((questions, images, options))
        return [Reply(f"{question}! ü", [1, 2], "stop", [], len(question), {}) for question in questions]


def write_lines(path, rows):
    """Write strings as they are, and other values as JSON, one per line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
