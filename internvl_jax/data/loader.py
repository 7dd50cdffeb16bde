"""From a meta file to batches: shuffled, shared out among processes, and continued from wherever a run stopped.

grain reads: threads or worker processes make samples ahead of the step that needs them. The order of samples is a
function of the seed, so a position is a few numbers: how many samples this process has read, and which of them wait for
a batch. It does not depend on the number of workers, and restoring it reads nothing but what waits.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
from absl import flags

from internvl_jax.config import ChatConfig
from internvl_jax.data import packing
from internvl_jax.data.annotations import Corpus, DataError, Progress, read_meta
from internvl_jax.data.batch import Batch
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import Problem, Problems, Sample, SampleMaker
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import Tokenizer

THREADS = 4  # that make samples, in each worker, or in the process itself where there are none
AHEAD = 2  # batches that are ready before they are asked for


class Loader:
    """Batches of a meta file's data sets, for this process. Made by `open_data`.

    iter() gives a grain iterator: next() returns a Batch of numpy arrays, get_state() a small dictionary that JSON can
    hold, and set_state() continues from there, bit for bit; close() ends threads and workers. problems: what was
    skipped so far, batches made ahead included; the state's "problems" counts what the batches given came past.
    """

    def __init__(self, batches: BatchDataset, problems: Problems, corpus: Corpus, maker: SampleMaker):
        self.problems, self.corpus, self.maker = problems, corpus, maker
        self._batches = batches

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return iter(grain.experimental.ThreadPrefetchIterDataset(self._batches, prefetch_buffer_size=AHEAD))


def open_data(
    meta: str | Path,
    config: ChatConfig,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    layout: Layout,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process: tuple[int, int] = (0, 1),
    fatal: bool = False,
    report: Callable[[Problem], None] | None = None,
    workers: int = 0,
    base: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Loader:
    """Open the data sets of a meta file for training.

    meta: see annotations.read_meta, and `base` there. layout: of this process's batches, the same on every process.
    seed: of the order and of augmentation; every epoch has another order. shuffle: False keeps the files' order.
    epochs: None goes on for ever. With a number, the last batches have rows of padding, and processes may give
    different numbers of batches. process: (index, count): process i reads every count-th sample from the i-th on.
    fatal: a sample that cannot be used ends the run. Otherwise it is skipped, counted, and given to `report` once.
    workers: processes that make samples; 0: threads of this one. options: fields of SampleMaker.
    Raises DataError before anything starts for data, settings and model that do not go together; later for a sample
    where `fatal`, and for data of which no sample can be used.
    """
    index, count = process
    if not 0 <= index < count:
        raise DataError(f"process {index} of {count} is none")
    if workers < 0:
        raise DataError(f"workers is {workers}: it must be 0 (threads) or more")
    if epochs is not None and epochs < 1:
        raise DataError(f"epochs is {epochs}: it must be at least 1")
    maker = SampleMaker.of(
        config, tokenizer, processor, max_length=layout.max_length, image_slots=layout.image_slots, **options
    )
    corpus = Corpus(read_meta(Path(meta), base), progress)
    if len(corpus) < count:
        raise DataError(f"{meta} has {len(corpus)} samples, not one for each of {count} processes")
    samples = sample_dataset(corpus, maker, seed=seed, shuffle=shuffle, epochs=epochs)[index::count]
    problems = Problems(report, fatal=fatal)
    identity = {"corpus": corpus.fingerprint(), "seed": seed, "shuffle": shuffle, "process": [index, count]}
    share = -(-len(corpus) // count)
    return Loader(BatchDataset(samples, layout, maker, problems, identity, share, workers), problems, corpus, maker)


def sample_dataset(
    corpus: Corpus, maker: SampleMaker, *, seed: int, shuffle: bool, epochs: int | None
) -> grain.MapDataset[Sample | Problem]:
    """Samples by number, made when asked for; without end where epochs is None."""
    records = grain.MapDataset.source(corpus)
    if shuffle:
        records = records.shuffle(seed)
    # After repeat a number never returns, so that a picture is cropped anew in every epoch.
    return records.repeat(epochs).random_map(maker, seed=seed)


class BatchDataset(grain.IterDataset[Batch]):
    """Batches of samples, in grain's form. share: samples of an epoch that are this process's."""

    def __init__(
        self,
        samples: grain.MapDataset[Sample | Problem],
        layout: Layout,
        maker: SampleMaker,
        problems: Problems,
        identity: dict[str, Any],
        share: int,
        workers: int,
    ):
        super().__init__(samples)
        self.samples, self.layout, self.maker = samples, layout, maker
        self.problems, self.identity, self.share, self.workers = problems, identity, share, workers

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


def _keep_reading(index: int, count: int) -> None:
    """In a worker: Ctrl-C, which a terminal sends to all, is for the process that trains; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchIterator(grain.DatasetIterator[Batch]):
    """Where a process is in its samples, and the next batch from there."""

    def __init__(self, dataset: BatchDataset):
        super().__init__()
        self._dataset = dataset
        self._next = 0  # number of the sample to be read next
        self._waiting: list[tuple[int, Sample]] = []
        self._bad_in_a_row = 0
        self._stream: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        """Raises DataError where every sample of an epoch was a problem, and for the first one if those are fatal."""
        self._assert_not_closed()
        layout = self._dataset.layout
        last = False
        while True:
            rows = packing.choose([sample for _, sample in self._waiting], layout, last=last)
            if rows is not None:
                break
            if last:
                raise StopIteration
            last = not self._read()
        taken = {number for row in rows for number in row}
        samples = [[self._waiting[number][1] for number in row] for row in rows]
        self._waiting = [item for number, item in enumerate(self._waiting) if number not in taken]
        maker = self._dataset.maker
        return packing.assemble(samples, layout, maker.processor.image_size, maker.image_token_id)

    def _read(self) -> bool:
        """One sample more waits, or is skipped; False at the end of the data."""
        if self._stream is None:
            self._stream = self._open(self._next)
        try:
            made = next(self._stream)
        except StopIteration:
            return False
        self._next += 1
        self._keep(self._next - 1, made)
        return True

    def _keep(self, number: int, made: Sample | Problem) -> None:
        self._dataset.problems.look(made)
        if isinstance(made, Sample):
            self._waiting.append((number, made))
            self._bad_in_a_row = 0
            return
        self._dataset.problems.add(made)
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._dataset.share:
            raise DataError(
                f"none of {self._bad_in_a_row} samples can be used; the last is {made.place}: {made.message}"
            )

    def _open(self, start: int) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4 * THREADS)
        stream = self._dataset.samples[start:].to_iter_dataset(options)
        if self._dataset.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags, and nothing here parses any
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(self._dataset.workers, 4 * THREADS), _keep_reading)
        return iter(stream)

    def get_state(self) -> dict[str, Any]:
        return {
            **self._dataset.identity,
            "next": self._next,
            "waiting": [number for number, _ in self._waiting],
            "problems": dict(self._dataset.problems.counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises DataError for the state of other data, another seed or another share."""
        for name, value in self._dataset.identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"the run was at a place in other data: {name} was {state.get(name)} and is {value}; continue with "
                    "the same meta file, annotations, seed and number of processes, or start the data anew"
                )
        self._end_stream()
        self._next, self._waiting, self._bad_in_a_row = int(state["next"]), [], 0
        for number in state["waiting"]:
            self._keep(int(number), self._dataset.samples[int(number)])
        problems = self._dataset.problems.counts
        problems.clear()
        problems.update(state["problems"])

    def close(self) -> None:
        super().close()
        self._end_stream()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
