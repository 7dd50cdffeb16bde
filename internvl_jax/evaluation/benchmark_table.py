"""The benchmark table: data files, prompts, generation settings and scorer of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from internvl_jax.evaluation import scoring, submissions
from internvl_jax.evaluation.datasets import choice_readers, mmbench_tables, short_answer_readers, yes_no_readers
from internvl_jax.evaluation.datasets.choice_readers import lettered
from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import LETTER, LETTER_ZH, SHORT, UNANSWERABLE, YES_NO, Codebase, Item
from internvl_jax.evaluation.scoring import Answers, Score
from internvl_jax.evaluation.submissions import Submit

BEAMS = 5  # of V1-1's published scores (the scripts' default until November 2024)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: Name in the results table.
        folder: Folder of its files in the reference's data folder.
        read: Reads the items.
        prompt: Makes the prompt of an item.
        score: Scores the answers; None where a server or a judge does.
        new_tokens: Maximum number of tokens per answer in V1-1's scripts.
        llava_new_tokens: Maximum number of tokens per answer in LLaVA's scripts.
        min_new_tokens: Minimum number of tokens per answer in V1-1's scripts.
        pad: Whether LLaVA's script pads images to a square.
        images: Folders that may contain the images.
        submit: Writes the file that a server, a judge or the official script reads.
    """

    title: str
    folder: str
    read: Callable[[DataFolder, Codebase], list[Item]]
    prompt: Callable[[Item, Codebase], str]
    score: Callable[[Sequence[Item], Answers, Codebase], Score] | None
    new_tokens: int
    llava_new_tokens: int = 128
    min_new_tokens: int = 1
    pad: bool = True
    images: tuple[str, ...] = ()
    submit: Submit | None = None

    @property
    def needs_xlsx(self) -> bool:
        """Whether the submission is an .xlsx file."""
        return self.submit in (submissions.mmbench, submissions.ccbench)

    def generation(self, codebase: Codebase, num_beams: int | None = None) -> dict[str, int]:
        """Return arguments of GenerationConfig as for the published scores; decoding is never sampled.

        Args:
            codebase: Whose settings.
            num_beams: Beam search width in place of theirs.
        """
        if codebase == "llava":
            return {"max_new_tokens": self.llava_new_tokens, "num_beams": 1 if num_beams is None else num_beams}
        beams = BEAMS if num_beams is None else num_beams
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.min_new_tokens, "num_beams": beams}


def _short(item: Item, codebase: Codebase) -> str:
    return item.question + (" " if codebase == "internvl" else "\n") + SHORT


def _vizwiz(item: Item, codebase: Codebase) -> str:
    return (" " if codebase == "internvl" else "\n").join((item.question, UNANSWERABLE, SHORT))


def _as_is(item: Item, codebase: Codebase) -> str:
    return item.question


def _scienceqa(item: Item, codebase: Codebase) -> str:
    return f"{item.question}\n{LETTER}" if codebase == "llava" else lettered(item).strip()


def _mme(item: Item, codebase: Codebase) -> str:
    if codebase == "internvl":
        return f"{item.question} {SHORT}"
    return f"{item.question.replace(YES_NO, '').strip()}\n{SHORT}"


def _english(item: Item, codebase: Codebase) -> str:
    return lettered(item)


def _chinese(item: Item, codebase: Codebase) -> str:
    return lettered(item, LETTER_ZH)


def _mmvet(item: Item, codebase: Codebase) -> str:
    return item.question + (" " if codebase == "internvl" else "")  # an empty instruction is joined on


def _mmmu(item: Item, codebase: Codebase) -> str:
    return lettered(item, LETTER if item.options else SHORT)


