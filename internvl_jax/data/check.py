"""What is in a data set, and what is wrong with it, before a slice is paid for. `internvl-jax data check` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from internvl_jax.data.samples import UNREAD, Problem, Sample, SampleMaker, unread_message
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer
from internvl_jax.utils import files

LISTED = 20  # problems of a data set that are printed; all are counted
COUNTED = 1000  # keys that nothing reads
SIMULATED = 20_000  # samples that are packed to see how full rows become


@dataclass
class Seen:
    """Something that entries have."""

    count: int = 0  # entries
    places: list[str] = field(default_factory=list)  # of the first few

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < 3:
            self.places.append(place)

    def __str__(self) -> str:
        return f"{self.count} entries, first {', '.join(self.places)}"


@dataclass
class SourceStats:
    """One data set of the meta file. Token counts are per sample, after cutting."""

    source: Source
    entries: int
    tokens: list[int] = field(default_factory=list)
    supervised: int = 0  # tokens
    images: int = 0
    text_only: int = 0  # samples
    cut: int = 0  # samples longer than a row
    problems: Counter[str] = field(default_factory=Counter)
    listed: list[Problem] = field(default_factory=list)
    unread: dict[str, Seen] = field(default_factory=dict)  # keys of entries that nothing reads
    typed: dict[str, Seen] = field(default_factory=dict)  # special tokens in texts

    @property
    def checked(self) -> int:
        return len(self.tokens) + self.problems.total()

    def warnings(self) -> list[str]:
        """What is no sample's problem."""
        found = []
        if self.source.length is not None and self.source.length != self.entries:
            found.append(f'the meta file says "length" {self.source.length}, the annotation has {self.entries} entries')
        if self.images and not self.source.root.is_dir():
            found.append(f"the images' directory {self.source.root} {files.not_a_directory(self.source.root)}")
        if self.cut:
            found.append(
                f"{self.cut} of {len(self.tokens)} conversations are cut: longer rows would keep their answers"
            )
        for key, seen in list(self.unread.items())[:UNREAD]:
            found.append(f"{unread_message(key)} ({seen})")
        if len(self.unread) > UNREAD:
            found.append(f"{len(self.unread) - UNREAD} other keys are not read, or more")
        for token, seen in self.typed.items():
            found.append(f"the text has {token}, which is learned as that token and not as text ({seen})")
        return found

    def to_dict(self) -> dict[str, Any]:
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
            "cut": self.cut,
            "problems": dict(self.problems),
            "listed": [f"{problem.place}: {problem.message}" for problem in self.listed],
            "warnings": self.warnings(),
        }


@dataclass
class Report:
    """What a check found."""

    stats: list[SourceStats]
    layout: Layout
    filled: float  # of the rows of whole batches, the part that is tokens
    batches: float  # per epoch, if the samples that were not looked at are like those that were
    shown: list[Sample]
    image_token_id: int

    @property
    def problems(self) -> int:
        return sum(stats.problems.total() for stats in self.stats)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.layout.rows,
            "lengths": list(self.layout.lengths),
            "image_slots": self.layout.image_slots,
            "packed": self.layout.packed,
            "filled": round(self.filled, 4),
            "batches_per_epoch": round(self.batches, 1),
            "problems": self.problems,
            "sources": [stats.to_dict() for stats in self.stats],
        }


def check(
    meta: str | Path,
    checkpoint: Path,
    layout: Layout,
    *,
    limit: int | None = None,
    show: int = 3,
    seed: int = 0,
    base: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Report, Tokenizer]:
    """Make the samples of an epoch, pictures and all, and count.

    checkpoint: the directory of the model to be trained; its weights are not read. limit: at most so many entries of
    each data set, drawn at random by `seed`; None: all that an epoch uses. show: samples to keep for `render`.
    options: fields of SampleMaker; with_pixels=False does not open pictures.
    Raises DataError, ConfigError, TokenizerError or ImageError where nothing can be read at all.
    """
    if (limit is not None and limit < 1) or show < 0:
        raise DataError(f"nothing can be checked with limit {limit} and {show} samples shown")
    meta, checkpoint = files.resolve(meta), files.resolve(checkpoint)
    base = None if base is None else files.resolve(base)
    config = load_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    processor = load_processor(checkpoint, config)
    maker = SampleMaker.of(
        config, tokenizer, processor, max_length=layout.max_length, image_slots=layout.image_slots, augmentation=None,
        **options,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    work: list[tuple[SourceStats, Corpus, np.ndarray]] = []
    for source in read_meta(Path(meta), base):
        corpus = Corpus([replace(source, repeat_time=1)], progress)
        used = min(len(corpus), source.samples(len(corpus)))
        picked = np.arange(used) if limit is None or limit >= used else np.sort(rng.choice(used, limit, replace=False))
        work.append((SourceStats(source, len(corpus)), corpus, picked))
    total, done = sum(len(picked) for *_, picked in work), 0
    sizes: list[tuple[int, int]] = []  # tokens and images
    shown: list[Sample] = []
    for stats, corpus, picked in work:
        kept: list[Sample] = []
        for made in in_order(corpus, maker, picked):
            done += 1
            if progress is not None:
                progress(done, total, "checking")
            for key in made.unread:
                if key in stats.unread or len(stats.unread) < COUNTED:
                    stats.unread.setdefault(key, Seen()).add(made.place)
            if isinstance(made, Problem):
                stats.problems[made.kind] += 1
                if len(stats.listed) < LISTED:
                    stats.listed.append(made)
                continue
            for token in made.typed:
                stats.typed.setdefault(token, Seen()).add(made.place)
            images = maker.images_of(made)
            stats.tokens.append(len(made.input_ids))
            stats.supervised += int(np.sum(made.labels != IGNORED))
            stats.images += images
            stats.text_only += not images
            stats.cut += made.cut
            sizes.append((len(made.input_ids), images))
            # Of the samples that can be used, each is as likely to be kept (reservoir sampling).
            place = len(kept) if len(kept) < show else int(rng.integers(len(stats.tokens)))
            if place < show:
                kept[place : place + 1] = [made]
        shown += kept
    some = [sizes[number] for number in rng.permutation(len(sizes))[:SIMULATED]]
    filled, batches = fill(some, layout)
    found = [stats for stats, *_ in work]
    epoch = sum(s.source.samples(s.entries) / s.checked * sum(s.tokens) for s in found)  # tokens
    per_epoch = batches * epoch / sum(tokens for tokens, _ in some) if some else 0.0
    return Report(found, layout, filled, per_epoch, shown, maker.image_token_id), tokenizer


def in_order(corpus: Corpus, maker: SampleMaker, numbers: np.ndarray) -> Iterator[Sample | Problem]:
    """The samples of these numbers, made by threads ahead of the one that is looked at."""
    samples = grain.MapDataset.source(corpus).random_map(maker, seed=0)
    picked = grain.MapDataset.source(numbers).map(lambda number: samples[int(number)])
    yield from picked.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * THREADS))


