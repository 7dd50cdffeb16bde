"""Published scores of the four systems, by benchmark.

Sources: the results table that InternVL-Chat-V1-1 was published with; InternVL's evaluation documentation of
2024-07-28 for V1-1's other scores. The table labels MMBench's first three columns "test", but they
are scores of the dev files (LLaVA-1.5's 67.7 is what its stored dev predictions give; V1-0's scripts read the dev
files), so they are listed here as dev, and V1-1's dev scores come from the documentation.
"""

from __future__ import annotations

LLAVA, V1_0_336, V1_0_448, V1_1 = SYSTEMS = (
    "LLaVA-1.5-13B",
    "InternVL-Chat-V1-0 336px",
    "InternVL-Chat-V1-0 448px",
    "InternVL-Chat-V1-1",
)


def _row(*figures: float | None) -> dict[str, float]:
    return {system: figure for system, figure in zip(SYSTEMS, figures, strict=True) if figure is not None}


def _v1_1(figure: float) -> dict[str, float]:
    return {V1_1: figure}


PUBLISHED = {
    "vqav2-testdev": _row(80.0, 80.2, 82.0, 80.9),
    "gqa": _row(63.3, 63.9, 64.1, 62.5),
    "vizwiz-val": _v1_1(59.0),
    "vizwiz-test": _row(53.6, 54.6, 60.1, 57.3),
    "scienceqa": _row(71.6, 70.1, 71.6, 90.1),
    "textvqa": _v1_1(64.2),
    "textvqa-ocr": _row(61.3, 58.7, 64.8, 68.6),
    "pope": _row(85.9, 87.1, 87.2, 87.1),
    "mme": _row(1531.3, 1546.9, 1579.0, 1659.8),
    "mmbench-en-dev": _row(67.7, 66.5, 68.2, 76.7),
    "mmbench-cn-dev": _row(63.6, 61.9, 64.0, 71.9),
    "mmbench-en-test": _v1_1(75.4),
    "mmbench-cn-test": _v1_1(70.3),
    "mm-vet": _row(35.4, 33.7, 36.7, 46.7),
    "okvqa": _v1_1(64.1),
    "docvqa-val": _v1_1(47.6),
    "docvqa-test": _v1_1(48.1),
    "infovqa-val": _v1_1(33.3),
    "infovqa-test": _v1_1(32.0),
    "chartqa": _v1_1(59.9),
    "ai2d": _v1_1(72.4),
    "mmmu-val": _v1_1(38.8),
    "mmmu-test": _v1_1(35.3),
    "ccbench": _v1_1(43.3),
    "seed": _v1_1(73.2),
}