def _vqa(
    title: str,
    folder: str,
    questions: tuple[str, ...],
    *,
    annotations: tuple[str, ...] = (),
    coco: str = "",
    prompt: Callable[[Item, Codebase], str] = _short,
    images: tuple[str, ...],
    submit: Submit | None = None,
) -> Benchmark:
    """A benchmark with ten annotators' answers or, without annotations, one that a server scores."""
    read = partial(
        short_answer_readers.short_answers,
        questions=questions,
        annotations=annotations,
        coco=coco,
        people=bool(annotations),
        server=not annotations,
    )
    score = scoring.score_vqa if annotations else None
    return Benchmark(title, folder, read, prompt, score, 10, images=images, submit=submit)


def _document(title: str, folder: str, questions: tuple[str, ...], server: bool, images: tuple[str, ...]) -> Benchmark:
    read = partial(short_answer_readers.short_answers, questions=questions, server=server)
    score, submit = (None, submissions.documents) if server else (scoring.score_anls, None)
    return Benchmark(title, folder, read, _short, score, 100, images=images, submit=submit)


def _mmbench(title: str, files: tuple[str, ...], prompt: Callable[[Item, Codebase], str], server: bool) -> Benchmark:
    read = partial(mmbench_tables.multiple_choice, files=files, server=server)
    score = None if server else scoring.score_mmbench
    return Benchmark(title, "mmbench", read, prompt, score, 100, 1024, submit=submissions.mmbench)


_DOCVQA_IMAGES = ("docvqa/val", "docvqa/test", "docvqa", "")
_INFO_IMAGES = ("infographicsvqa/infographicsvqa_images", "infographicsvqa_images", "")

