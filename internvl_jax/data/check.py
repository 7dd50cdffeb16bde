"""Validates training data and reports statistics before a run, for `internvl-jax data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import grain
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from internvl_jax.config import load_config
from internvl_jax.config.conversation_templates import IMG_CONTEXT
from internvl_jax.data import packing
from internvl_jax.data.annotations import Corpus, DataError, Progress, Source, read_meta
from internvl_jax.data.batch import IGNORED
from internvl_jax.data.loader import THREADS
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import MAX_UNREAD_KEYS, Problem, Sample, SampleMaker, unread_message
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer
from internvl_jax.utils import files

LISTED = 20  # problems per data set that are printed; all are counted
MAX_COUNTED_KEYS = 1000  # unread keys per data set that are counted
SIMULATED = 20_000  # samples that are packed to estimate how full rows are


@dataclass
class Occurrences:
    """How many entries have something, and where the first few are."""

    count: int = 0
    locations: list[str] = field(default_factory=list)

    def add(self, location: str) -> None:
        self.count += 1
        if len(self.locations) < 3:
            self.locations.append(location)

    def __str__(self) -> str:
        return f"{self.count:,} entries, first {', '.join(self.locations)}"


@dataclass
class SourceStats:
    """Statistics of one data set.

    Attributes:
        source: the data set.
        entries: number of entries of its annotation file.
        tokens: tokens of each valid sample checked, after truncation.
        supervised: supervised tokens of all of them.
        images: images of all of them.
        text_only: samples without images.
        truncated: samples longer than a row.
        problems: number of invalid annotations by kind.
        listed: the first LISTED of them.
        unread_keys: keys of entries that are not read.
        special_tokens: special tokens that texts spell out.
    """

    source: Source
    entries: int
    tokens: list[int] = field(default_factory=list)
    supervised: int = 0
    images: int = 0
    text_only: int = 0
    truncated: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    listed: list[Problem] = field(default_factory=list)
    unread_keys: dict[str, Occurrences] = field(default_factory=dict)
    special_tokens: dict[str, Occurrences] = field(default_factory=dict)

    @property
    def checked(self) -> int:
        """Entries checked."""
        return len(self.tokens) + self.problems.total()

    def add_problem(self, problem: Problem) -> None:
        """Count an invalid annotation."""
        self.problems[problem.kind] += 1
        if len(self.listed) < LISTED:
            self.listed.append(problem)

    def add_sample(self, sample: Sample, images: int) -> None:
        """Count a valid sample with its number of images."""
        for token in sample.special_tokens:
            self.special_tokens.setdefault(token, Occurrences()).add(sample.location)
        self.tokens.append(len(sample.input_ids))
        self.supervised += int(np.sum(sample.labels != IGNORED))
        self.images += images
        self.text_only += not images
        self.truncated += sample.truncated

    def add_unread_keys(self, item: Sample | Problem) -> None:
        """Count the keys of an entry that are not read."""
        for key in item.unread_keys:
            if key in self.unread_keys or len(self.unread_keys) < MAX_COUNTED_KEYS:
                self.unread_keys.setdefault(key, Occurrences()).add(item.location)

    def warnings(self) -> list[str]:
        """What is suspicious about the data set, but makes no entry invalid."""
        warnings = []
        if self.source.length is not None and self.source.length != self.entries:
            warnings.append(
                f'the meta file says "length" {self.source.length}, the annotation has {self.entries:,} entries'
            )
        if self.images and not self.source.root.is_dir():
            warnings.append(f"the images' directory {self.source.root} {files.not_a_directory(self.source.root)}")
        if self.truncated:
            warnings.append(
                f"{self.truncated:,} of {len(self.tokens):,} conversations are truncated: longer rows would keep their "
                "answers"
            )
        for key, occurrences in list(self.unread_keys.items())[:MAX_UNREAD_KEYS]:
            warnings.append(f"{unread_message(key)} ({occurrences})")
        if len(self.unread_keys) > MAX_UNREAD_KEYS:
            warnings.append(f"{len(self.unread_keys) - MAX_UNREAD_KEYS} or more other keys are not read")
        for token, occurrences in self.special_tokens.items():
            warnings.append(f"the text has {token}, which is read as that token and not as text ({occurrences})")
        return warnings

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON can hold them."""
        tokens = self.tokens or [0]
        return {
            "name": self.source.name,
            "annotation": str(self.source.annotation),
            "entries": self.entries,
            "samples_per_epoch": self.source.samples(self.entries),
            "checked": self.checked,
            "usable": len(self.tokens),
            "text_only": self.text_only,
            "images": self.images,
            "tokens": sum(self.tokens),
            "tokens_median": int(np.median(tokens)),
            "tokens_max": max(tokens),
            "supervised_tokens": self.supervised,
            "truncated": self.truncated,
            "problems": dict(self.problems),
            "listed": [f"{problem.location}: {problem.message}" for problem in self.listed],
            "warnings": self.warnings(),
        }


