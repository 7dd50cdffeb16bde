"""Small data folders in the benchmarks' official formats, from the replayed cases of the original scripts."""

import base64
import io
import json

from PIL import Image

from internvl_jax.evaluation.scorers.yes_no import COGNITION, PERCEPTION


def png(size=(30, 20), color=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def whole(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def table(path, rows, columns=None):
    """A TSV in which missing values are empty, and images base64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or list(rows[0])
    written = ["\t".join(columns)]
    for row in rows:
        cells = ("" if row.get(name) is None else str(row[name]) for name in columns)
        written.append("\t".join(f'"{cell}"' if "\n" in cell else cell for cell in cells))
    path.write_text("\n".join(written) + "\n", encoding="utf-8")


def image_base64():
    return base64.b64encode(png()).decode()


def mme_files(root, records, others=("x.png", "Is it?", "Yes")):
    (root / "mme").mkdir(parents=True)
    for task in PERCEPTION + COGNITION:
        own = ["\t".join((r["image"], r["question"], r["gt"])) for r in records if r["task"] == task]
        filler = ["\t".join(others), "\t".join((others[0], "Is it not?", "No"))]
        (root / "mme" / f"{task}.txt").write_text("\n".join(own or filler) + "\n")


FAST = ("--max-new-tokens", "6", "--num-beams", "1", "--batch-size", "4")  # options of a run


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
