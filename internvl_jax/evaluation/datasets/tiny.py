"""Small data sets in the benchmarks' official file formats, with nano's held-out images and questions.

    python -m internvl_jax.evaluation.datasets.tiny DIR

With them `internvl-jax eval` can be tried without a download, and tests run every benchmark from files to report.
Scores on them say nothing about a model.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.evaluation.datasets.items import SHORT, YES_NO
from internvl_jax.evaluation.scorers.choices import CIRCULAR, LETTERS
from internvl_jax.evaluation.scorers.mmmu import SUBJECTS
from internvl_jax.evaluation.scorers.vqa import PEOPLE
from internvl_jax.evaluation.scorers.yes_no import COGNITION, PERCEPTION
from internvl_jax.nano.render import COLOURS, QAPair, heldout_questions
from internvl_jax.utils import files

MARKER = ".internvl-jax-tiny.json"  # digests of the files that were written
COUNT = 24  # questions per data set

Asked = Sequence[tuple[np.ndarray, QAPair]]


def write(root: Path, count: int = COUNT) -> None:
    """Write every data set, laid out as in the reference's data folder. MMMU's is written if pyarrow is installed.

    Real data has the same file names, so only files that an earlier call wrote, and that are unchanged, are replaced.

    Args:
        root: Directory to write to.
        count: Questions per data set.

    Raises:
        ValueError: `root` contains other files, or changed ones; nothing is written then.
    """
    root = files.resolve(root).resolve()  # two names of one directory have one claim
    with files.claim(root):
        files.remove_leftovers(root)
        before = _written(root)
        made = files.temporary_path(root)
        shutil.rmtree(made, ignore_errors=True)
        try:
            write_benchmarks(made, count)
            digests = {path.relative_to(made).as_posix(): _digest(path) for path in made.rglob("*") if path.is_file()}
            for name, digest in digests.items():
                if _digest(root / name) not in (None, digest, before.get(name)):
                    raise ValueError(f"{root / name} has been changed since it was written: choose another directory")
            files.write_text(_make(root / MARKER), json.dumps(before | digests, indent=0))
            for name in digests:
                shutil.move(made / name, _make(root / name))  # `root` may be a link to another disk
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _written(root: Path) -> dict[str, str]:
    """Digests of the files that an earlier call wrote. Raises ValueError if the directory has other files."""
    try:
        if not os.listdir(root):
            return {}
        marker = files.read_json(root / MARKER)
    except FileNotFoundError:
        if not root.exists():
            return {}
        raise ValueError(
            f"{root} has files that this command did not write, and they may be real data: choose a new directory"
        ) from None
    except NotADirectoryError:
        raise ValueError(f"{root} is a file: choose a directory") from None
    if not isinstance(marker, dict):
        raise ValueError(f"{root / MARKER} is not from this command: choose a new directory")
    return marker


def _digest(path: Path) -> str | None:
    """Digest of a file; None if it does not exist, "" if it is not a regular file."""
    try:
        return "" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
    except (IsADirectoryError, NotADirectoryError):
        return ""


def _make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_benchmarks(root: Path, count: int) -> None:
    """Write the files of every benchmark, with `count` questions each, into `root`."""
    colors, shapes = heldout_questions("color", "en", count), heldout_questions("shape", "en", count)
    exists, words = heldout_questions("exists", "en", 2 * count), heldout_questions("word", "en", count)
    chinese = heldout_questions("color", "zh", count)
    _vqa(root, colors, words)
    _gqa(root / "gqa", shapes)
    _vizwiz(root / "vizwiz", colors)
    _scienceqa(root / "scienceqa", colors)
    _textvqa(root / "textvqa", words)
    _pope(root / "pope", root / "coco/val2014", exists, count // 3)
    _mme(root / "mme", exists)
    _tables(root / "mmbench", colors, chinese)
    _mmvet(root / "mm-vet", shapes)
    _documents(root, words)
    _chartqa(root / "chartqa", heldout_questions("count", "en", count))
    _ai2d(root / "ai2diagram", colors)
    _seed(root / "SEED", colors)
    _mmmu(root / "MMMU", colors)


def _save_image(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return path.name


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; its directory is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _people(number: int, question: QAPair) -> dict[str, Any]:
    answers = [{"answer": question.answer, "answer_id": person} for person in range(1, PEOPLE + 1)]
    return {"question_id": number, "question_type": question.kind, "answer_type": "other", "answers": answers}


def _vqa(root: Path, colors: Asked, words: Asked) -> None:
    """VQAv2 and OKVQA in the challenge's format, in which images are numbers."""
    for part, name, asked in (
        ("val2014", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", colors),
        ("test2015", "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json", words),
        ("val2014", "okvqa/OpenEnded_mscoco_val2014_questions.json", colors),
    ):
        rows = []
        for number, (pixels, question) in enumerate(asked, 1):
            _save_image(root / f"coco/{part}/COCO_{part}_{number:012d}.jpg", pixels)
            rows.append({"image_id": number, "question": question.text, "question_id": 1000 * number})
        write_json(root / name, {"questions": rows, "data_subtype": part})
    people = [_people(1000 * number, question) for number, (_, question) in enumerate(colors, 1)]
    for name in ("vqav2/v2_mscoco_val2014_annotations.json", "okvqa/mscoco_val2014_annotations.json"):
        write_json(root / name, {"annotations": people})
    every = [{"image_id": n, "question": "?", "question_id": 1000 * n} for n in range(1, len(words) + 4)]
    write_json(root / "vqav2/v2_OpenEnded_mscoco_test2015_questions.json", {"questions": every})


def _gqa(folder: Path, asked: Asked) -> None:
    questions = {}
    for number, (pixels, question) in enumerate(asked):
        _save_image(folder / f"images/n{number}.jpg", pixels)
        questions[f"20{number:06d}"] = {
            "question": question.text,
            "imageId": f"n{number}",
            "answer": question.answer,
            "isBalanced": number % 5 < 4,
            "types": {"structural": "query" if number % 2 else "choose", "semantic": "attr", "detailed": "shape"},
        }
    write_json(folder / "testdev_balanced_questions.json", questions)


def _vizwiz(folder: Path, asked: Asked) -> None:
    rows, tests = [], []
    for number, (pixels, question) in enumerate(asked):
        name = _save_image(folder / f"val/VizWiz_val_{number:08d}.jpg", pixels)
        test = _save_image(folder / f"test/VizWiz_test_{number:08d}.jpg", pixels)
        answers = [{"answer": question.answer, "answer_confidence": "yes"}] * PEOPLE
        rows.append({"image": name, "question": question.text, "answers": answers})
        tests.append({"image": test, "question": question.text})
    write_json(folder / "val.json", rows)
    write_json(folder / "test.json", tests)


def _choices(question: QAPair, number: int) -> tuple[list[str], int]:
    """Four colors including the answer, and the answer's index."""
    names = list(COLOURS) if question.language == "en" else [chinese for _, chinese in COLOURS.values()]
    others = [name for name in names if name != question.answer]
    place = number % 4
    return [*others[:place], question.answer, *others[place:3]], place


def _scienceqa(folder: Path, asked: Asked) -> None:
    """For V1-1's script and for LLaVA's."""
    rows, prompts, problems = [], [], {}
    for number, (pixels, question) in enumerate(asked):
        _save_image(folder / f"images/test/{number}/image.png", pixels)
        choices, place = _choices(question, number)
        hint = "Look at the picture." if number % 2 else ""
        image = f"data/scienceqa/images/test/{number}/image.png"
        row = {"image": image, "question": question.text, "hint": hint, "choices": choices, "answer": place}
        rows.append(row)
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))
        text = (f"Context: {hint}\n" if hint else "") + f"{question.text}\n{listed}"
        prompt = {"id": str(number), "conversations": [{"from": "human", "value": f"<image>\n{text}"}]}
        if number % 6 < 5:
            prompt["image"] = f"{number}/image.png"
        else:
            prompt["conversations"] = [{"from": "human", "value": text}]
        prompts.append(prompt)
        problems[str(number)] = {"question": question.text, "choices": choices, "answer": place}
    _lines(folder / "scienceqa_test_img.jsonl", rows)
    write_json(folder / "llava_test_CQM-A.json", prompts)
    write_json(folder / "problems.json", problems)