BENCHMARKS = {
    "vqav2-val": _vqa(
        "VQAv2 val",
        "vqav2",
        ("vqav2_val.jsonl", "v2_OpenEnded_mscoco_val2014_questions.json"),
        annotations=("v2_mscoco_val2014_annotations.json",),
        coco="val2014",
        images=("coco/val2014", "val2014"),
    ),
    "vqav2-testdev": _vqa(
        "VQAv2 test-dev",
        "vqav2",
        (
            "vqav2_testdev.jsonl",
            "llava_vqav2_mscoco_test-dev2015.jsonl",
            "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        ),
        coco="test2015",
        images=("coco/test2015", "test2015"),
        submit=submissions.vqav2,
    ),
    "gqa": Benchmark(
        "GQA test-dev",
        "gqa",
        short_answer_readers.gqa,
        _short,
        scoring.score_gqa,
        10,
        images=("gqa/images", "images"),
        submit=submissions.gqa,
    ),
    "vizwiz-val": _vqa(
        "VizWiz val",
        "vizwiz",
        ("vizwiz_val.jsonl", "val.json"),
        annotations=("vizwiz_val_annotations.json", "val.json"),
        prompt=_vizwiz,
        images=("vizwiz/val", "val"),
    ),
    "vizwiz-test": _vqa(
        "VizWiz test",
        "vizwiz",
        ("vizwiz_test.jsonl", "llava_test.jsonl", "test.json"),
        prompt=_vizwiz,
        images=("vizwiz/test", "test"),
        submit=submissions.vizwiz,
    ),
    "scienceqa": Benchmark(
        "ScienceQA image",
        "scienceqa",
        choice_readers.scienceqa,
        _scienceqa,
        scoring.score_scienceqa,
        100,
        1024,
        pad=False,
        images=("scienceqa/images/test", "images/test", "test"),
    ),
    "textvqa": _vqa(
        "TextVQA val",
        "textvqa",
        ("textvqa_val.jsonl", "TextVQA_0.5.1_val.json"),
        annotations=("textvqa_val_annotations.json", "TextVQA_0.5.1_val.json"),
        images=("textvqa/train_images", "train_images"),
    ),
    "textvqa-ocr": _vqa(
        "TextVQA val, OCR tokens",
        "textvqa",
        ("textvqa_val_llava.jsonl", "llava_textvqa_val_v051_ocr.jsonl"),
        annotations=("textvqa_val_annotations.json", "TextVQA_0.5.1_val.json"),
        images=("textvqa/train_images", "train_images"),
    ),
    "pope": Benchmark(
        "POPE",
        "pope",
        yes_no_readers.pope,
        _as_is,
        scoring.score_pope,
        100,
        images=("coco/val2014", "pope/val2014", "val2014"),
    ),
    "mme": Benchmark(
        "MME perception",
        "mme",
        yes_no_readers.mme,
        _mme,
        scoring.score_mme,
        20,
        min_new_tokens=0,
        images=("mme/MME_Benchmark_release_version", "MME_Benchmark_release_version"),
    ),
    "mmbench-en-dev": _mmbench("MMBench-EN dev", ("mmbench_dev_20230712.tsv",), _english, False),
    "mmbench-cn-dev": _mmbench("MMBench-CN dev", ("mmbench_dev_cn_20231003.tsv",), _chinese, False),
    "mmbench-en-test": _mmbench("MMBench-EN test", ("mmbench_test_en_20231003.tsv",), _english, True),
    "mmbench-cn-test": _mmbench("MMBench-CN test", ("mmbench_test_cn_20231003.tsv",), _chinese, True),
    "mm-vet": Benchmark(
        "MM-Vet",
        "mm-vet",
        short_answer_readers.mmvet,
        _mmvet,
        None,
        1000,
        1024,
        pad=False,
        images=("mm-vet/images", "images"),
        submit=submissions.by_id,
    ),
    "okvqa": _vqa(
        "OKVQA val",
        "okvqa",
        ("okvqa_val.jsonl", "OpenEnded_mscoco_val2014_questions.json"),
        annotations=("mscoco_val2014_annotations.json",),
        coco="val2014",
        images=("coco/val2014", "val2014"),
    ),
    "docvqa-val": _document("DocVQA val", "docvqa", ("val.jsonl", "val_v1.0.json"), False, _DOCVQA_IMAGES),
    "docvqa-test": _document("DocVQA test", "docvqa", ("test.jsonl", "test_v1.0.json"), True, _DOCVQA_IMAGES),
    "infovqa-val": _document(
        "InfographicsVQA val",
        "infographicsvqa",
        ("infographicsvqa_val.jsonl", "val.jsonl", "infographicsVQA_val_v1.0.json"),
        False,
        _INFO_IMAGES,
    ),
    "infovqa-test": _document(
        "InfographicsVQA test",
        "infographicsvqa",
        ("infographicsvqa_test.jsonl", "test.jsonl", "infographicsVQA_test_v1.0.json"),
        True,
        _INFO_IMAGES,
    ),
    "chartqa": Benchmark(
        "ChartQA test",
        "chartqa",
        short_answer_readers.chartqa,
        _short,
        scoring.score_chartqa,
        100,
        images=("chartqa/test/png",),
    ),
    "ai2d": Benchmark(
        "AI2D test",
        "ai2diagram",
        partial(short_answer_readers.short_answers, questions=("test_vlmevalkit.jsonl",)),
        _as_is,
        scoring.score_exact,
        10,
        images=("ai2diagram/AI2D_TEST", "AI2D_TEST"),
    ),
    "mmmu-val": Benchmark(
        "MMMU val", "MMMU", partial(choice_readers.mmmu, split="validation"), _mmmu, scoring.score_mmmu, 10
    ),
    "mmmu-test": Benchmark(
        "MMMU test", "MMMU", partial(choice_readers.mmmu, split="test"), _mmmu, None, 10, submit=submissions.by_id
    ),
    "ccbench": Benchmark(
        "CCBench dev",
        "mmbench",
        partial(mmbench_tables.multiple_choice, files=("CCBench_legacy.tsv",)),
        _chinese,
        scoring.score_ccbench,
        100,
        1024,
        submit=submissions.ccbench,
    ),
    "seed": Benchmark("SEED image", "SEED", choice_readers.seed, _as_is, scoring.score_seed, 100, images=("SEED",)),
}
