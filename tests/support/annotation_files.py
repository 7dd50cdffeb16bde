"""Data sets written for tests, and their damage."""

import json

import numpy as np
from PIL import Image


def write_data(directory, count=40, name="a", every_other_image=True, **values):
    """A data set of `count` conversations whose answers are their numbers; every second one has an image."""
    rng = np.random.default_rng(count)
    lines = []
    for number in range(count):
        turns = [{"from": "human", "value": "Which?" + " word" * int(rng.integers(0, 12))}]
        turns += [{"from": "gpt", "value": f"{name} {number}"}]
        entry = {"id": number, "conversations": turns}
        if every_other_image and number % 2:
            file = f"{name}{number}.png"
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(directory / file)
            entry["image"] = file
        lines.append(json.dumps(entry))
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: {"root": "", "annotation": f"{name}.jsonl", "data_augment": True, "length": count, **values}}


def damage(directory):
    lines = (directory / "a.jsonl").read_text().splitlines()
    lines[2] = "{"
    lines[5] = lines[5].replace("Which?", "Which? <image> <image>")
    (directory / "a7.png").unlink()
    (directory / "a9.png").write_bytes((directory / "a9.png").read_bytes()[:500])
    (directory / "a.jsonl").write_text("\n".join(lines) + "\n")
    return {"annotation": 3, "placeholders": 6, "image": 8, "image ": 10}