def _textvqa(folder: Path, asked: Asked) -> None:
    """TextVQA's own file, and LLaVA's with OCR tokens, in which ids are those of the images."""
    data, prompts = [], []
    for number, (pixels, question) in enumerate(asked):
        image = f"{number:016x}"
        _save_image(folder / f"train_images/{image}.jpg", pixels)
        answers = [question.answer] * PEOPLE
        data.append({"question_id": number, "image_id": image, "question": question.text, "answers": answers})
        text = f"{question.text}\nReference OCR token: {question.answer}\n{SHORT}"
        prompts.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    _lines(folder / "llava_textvqa_val_v051_ocr.jsonl", prompts)


def _yes_no(question: QAPair) -> str:
    return f"{question.text.removesuffix('?')} in the image?"


def _pope(folder: Path, images: Path, asked: Asked, count: int) -> None:
    prompts = []
    for part, name in enumerate(("adversarial", "random", "popular")):
        labels = []
        for number, (pixels, question) in enumerate(asked[part * count : (part + 1) * count], 1):
            image = _save_image(images / f"COCO_val2014_{part}{number:011d}.jpg", pixels)
            text = _yes_no(question)
            row = {
                "question_id": 10_000_000 * part + number,
                "image": image,
                "text": f"{text}\n{SHORT}",
                "category": name,
            }
            prompts.append(row)
            labels.append({"question_id": number, "image": image, "text": text, "label": question.answer})
        _lines(folder / f"coco/coco_pope_{name}.json", labels)
    _lines(folder / "llava_pope_test.jsonl", prompts)


