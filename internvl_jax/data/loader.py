"""From a meta file to batches: shuffled, sharded over processes, resumable.

grain reads: threads or worker processes make samples ahead of the step that needs them. The order of samples is a
function of the seed, so a position is a few numbers: how many samples this process has read, and which of them are
still in the buffer. It does not depend on the number of workers, and restoring it reads only the buffered samples.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
from absl import flags

from internvl_jax.data import packing
from internvl_jax.data.annotations import Corpus, DataError, Progress, read_meta
from internvl_jax.data.batch import Batch
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import Problem, ProblemLog, Sample, SampleMaker

THREADS = 4  # that make samples, in each worker, or in this process if there are no workers
PREFETCH_BATCHES = 2


@dataclass(frozen=True)
class ReadOptions:
    """In which order a process reads its samples, and how.

    Attributes:
        seed: of the order and of augmentation; every epoch has another order.
        shuffle: False keeps the order of the files.
        epochs: None to read forever. With a number, the last batches have rows of padding, and processes may make
            different numbers of batches.
        process: (index, count): process i reads every count-th sample from the i-th on.
        fatal: an invalid annotation ends the run. Otherwise it is skipped and counted.
        workers: processes that make samples; 0 for threads of this one.

    Raises:
        DataError: a number is not possible.
    """

    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    process: tuple[int, int] = (0, 1)
    fatal: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        index, count = self.process
        if not 0 <= index < count:
            raise DataError(f"there is no process {index} of {count}")
        if self.workers < 0:
            raise DataError(f"workers is {self.workers}: it must be 0 (threads) or more")
        if self.epochs is not None and self.epochs < 1:
            raise DataError(f"epochs is {self.epochs}: it must be at least 1")


class Loader:
    """Batches of a meta file's data sets for this process, made by `open_data`.

    iter() returns a grain iterator: next() returns a Batch of numpy arrays, get_state() a small dictionary for JSON,
    set_state() continues from there, bit for bit, and close() ends threads and workers.

    Attributes:
        problems: the invalid annotations skipped so far, including those met while prefetching; the state's "problems"
            counts those met up to the last batch returned.
        corpus: the records.
        maker: makes samples of them.
    """

    def __init__(self, batches: BatchDataset, problems: ProblemLog, corpus: Corpus, maker: SampleMaker):
        self.problems, self.corpus, self.maker = problems, corpus, maker
        self._batches = batches

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return iter(grain.experimental.ThreadPrefetchIterDataset(self._batches, prefetch_buffer_size=PREFETCH_BATCHES))


def open_data(
    meta: str | Path,
    maker: SampleMaker,
    layout: Layout,
    options: ReadOptions | None = None,
    *,
    base: Path | None = None,
    report: Callable[[Problem], None] | None = None,
    progress: Progress | None = None,
) -> Loader:
    """Open the data sets of a meta file for training.

    Args:
        meta: see `annotations.read_meta`.
        maker: makes samples that fit the layout.
        layout: shapes of this process's batches, the same in every process.
        options: order, sharding and workers; None for the defaults.
        base: see `annotations.read_meta`.
        report: called once with each invalid annotation, unless these are fatal.
        progress: called while annotation files are indexed.

    Raises:
        DataError: the meta file or an annotation file is invalid, or has too few samples. While iterating: no sample of
            an epoch is valid, or one is not and that is fatal.
    """
    options = options or ReadOptions()
    _, count = options.process
    corpus = Corpus(read_meta(Path(meta), base), progress)
    if len(corpus) < count:
        raise DataError(f"{meta} has {len(corpus)} samples, not one for each of {count} processes")
    problems = ProblemLog(report, fatal=options.fatal)
    return Loader(BatchDataset(corpus, maker, layout, options, problems), problems, corpus, maker)


def sample_dataset(corpus: Corpus, maker: SampleMaker, options: ReadOptions) -> grain.MapDataset[Sample | Problem]:
    """The samples of all processes by number, made on access; infinite if there is no number of epochs."""
    records = grain.MapDataset.source(corpus)
    if options.shuffle:
        records = records.shuffle(options.seed)
    # After repeat no number occurs twice, so an image is cropped anew in every epoch.
    return records.repeat(options.epochs).random_map(maker, seed=options.seed)


class BatchDataset(grain.IterDataset[Batch]):
    """Batches of one process's samples as a grain dataset.

    Attributes:
        samples: the process's samples.
        shard_size: how many of them an epoch has.
        identity: what a saved position belongs to: data, order and process.
    """

    def __init__(self, corpus: Corpus, maker: SampleMaker, layout: Layout, options: ReadOptions, problems: ProblemLog):
        index, count = options.process
        samples = sample_dataset(corpus, maker, options)[index::count]
        super().__init__(samples)
        self.samples, self.maker, self.layout, self.problems = samples, maker, layout, problems
        self.workers, self.shard_size = options.workers, -(-len(corpus) // count)
        self.identity: dict[str, Any] = {
            "corpus": corpus.fingerprint(), "seed": options.seed, "shuffle": options.shuffle, "process": [index, count]
        }  # fmt: skip

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


def _ignore_interrupts(index: int, count: int) -> None:
    """In a worker: a terminal sends Ctrl-C to all processes, but the training process decides and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchIterator(grain.DatasetIterator[Batch]):
    """Iterates over the batches of a BatchDataset; its state is a position in the data."""

    def __init__(self, dataset: BatchDataset):
        super().__init__()
        self._dataset = dataset
        self._next = 0  # number of the next sample to read
        self._buffer: list[tuple[int, Sample]] = []
        self._consecutive_problems = 0
        self._stream: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            DataError: no sample of an epoch is valid, or one is not and that is fatal.
        """
        self._assert_not_closed()
        layout, maker = self._dataset.layout, self._dataset.maker
        last = False
        while True:
            rows = packing.choose([sample for _, sample in self._buffer], layout, last=last)
            if rows is not None:
                break
            if last:
                raise StopIteration
            last = not self._read()
        taken = {number for row in rows for number in row}
        samples = [[self._buffer[number][1] for number in row] for row in rows]
        self._buffer = [item for number, item in enumerate(self._buffer) if number not in taken]
        return packing.assemble(samples, layout, maker.processor.image_size, maker.image_token_id)

    def _read(self) -> bool:
        """Read a sample into the buffer, or skip it. Returns False at the end of the data."""
        if self._stream is None:
            self._stream = self._open(self._next)
        try:
            item = next(self._stream)
        except StopIteration:
            return False
        self._next += 1
        self._add(self._next - 1, item)
        return True

    def _add(self, number: int, item: Sample | Problem) -> None:
        problems = self._dataset.problems
        problems.warn_of_unread_keys(item)
        if isinstance(item, Sample):
            self._buffer.append((number, item))
            self._consecutive_problems = 0
            return
        problems.add(item)
        self._consecutive_problems += 1
        if self._consecutive_problems >= self._dataset.shard_size:
            raise DataError(
                f"none of {self._consecutive_problems} samples can be used; the last is {item.location}: {item.message}"
            )

    def _open(self, start: int) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * THREADS)
        stream = self._dataset.samples[start:].to_iter_dataset(options)
        if workers := self._dataset.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags, which nothing here parses
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, 4 * THREADS), _ignore_interrupts)
        return iter(stream)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, as JSON can hold it."""
        return {
            **self._dataset.identity,
            "next": self._next,
            "waiting": [number for number, _ in self._buffer],
            "problems": dict(self._dataset.problems.counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that `get_state` returned.

        Raises:
            DataError: it belongs to other data, another seed or another number of processes.
        """
        for name, value in self._dataset.identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"the saved position belongs to other data: {name} was {state.get(name)} and is {value}; resume "
                    "with the same meta file, annotations, seed and number of processes, or start a new run"
                )
        self._close_stream()
        self._next, self._buffer, self._consecutive_problems = int(state["next"]), [], 0
        for number in state["waiting"]:
            self._add(int(number), self._dataset.samples[int(number)])
        problems = self._dataset.problems.counts
        problems.clear()
        problems.update(state["problems"])

    def close(self) -> None:
        """End threads and workers."""
        super().close()
        self._close_stream()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