def fill(sizes: Sequence[tuple[int, int]], layout: Layout) -> tuple[float, int]:
    """How full the rows of batches are, those of the end of the data left out where there are others; and batches.

    sizes: tokens and images of samples.
    """
    waiting: list[Sample] = []
    fills: list[float] = []
    whole = 0
    for number in range(len(sizes) + 1):
        last = number == len(sizes)
        for tokens, images in sizes[number : number + 1]:
            empty = np.empty((tokens, 0), np.int32)  # has a length, and takes no memory
            waiting.append(Sample(empty, empty, np.empty((images, 0), np.float32), "", False))
        while (rows := packing.choose(waiting, layout, last=last)) is not None:
            filled = [sum(len(waiting[i].input_ids) for i in row) for row in rows]
            fills.append(sum(filled) / (layout.rows * layout.bucket(max(filled))))
            taken = {i for row in rows for i in row}
            waiting = [sample for i, sample in enumerate(waiting) if i not in taken]
            whole += not last
    return float(np.mean(fills[:whole] or fills or [0.0])), len(fills)


def render(sample: Sample, tokenizer: Tokenizer, image_token_id: int) -> Text:
    """A sample as it is read: what is supervised in green between ⟦ and ⟧, the rest dim, image tokens counted."""
    text = Text()
    run: list[int] = []
    ids, learned = sample.input_ids.tolist(), (sample.labels != IGNORED).tolist()
    for at, token in enumerate(ids):
        run.append(token)
        key, after = (learned[at], token == image_token_id), None
        if at + 1 < len(ids):
            after = (learned[at + 1], ids[at + 1] == image_token_id)
        if after == key:
            continue
        if key[1]:
            text.append(f"{IMG_CONTEXT} x {len(run)}", "cyan")
        elif key[0]:
            text.append(f"⟦{tokenizer.decode(run, skip_special_tokens=False)}⟧", "bold green")
        else:
            text.append(tokenizer.decode(run, skip_special_tokens=False), "dim")
        run = []
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


def statistics(report: Report) -> Table:
    """The data sets as rows of a table."""
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


def show(report: Report, tokenizer: Tokenizer, console: Console) -> None:
    """Print a report: a table, warnings, problems by location, rendered samples."""
    console.print(statistics(report), soft_wrap=False)
    layout = report.layout
    rows = f"{layout.rows} {'packed ' if layout.packed else ''}rows of {' or '.join(map(str, layout.lengths))} tokens"
    console.print(
        f"in batches of {rows} and {layout.image_slots} images: {report.filled:.1%} of the tokens are not padding, "
        f"about {report.batches:,.0f} batches an epoch"
    )
    for stats in report.stats:
        for warning in stats.warnings():
            console.print(f"{stats.source.name}: {warning}", style="yellow")
        for problem in stats.listed:
            console.print(f"{problem.place}: {problem.message}", style="red")
        if (more := stats.problems.total() - len(stats.listed)) > 0:
            console.print(f"{stats.source.name}: {more} more", style="red")
        if stats.problems:
            kinds = ", ".join(f"{count} {kind}" for kind, count in stats.problems.most_common())
            console.print(f"{stats.source.name}: {stats.problems.total()} of {stats.checked} cannot be used: {kinds}")
    for sample in report.shown:
        learned = int(np.sum(sample.labels != IGNORED))
        console.print(f"\n{sample.place}: {len(sample.input_ids)} tokens, {learned} supervised")
        console.print(render(sample, tokenizer, report.image_token_id))
