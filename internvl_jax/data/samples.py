"""One entry of an annotation file becomes a sample, or a problem that says where and why not."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER, IMG_CONTEXT, TEMPLATES, Template
from internvl_jax.data import labels
from internvl_jax.data.annotations import DataError, Record, Source
from internvl_jax.data.augment import AUGMENTATIONS, augment
from internvl_jax.data.labels import SampleError
from internvl_jax.processing.images import ImageError, ImageProcessor, load_image, to_rgb
from internvl_jax.processing.tokenizer import Tokenizer, TokenizerError, special_tokens_in

logger = logging.getLogger(__name__)

UNREAD = 20  # keys that are named

# What is read, and what published data sets of these formats have beside it and mean nothing else by.
ENTRY_KEYS = frozenset(
    "conversations image images image_labels video id "
    "width height width_list height_list image_size image_id question_id length token_count "
    "source data_source dataset dataset_name type task task_type category model metadata meta".split()
)
WRITTEN_ON_PURPOSE = frozenset((IMAGE_PLACEHOLDER, "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
TURN_KEYS = frozenset("from value id markdown text".split())


class Sample(NamedTuple):
    """A conversation, ready to be put into a row."""

    input_ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32, IGNORED where unsupervised
    pixel_values: np.ndarray  # [M,3,S,S] float32, in the order of their tokens
    place: str  # FILE:LINE
    cut: bool  # the conversation was longer
    image_labels: np.ndarray | None = None  # [M,K] int32, where SampleMaker.image_labels asks for them
    unread: tuple[str, ...] = ()  # keys of the entry, see unread_keys
    typed: tuple[str, ...] = ()  # special tokens in the entry's text, see typed_tokens


class Problem(NamedTuple):
    """An entry that is no sample."""

    kind: str  # a short name, to count by
    message: str
    place: str  # FILE:LINE
    unread: tuple[str, ...] = ()  # keys of the entry, see unread_keys


class Problems:
    """Counts entries that are no samples, and reports each once, as epochs meet them again; names unread keys once."""

    def __init__(self, report: Callable[[Problem], None] | None = None, *, fatal: bool = False):
        self.counts: Counter[str] = Counter()
        self._report, self._fatal = report, fatal
        self._seen: set[str] = set()
        self._unread: set[str] = set()

    def look(self, made: Sample | Problem) -> None:
        """Warn of the keys that were not read, of each once, and of the first few in all."""
        for key in made.unread:
            if key not in self._unread and len(self._unread) < UNREAD:
                self._unread.add(key)
                logger.warning("%s: %s", made.place, unread_message(key))

    def add(self, problem: Problem) -> None:
        """Raises DataError where problems are fatal."""
        if self._fatal:
            raise DataError(f"{problem.place}: {problem.message}")
        self.counts[problem.kind] += 1
        if problem.place not in self._seen:
            self._seen.add(problem.place)
            if self._report is not None:
                self._report(problem)


@dataclass(frozen=True)
class SampleMaker:
    """How entries are read: what the model, its tokenizer and its images are, and the longest row.

    image_token_id: what stands in input_ids where images are; LLaVA's is outside the vocabulary.
    augmentation: what is done to pictures of data sets that ask for it, see augment.py; None: nothing, ever.
    images_first: image placeholders move to the front of their question, as in LLaVA's code.
    captions: conversations are captions of images, written as LLaVA's pretraining has them (labels.plain).
    image_labels: the K of "image_labels" in entries, a list of K numbers for each image, for losses of their own; 0:
        they are not read.
    with_pixels: False leaves pictures undecoded (pixel_values is empty), for counting.
    """

    tokenizer: Tokenizer
    template: Template
    processor: ImageProcessor
    tokens_per_image: int
    image_token_id: int | None
    max_length: int
    image_slots: int
    augmentation: str | None = "crop"
    images_first: bool = False
    captions: bool = False
    image_labels: int = 0
    with_pixels: bool = True

    def __post_init__(self) -> None:
        if self.augmentation is not None and self.augmentation not in AUGMENTATIONS:
            raise DataError(f"there is no augmentation {self.augmentation!r}; there are {' and '.join(AUGMENTATIONS)}")
        if self.image_token_id is None:
            raise DataError(f"the tokenizer has no {IMG_CONTEXT}: it cannot mark images' places")

    @classmethod
    def of(
        cls,
        config: ChatConfig,
        tokenizer: Tokenizer,
        processor: ImageProcessor | None,
        *,
        max_length: int,
        image_slots: int,
        **options: Any,
    ) -> SampleMaker:
        """For a chat model. Raises DataError where its template is not known, its context shorter than a row, or its
        image processor absent."""
        if config.template not in TEMPLATES:
            raise DataError(f"the model's template {config.template!r} is not known; there are {', '.join(TEMPLATES)}")
        if max_length > config.text.max_position_embeddings:
            context = config.text.max_position_embeddings
            raise DataError(f"rows of {max_length} tokens are longer than the model's context of {context}")
        if processor is None:
            raise DataError("the model has no vision tower, or no preprocessor_config.json beside its config.json")
        image_token_id = image_token(config, tokenizer)
        return cls(
            tokenizer,
            TEMPLATES[config.template],
            processor,
            config.tokens_per_image,
            image_token_id,
            max_length,
            image_slots,
            **options,
        )

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample | Problem:
        """The sample of an entry. What is wrong with the entry or its files becomes a Problem."""
        unread: tuple[str, ...] = ()
        try:
            entry = read_entry(record.text)
            unread = unread_keys(entry)
            typed = typed_tokens(self.tokenizer, entry)
            return self._make(entry, record, rng)._replace(unread=unread, typed=typed)
        except SampleError as error:
            kind, message = error.kind, str(error)
        except ImageError as error:
            kind, message = "image", str(error)
        except TokenizerError as error:
            kind, message = "conversation", str(error)
        except MemoryError:
            kind, message = "memory", "it takes more memory than there is"
        return Problem(kind, message, record.place, unread)

    def images_of(self, sample: Sample) -> int:
        """How many images a sample has, by its tokens."""
        return int(np.sum(sample.input_ids == self.image_token_id)) // self.tokens_per_image

    def _make(self, entry: dict[str, Any], record: Record, rng: np.random.Generator) -> Sample:
        names = image_names(entry)
        if len(names) > self.image_slots:
            raise SampleError("too many images", f"{len(names)} images, a batch has {self.image_slots} slots for them")
        turns = labels.place_training_images(
            labels.read_turns(entry.get("conversations")), len(names), first=self.images_first
        )
        template = self.template
        if self.captions:
            turns, template = labels.captions(turns), labels.plain(template)
        ids, targets = labels.build(turns, template, self.tokenizer, self.tokens_per_image, self.image_token_id)
        ids, targets, cut = labels.truncate(ids, targets, self.max_length, self.image_token_id)
        pixels = [self._pixels(record.source, name, rng) for name in names] if self.with_pixels else []
        size = self.processor.image_size
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, size, size), np.float32)
        known = image_labels(entry, len(names), self.image_labels) if self.image_labels else None
        return Sample(ids, targets, stacked, record.place, cut, known)

    def _pixels(self, source: Source, name: str, rng: np.random.Generator) -> np.ndarray:
        image = to_rgb(load_image(source.root / name, honour_exif=False))
        if source.augment and self.augmentation is not None:
            image = augment(image, self.augmentation, rng)
        return self.processor(image)


def image_token(config: ChatConfig, tokenizer: Tokenizer) -> int | None:
    """The token id that stands where images are: the layout's, else the tokenizer's; None where there is neither."""
    return tokenizer.token_to_id(IMG_CONTEXT) if config.image_token_id is None else config.image_token_id


def read_entry(text: bytes) -> dict[str, Any]:
    """An entry as a JSON object. Raises SampleError where it is none."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("annotation", f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise SampleError("annotation", f"not a JSON object, but {type(entry).__name__}")
    return entry