@dataclass
class DataReport:
    """Result of a check.

    Attributes:
        stats: statistics of each data set.
        layout: shapes of the batches.
        fill_ratio: fraction of the tokens of whole batches that are not padding.
        batches: batches per epoch, if the entries that were not checked are like those that were.
        examples: a few samples, for `render`.
        image_token_id: the token of images in the samples.
    """

    stats: list[SourceStats]
    layout: Layout
    fill_ratio: float
    batches: float
    examples: list[Sample]
    image_token_id: int

    @property
    def problems(self) -> int:
        """The number of invalid annotations."""
        return sum(stats.problems.total() for stats in self.stats)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "rows": self.layout.rows,
            "lengths": list(self.layout.lengths),
            "image_slots": self.layout.image_slots,
            "packed": self.layout.packed,
            "fill_ratio": round(self.fill_ratio, 4),
            "batches_per_epoch": round(self.batches, 1),
            "problems": self.problems,
            "sources": [stats.to_dict() for stats in self.stats],
        }


@dataclass(frozen=True)
class CheckOptions:
    """How much is checked.

    Attributes:
        limit: entries of each data set, drawn at random; None for all that an epoch uses.
        show: samples of each data set to keep as examples.
        seed: of the draw.

    Raises:
        DataError: nothing would be checked.
    """

    limit: int | None = None
    show: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or self.show < 0:
            raise DataError(f"nothing can be checked with limit {self.limit} and {self.show} samples shown")


def check(
    meta: str | Path,
    checkpoint: Path,
    layout: Layout,
    options: CheckOptions | None = None,
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    **sample_options: Any,
) -> tuple[DataReport, Tokenizer]:
    """Make the samples of an epoch as training would, images included, and collect statistics.

    Args:
        meta: see `annotations.read_meta`.
        checkpoint: directory of the model to be trained; its weights are not read.
        layout: shapes of the batches.
        options: how much is checked; None for the defaults.
        base: see `annotations.read_meta`.
        progress: called after each entry.
        **sample_options: fields of SampleMaker; with_pixels=False does not open images.

    Returns:
        The report, and the model's tokenizer for `render`.

    Raises:
        DataError: the meta file or an annotation file is invalid.
        ConfigError: the model's configuration is.
        TokenizerError: its tokenizer is.
        ImageError: its image processor is.
    """
    options = options or CheckOptions()
    meta, checkpoint = files.resolve(meta), files.resolve(checkpoint)
    config = load_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    maker = SampleMaker.for_model(
        config, tokenizer, load_processor(checkpoint, config), max_length=layout.max_length,
        image_slots=layout.image_slots, augmentation=None, **sample_options,
    )  # fmt: skip
    rng = np.random.default_rng(options.seed)
    work = []
    for source in read_meta(Path(meta), None if base is None else files.resolve(base)):
        corpus = Corpus([replace(source, repeat_time=1)], progress)
        work.append((SourceStats(source, len(corpus)), corpus, _draw(source, len(corpus), options.limit, rng)))
    total, done = sum(len(numbers) for *_, numbers in work), 0
    sizes: list[tuple[int, int]] = []
    examples: list[Sample] = []
    for stats, corpus, numbers in work:
        items = _counted(make_samples(corpus, maker, numbers), done, total, progress)
        source_sizes, source_examples = _collect(stats, items, maker, options.show, rng)
        sizes += source_sizes
        examples += source_examples
        done += len(numbers)
    drawn = [sizes[number] for number in rng.permutation(len(sizes))[:SIMULATED]]
    fill_ratio, batches = simulate_packing(drawn, layout)
    all_stats = [stats for stats, *_ in work]
    epoch_tokens = sum(s.source.samples(s.entries) / s.checked * sum(s.tokens) for s in all_stats)
    per_epoch = batches * epoch_tokens / sum(tokens for tokens, _ in drawn) if drawn else 0.0
    return DataReport(all_stats, layout, fill_ratio, per_epoch, examples, maker.image_token_id), tokenizer


def _draw(source: Source, num_entries: int, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the entries to check, of those that an epoch uses."""
    used = min(num_entries, source.samples(num_entries))
    return np.arange(used) if limit is None or limit >= used else np.sort(rng.choice(used, limit, replace=False))


def _counted(
    items: Iterable[Sample | Problem], done: int, total: int, progress: Progress | None
) -> Iterator[Sample | Problem]:
    for number, item in enumerate(items, done + 1):
        if progress is not None:
            progress(number, total, "checking")
        yield item


def _collect(
    stats: SourceStats, items: Iterable[Sample | Problem], maker: SampleMaker, show: int, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], list[Sample]]:
    """Add a data set's samples to its statistics; returns the tokens and images of each, and `show` of the samples."""
    sizes: list[tuple[int, int]] = []
    examples: list[Sample] = []
    for item in items:
        stats.add_unread_keys(item)
        if isinstance(item, Problem):
            stats.add_problem(item)
            continue
        sizes.append((len(item.input_ids), maker.count_images(item)))
        stats.add_sample(item, sizes[-1][1])
        # Reservoir sampling: each valid sample is shown with the same probability.
        slot = len(examples) if len(examples) < show else int(rng.integers(len(sizes)))
        if slot < show:
            examples[slot : slot + 1] = [item]
    return sizes, examples


def make_samples(corpus: Corpus, maker: SampleMaker, numbers: np.ndarray) -> Iterator[Sample | Problem]:
    """Yield the samples of these numbers, in order, made ahead by threads."""
    samples = grain.MapDataset.source(corpus).random_map(maker, seed=0)
    picked = grain.MapDataset.source(numbers).map(lambda number: samples[int(number)])
    yield from picked.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * THREADS))


