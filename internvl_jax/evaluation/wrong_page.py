"""The page of wrong answers with their images, one HTML file without links."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader

from internvl_jax.evaluation.benchmark_run import BenchmarkRun
from internvl_jax.evaluation.datasets.items import Item
from internvl_jax.evaluation.datasets.records import records
from internvl_jax.evaluation.scoring import Score
from internvl_jax.processing.images import load_image, to_rgb
from internvl_jax.utils import files

SHOWN = 200  # wrong answers on the page, about 20 kB each
THUMBNAIL = 320  # pixels


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG, or why there is none."""

    data: str = ""  # base64
    error: str = ""


def wrong_page(run: BenchmarkRun, answers: Mapping[str, str], score: Score) -> str:
    """HTML of the answers with less than full points, filtered by category where there are several.

    Args:
        run: The benchmark run.
        answers: Text of each answer by the question's id.
        score: Points of each question.
    """
    wrong = [item for item in run.items if score.points[item.id] < 1]
    images = {row["id"]: row["images"] for _, row in records(run.output / "questions.jsonl")}
    cards = [_card(item, answers[item.id], score.points[item.id], images[item.id]) for item in wrong[:SHOWN]]
    environment = Environment(loader=PackageLoader("internvl_jax.evaluation"), autoescape=True, trim_blocks=True)
    page = environment.get_template("wrong.html.j2").render(
        title=f"{run.benchmark.title}: {len(wrong)} of {len(run.items)} answers not fully right",
        wrong=len(wrong),
        shown=len(cards),
        categories=sorted({card["category"] for card in cards} - {""}),
        cards=cards,
    )
    return files.replace_surrogates(page + "\n")


def _card(item: Item, answer: str, points: float, images: list[str]) -> dict[str, Any]:
    facts = (
        ("id", item.id),
        ("category", item.category),
        ("question", item.question),
        ("options", "\n".join(f"{letter}. {text}" for letter, text in item.options.items())),
        ("expected", " | ".join(dict.fromkeys(item.gold))),
        ("answered", answer or "(empty)"),
        ("points", f"{points:.2f}"),
    )
    return {
        "category": item.category,
        "images": [_thumbnail(path) for path in images],
        "facts": [(name, text) for name, text in facts if text],
    }


def _thumbnail(path: str) -> Thumbnail:
    try:
        image = to_rgb(load_image(path, honor_exif=False))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
    except (ValueError, OSError, MemoryError) as error:  # it could be read before; the report does not fail for it
        return Thumbnail(error=str(error) or type(error).__name__)
    return Thumbnail(data=base64.b64encode(file.getvalue()).decode())