def image_names(entry: dict[str, Any]) -> list[str]:
    """The paths under "image" or "images": one, several, or none ("", null and [] too, as in the reference).

    Raises SampleError for anything else.
    """
    if not _empty(entry.get("video")):
        raise SampleError("annotation", "a video: write its frames as images")
    found: list[list[str]] = []
    for key in ("image", "images"):
        names = entry.get(key)
        if _empty(names):
            continue
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SampleError("annotation", f'"{key}" must be a path or a list of paths')
        found.append(names)
    if len(found) == 2 and found[0] != found[1]:
        raise SampleError("annotation", 'the entry has both "image" and "images": leave one out')
    return found[0] if found else []


def _empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def unread_keys(entry: dict[str, Any]) -> tuple[str, ...]:
    """The keys of an entry, and of its turns as "conversations: KEY", that say something and that nothing reads.

    Not those which published data sets have beside what is read (sizes, sources, names).
    """
    keys = [key for key, value in entry.items() if key not in ENTRY_KEYS and not _empty(value)]
    turns = entry.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        pairs = turn.items() if isinstance(turn, dict) else ()
        keys += [f"conversations: {key}" for key, value in pairs if key not in TURN_KEYS and not _empty(value)]
    return tuple(dict.fromkeys(keys))


def typed_tokens(tokenizer: Tokenizer, entry: dict[str, Any]) -> tuple[str, ...]:
    """The special tokens, like </s> and <img>, that are written in an entry's text: tokens in the reference too.

    Not the placeholders of images, nor the marks of boxes, which data sets write on purpose.
    """
    turns = entry.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    found = (token for text in texts if isinstance(text, str) for token in special_tokens_in(tokenizer, text))
    return tuple(dict.fromkeys(token for token in found if token not in WRITTEN_ON_PURPOSE))


def unread_message(key: str) -> str:
    """What to say of a key that nothing reads."""
    images = bool(re.search("image|img|picture|photo", key, re.IGNORECASE))
    return f'the key "{key[:100]}" is not read' + (': images are read from "image" or "images"' if images else "")


def image_labels(entry: dict[str, Any], images: int, count: int) -> np.ndarray:
    """The numbers under "image_labels", [images,count] int32. Raises SampleError where there are others."""
    try:
        found = np.asarray(entry.get("image_labels", [])).reshape(images, count)
        labels = found.astype(np.int32)
        if found.size and (found.dtype.kind not in "iu" or (labels != found).any()):
            raise ValueError("not of int32")
    except (TypeError, ValueError, OverflowError):
        raise SampleError("annotation", f'"image_labels" must hold {count} whole numbers for each image') from None
    return labels