def simulate_packing(sizes: Sequence[tuple[int, int]], layout: Layout) -> tuple[float, int]:
    """Pack samples of these sizes into batches, without their contents.

    Args:
        sizes: tokens and images of each sample.
        layout: shapes of the batches.

    Returns:
        The fraction of tokens that are not padding, without the partial batches at the end of the data unless there are
        no others; and the number of batches.
    """
    buffer: list[Sample] = []
    fills: list[float] = []
    num_whole = 0
    for number in range(len(sizes) + 1):
        last = number == len(sizes)
        for tokens, images in sizes[number : number + 1]:
            empty = np.empty((tokens, 0), np.int32)  # has a length, but takes no memory
            buffer.append(Sample(empty, empty, np.empty((images, 0), np.float32), "", False))
        while (rows := packing.choose(buffer, layout, last=last)) is not None:
            filled = [sum(len(buffer[i].input_ids) for i in row) for row in rows]
            fills.append(sum(filled) / (layout.rows * layout.bucket(max(filled))))
            taken = {i for row in rows for i in row}
            buffer = [sample for i, sample in enumerate(buffer) if i not in taken]
            num_whole += not last
    return float(np.mean(fills[:num_whole] or fills or [0.0])), len(fills)


def render(sample: Sample, tokenizer: Tokenizer, image_token_id: int) -> Text:
    """A sample as text: supervised tokens in green between ⟦ and ⟧, others dim, image tokens as their number."""
    text = Text()
    ids, supervised = sample.input_ids.tolist(), (sample.labels != IGNORED).tolist()
    kinds = [(learned, token == image_token_id) for token, learned in zip(ids, supervised)]
    for (learned, is_image), group in groupby(range(len(ids)), key=kinds.__getitem__):
        run = [ids[i] for i in group]
        if is_image:
            text.append(f"{IMG_CONTEXT} x {len(run)}", "cyan")
        elif learned:
            text.append(f"⟦{tokenizer.decode(run, skip_special_tokens=False)}⟧", "bold green")
        else:
            text.append(tokenizer.decode(run, skip_special_tokens=False), "dim")
    return text


# The columns of the table, with the keys of SourceStats.to_dict.
COLUMNS = (
    ("entries", "entries"),
    ("per epoch", "samples_per_epoch"),
    ("checked", "checked"),
    ("usable", "usable"),
    ("images", "images"),
    ("text only", "text_only"),
    ("median", "tokens_median"),
    ("longest", "tokens_max"),
)


def statistics_table(report: DataReport) -> Table:
    """A table with a row for each data set."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("data set", overflow="fold")
    for title, _ in COLUMNS:
        shown = f"tokens\n{title}" if title in ("median", "longest") else title.replace(" ", "\n")
        table.add_column(shown, justify="right", no_wrap=True)
    table.add_column("super-\nvised", justify="right", no_wrap=True)
    for stats in report.stats:
        values = stats.to_dict()
        share = values["supervised_tokens"] / max(1, values["tokens"])
        table.add_row(stats.source.name, *(f"{values[key]:,}" for _, key in COLUMNS), f"{share:.1%}")
    return table


def print_report(report: DataReport, tokenizer: Tokenizer, console: Console) -> None:
    """Print a report: a table, warnings, problems with their locations, rendered samples."""
    console.print(statistics_table(report), soft_wrap=False)
    layout = report.layout
    rows = f"{layout.rows} {'packed ' if layout.packed else ''}rows of {' or '.join(map(str, layout.lengths))} tokens"
    console.print(
        f"in batches of {rows} and {layout.image_slots} images: {report.fill_ratio:.1%} of the tokens are not padding, "
        f"about {report.batches:,.0f} batches an epoch"
    )
    for stats in report.stats:
        for warning in stats.warnings():
            console.print(f"{stats.source.name}: {warning}", style="yellow")
        for problem in stats.listed:
            console.print(f"{problem.location}: {problem.message}", style="red")
        if (more := stats.problems.total() - len(stats.listed)) > 0:
            console.print(f"{stats.source.name}: {more:,} more", style="red")
        if stats.problems:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in stats.problems.most_common())
            console.print(
                f"{stats.source.name}: {stats.problems.total():,} of {stats.checked:,} cannot be used: {kinds}"
            )
    for sample in report.examples:
        supervised = int(np.sum(sample.labels != IGNORED))
        console.print(f"\n{sample.location}: {len(sample.input_ids)} tokens, {supervised} supervised")
        console.print(render(sample, tokenizer, report.image_token_id))