def _mme(folder: Path, asked: Asked) -> None:
    """Two images per task, each with a question and its negation."""
    release = folder / "MME_Benchmark_release_version"
    for place, task in enumerate(PERCEPTION + COGNITION):
        lines = []
        for number in range(2):
            pixels, question = asked[(2 * place + number) % len(asked)]
            name = _save_image(release / f"{task}/{number:04d}.png", pixels)
            right, wrong = ("Yes", "No") if question.answer == "yes" else ("No", "Yes")
            lines.append(f"{name}\t{_yes_no(question)} {YES_NO}\t{right}")
            lines.append(f"{name}\t{_yes_no(question).replace('Is there', 'Is there not')} {YES_NO}\t{wrong}")
        (folder / f"{task}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tables(folder: Path, english: Asked, chinese: Asked) -> None:
    """MMBench's four tables, with four rotations of each question, and CCBench's, with one row per question."""
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    for file, asked, split in (
        ("mmbench_dev_20230712", english, "dev"),
        ("mmbench_dev_cn_20231003", chinese, "dev"),
        ("mmbench_test_en_20231003", english, "test"),
        ("mmbench_test_cn_20231003", chinese, "test"),
    ):
        rows = []
        for number, (pixels, question) in enumerate(asked[: len(asked) // 4]):
            texts, place = _choices(question, number)
            for turn in range(4):
                row: dict[str, Any] = dict(zip("ABCD", texts[turn:] + texts[:turn]))
                row |= {"index": turn * CIRCULAR + number, "question": question.text, "answer": "ABCD"[place - turn]}
                row |= {"hint": "A picture." if number % 2 else "", "category": question.kind, "source": "nano"}
                row |= {"l2-category": "attribute_reasoning", "comment": "", "split": split}
                rows.append({**row, "image": base64.b64encode(_png(pixels)).decode()})
        _table(folder / f"{file}.tsv", [name for name in columns if split == "dev" or name != "answer"], rows)
    rows = []
    for number, (pixels, question) in enumerate(chinese):
        texts, place = _choices(question, number)
        cells: dict[str, Any] = dict(zip("ABCD", texts))
        cells |= {"index": number, "question": question.text, "answer": "ABCD"[place]}
        cells |= {"category": "nano", "source": "nano", "image": base64.b64encode(_png(pixels)).decode()}
        rows.append(cells)
    _table(folder / "CCBench_legacy.tsv", "index question A B C D answer category image source".split(), rows)


def _table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(columns), *("\t".join(str(row[name]) for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _mmvet(folder: Path, asked: Asked) -> None:
    questions, facts = [], {}
    for number, (pixels, question) in enumerate(asked):
        image = _save_image(folder / f"images/v1_{number}.png", pixels)
        questions.append({"image": image, "text": question.text, "category": "conv", "question_id": number})
        capability = ["rec", "spat"] if number % 2 else ["rec"]
        facts[f"v1_{number}"] = {
            "imagename": image,
            "question": question.text,
            "answer": question.answer,
            "capability": capability,
        }
    _lines(folder / "llava-mm-vet.jsonl", questions)
    write_json(folder / "mm-vet.json", facts)


def _documents(root: Path, asked: Asked) -> None:
    """DocVQA's and InfographicsVQA's files: val with answers, test without."""
    for name, file, folder, key in (
        ("docvqa", "{}_v1.0.json", "docvqa/{}/documents", "image"),
        (
            "infographicsvqa",
            "infographicsVQA_{}_v1.0.json",
            "infographicsvqa/infographicsvqa_images",
            "image_local_name",
        ),
    ):
        for split in ("val", "test"):
            rows = []
            for number, (pixels, question) in enumerate(asked):
                image = _save_image(root / folder.format(split) / f"page_{number}.png", pixels)
                row = {"questionId": number, "question": question.text}
                row[key] = f"documents/{image}" if name == "docvqa" else image
                rows.append({**row, "answers": [question.answer, question.answer.upper()]} if split == "val" else row)
            write_json(root / name / file.format(split), {"dataset_split": split, "data": rows})


def _chartqa(folder: Path, asked: Asked) -> None:
    for half, part in (("human", asked[::2]), ("augmented", asked[1::2])):
        rows = []
        for number, (pixels, question) in enumerate(part):
            image = f"data/chartqa/test/png/{half}_{number}.png"
            _save_image(folder / f"test/png/{half}_{number}.png", pixels)
            row = {"image": image, "question": question.text, "question_id": number, "answer": question.answer}
            rows.append(row)
        _lines(folder / f"test_{half}.jsonl", rows)


def _lettered(question: QAPair, number: int) -> tuple[str, str]:
    """A question with its options and the instruction, and the answer's letter."""
    choices, place = _choices(question, number)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))
    return f"{question.text}\n{listed}\nAnswer with the option's letter from the given choices directly.", LETTERS[
        place
    ]


def _ai2d(folder: Path, asked: Asked) -> None:
    rows = []
    for number, (pixels, question) in enumerate(asked):
        _save_image(folder / f"AI2D_TEST/{number}.png", pixels)
        text, letter = _lettered(question, number)
        image = f"data/ai2diagram/AI2D_TEST/{number}.png"
        rows.append({"image": image, "question": text, "question_id": number, "answer": letter})
    _lines(folder / "test_vlmevalkit.jsonl", rows)


def _seed(folder: Path, asked: Asked) -> None:
    rows, truths = [], []
    for number, (pixels, question) in enumerate(asked):
        kind = 1 + number % 12  # the last three are about videos
        image = f"SEED-Bench-image/{number}.png"
        _save_image(folder / image, pixels)
        text, letter = _lettered(question, number)
        rows.append({"question_id": str(number), "image": image, "text": text, "answer": letter, "category": kind})
        data_type = "image" if kind <= 9 else "video"
        truths.append({"question_id": str(number), "question_type_id": kind, "data_type": data_type, "answer": letter})
    _lines(folder / "seed.jsonl", rows)
    types = {f"Type {kind}": kind for kind in range(1, 13)}
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": truths})


def _mmmu(folder: Path, asked: Asked) -> None:
    """Three subjects with multiple-choice and open questions: validation with answers, test without."""
    try:
        from pyarrow import Table, parquet
    except ImportError:
        return
    for split in ("validation", "test"):
        for part, subject in enumerate(list(SUBJECTS)[::12]):
            rows = []
            for number, (pixels, question) in enumerate(asked[part::3], 1):
                choices, place = _choices(question, number)
                is_open = number % 4 == 0
                row = {"id": f"{split}_{subject}_{number}", "question": f"<image 1> {question.text}"}
                row["options"] = "[]" if is_open else repr(choices)
                row["question_type"] = "open" if is_open else "multiple-choice"
                row["answer"] = "?" if split == "test" else question.answer if is_open else LETTERS[place]
                rows.append({**row, "image_1": {"bytes": _png(pixels), "path": f"{number}.png"}})
            path = folder / subject / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(Table.from_pylist(rows), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write")
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help=f"questions of each data set ({COUNT})")
    args = parser.parse_args(argv)
    if args.count < 4:
        parser.error(f"--count must be at least 4, not {args.count}")
    try:
        write(args.directory, args.count)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
