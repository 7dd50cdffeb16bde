"""From one entry of an annotation file to a sample, or to a problem that says what is wrong with it and where."""

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

MAX_UNREAD_KEYS = 20  # unread keys that are reported by name

# Keys that are read, and keys of published data sets that carry nothing to train on.
ENTRY_KEYS = frozenset(
    "conversations image images image_labels video id "
    "width height width_list height_list image_size image_id question_id length token_count "
    "source data_source dataset dataset_name type task task_type category model metadata meta".split()
)
TURN_KEYS = frozenset("from value id markdown text".split())
# Special tokens that data sets write on purpose.
INTENDED_TOKENS = frozenset((IMAGE_PLACEHOLDER, "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))


class Sample(NamedTuple):
    """A tokenized conversation with its images.

    Attributes:
        input_ids: [T] int32.
        labels: [T] int32, IGNORED where unsupervised.
        pixel_values: [M,3,S,S] float32, normalized images in the order of their tokens.
        location: FILE:LINE.
        truncated: the conversation was longer.
        image_labels: [M,K] int32, or None where SampleMaker.image_labels is 0.
        unread_keys: of the entry, see `unread_keys`.
        special_tokens: in the entry's text, see `special_tokens_in_entry`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: np.ndarray
    location: str
    truncated: bool
    image_labels: np.ndarray | None = None
    unread_keys: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()


class Problem(NamedTuple):
    """An invalid annotation.

    Attributes:
        kind: a short name, by which problems are counted.
        message: what is wrong.
        location: FILE:LINE.
        unread_keys: of the entry, see `unread_keys`.
    """

    kind: str
    message: str
    location: str
    unread_keys: tuple[str, ...] = ()


class ProblemLog:
    """Counts invalid annotations and reports each one once, although every epoch meets it again.

    Args:
        report: called with each problem once.
        fatal: raise an error at the first one instead.

    Attributes:
        counts: number of problems by kind.
    """

    def __init__(self, report: Callable[[Problem], None] | None = None, *, fatal: bool = False):
        self.counts: Counter[str] = Counter()
        self._report, self._fatal = report, fatal
        self._reported: set[str] = set()
        self._unread_keys: set[str] = set()

    def warn_of_unread_keys(self, item: Sample | Problem) -> None:
        """Warn of keys that are not read: of each once, and of MAX_UNREAD_KEYS in all."""
        for key in item.unread_keys:
            if key not in self._unread_keys and len(self._unread_keys) < MAX_UNREAD_KEYS:
                self._unread_keys.add(key)
                logger.warning("%s: %s", item.location, unread_message(key))

    def add(self, problem: Problem) -> None:
        """Count a problem.

        Raises:
            DataError: problems are fatal.
        """
        if self._fatal:
            raise DataError(f"{problem.location}: {problem.message}")
        self.counts[problem.kind] += 1
        if problem.location not in self._reported:
            self._reported.add(problem.location)
            if self._report is not None:
                self._report(problem)


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples of records, for one model.

    Attributes:
        tokenizer: the model's tokenizer.
        template: its conversation template.
        processor: its image processor.
        tokens_per_image: visual tokens of an image.
        image_token_id: the token of images in input_ids; LLaVA's is outside the vocabulary.
        max_length: tokens per sample; longer conversations are truncated.
        image_slots: images per batch; no sample may have more.
        augmentation: of images in data sets that ask for it, a name in augment.AUGMENTATIONS; None for none.
        images_first: move image placeholders to the front of their question, as LLaVA does.
        captions: conversations are captions of images, as in LLaVA's pretraining (`labels.plain`).
        image_labels: K, the number of integers per image under "image_labels" of an entry; 0 to ignore that key.
        with_pixels: decode images; otherwise pixel_values is empty.

    Raises:
        DataError: the augmentation is unknown.
    """

    tokenizer: Tokenizer
    template: Template
    processor: ImageProcessor
    tokens_per_image: int
    image_token_id: int
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

    @classmethod
    def for_model(
        cls,
        config: ChatConfig,
        tokenizer: Tokenizer,
        processor: ImageProcessor | None,
        *,
        max_length: int,
        image_slots: int,
        **options: Any,
    ) -> SampleMaker:
        """The SampleMaker of a chat model.

        Args:
            config: the model's configuration.
            tokenizer: its tokenizer.
            processor: its image processor.
            max_length: tokens per sample.
            image_slots: images per batch.
            **options: other fields.

        Raises:
            DataError: the model's template is unknown, its context shorter than `max_length`, or it has no image
                processor or image token.
        """
        if config.template not in TEMPLATES:
            raise DataError(f"the model's template {config.template!r} is not known; there are {', '.join(TEMPLATES)}")
        if TEMPLATES[config.template].stop is not None or config.dynamic_image_size:
            raise DataError(
                f"training is not implemented for the template {config.template!r} and for images that are cut into "
                "tiles (InternVL-Chat-V1-2 and later)"
            )
        context = config.required_text.max_position_embeddings
        if max_length > context:
            raise DataError(f"rows of {max_length} tokens are longer than the model's context of {context}")
        if processor is None:
            raise DataError("the model has no vision tower, or no preprocessor_config.json beside its config.json")
        image_token_id = config.image_token_id
        if image_token_id is None:
            image_token_id = tokenizer.token_to_id(IMG_CONTEXT)
        if image_token_id is None:
            raise DataError(f"the tokenizer has no {IMG_CONTEXT}, so images have no place in a prompt")
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
        """Make the sample of a record, or a Problem if the entry or its images are invalid.

        Args:
            record: an entry.
            rng: randomness of the augmentation.
        """
        unread: tuple[str, ...] = ()
        try:
            entry = read_entry(record.text)
            unread = unread_keys(entry)
            special = special_tokens_in_entry(self.tokenizer, entry)
            return self._make(entry, record, rng)._replace(unread_keys=unread, special_tokens=special)
        except SampleError as error:
            kind, message = error.kind, str(error)
        except ImageError as error:
            kind, message = "image", str(error)
        except TokenizerError as error:
            kind, message = "conversation", str(error)
        except MemoryError:
            kind, message = "memory", "it needs more memory than is available"
        return Problem(kind, message, record.location, unread)

    def count_images(self, sample: Sample) -> int:
        """The number of a sample's images, by its tokens."""
        return int(np.sum(sample.input_ids == self.image_token_id)) // self.tokens_per_image

    def _make(self, entry: dict[str, Any], record: Record, rng: np.random.Generator) -> Sample:
        names = image_names(entry)
        if len(names) > self.image_slots:
            raise SampleError("too many images", f"{len(names)} images, but a batch has {self.image_slots} image slots")
        turns = labels.place_training_images(
            labels.read_turns(entry.get("conversations")), len(names), first=self.images_first
        )
        template = self.template
        if self.captions:
            turns, template = labels.captions(turns), labels.plain(template)
        ids, targets = labels.build(turns, template, self.tokenizer, self.tokens_per_image, self.image_token_id)
        ids, targets, truncated = labels.truncate(ids, targets, self.max_length, self.image_token_id)
        pixels = [self._pixels(record.source, name, rng) for name in names] if self.with_pixels else []
        size = self.processor.image_size
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, size, size), np.float32)
        numbers = image_labels(entry, len(names), self.image_labels) if self.image_labels else None
        return Sample(ids, targets, stacked, record.location, truncated, numbers)

    def _pixels(self, source: Source, name: str, rng: np.random.Generator) -> np.ndarray:
        image = to_rgb(load_image(source.root / name, honor_exif=False))
        if source.augment and self.augmentation is not None:
            image = augment(image, self.augmentation, rng)
        return self.processor(image)


def read_entry(text: bytes) -> dict[str, Any]:
    """Parse an entry.

    Raises:
        SampleError: it is not a JSON object.
    """
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("annotation", f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise SampleError("annotation", f"not a JSON object, but {type(entry).__name__}")
    return entry


def image_names(entry: dict[str, Any]) -> list[str]:
    """The paths under "image" or "images" of an entry: one, several or none ("", null, []).

    Raises:
        SampleError: the value is something else, or there is a video.
    """
    if not _empty(entry.get("video")):
        raise SampleError("annotation", "a video: write its frames as images")
    values: list[list[str]] = []
    for key in ("image", "images"):
        names = entry.get(key)
        if _empty(names):
            continue
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SampleError("annotation", f'"{key}" must be a path or a list of paths')
        values.append(names)
    if len(values) == 2 and values[0] != values[1]:
        raise SampleError("annotation", 'the entry has both "image" and "images": leave one out')
    return values[0] if values else []


def _empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def unread_keys(entry: dict[str, Any]) -> tuple[str, ...]:
    """Keys of an entry, and of its turns as "conversations: KEY", that have a value but are not read.

    Keys that published data sets are known to have (sizes, sources, names) are not listed.
    """
    keys = [key for key, value in entry.items() if key not in ENTRY_KEYS and not _empty(value)]
    turns = entry.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        pairs = turn.items() if isinstance(turn, dict) else ()
        keys += [f"conversations: {key}" for key, value in pairs if key not in TURN_KEYS and not _empty(value)]
    return tuple(dict.fromkeys(keys))


def special_tokens_in_entry(tokenizer: Tokenizer, entry: dict[str, Any]) -> tuple[str, ...]:
    """Special tokens, like </s> and <img>, that the text of an entry spells out.

    They are tokenized as special tokens, as in the reference code. Image placeholders and box marks, which data sets
    write on purpose, are not listed.
    """
    turns = entry.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    found = (token for text in texts if isinstance(text, str) for token in special_tokens_in(tokenizer, text))
    return tuple(dict.fromkeys(token for token in found if token not in INTENDED_TOKENS))


def unread_message(key: str) -> str:
    """The warning about a key that is not read."""
    images = bool(re.search("image|img|picture|photo", key, re.IGNORECASE))
    return f'the key "{key[:100]}" is not read' + (': images are read from "image" or "images"' if images else "")


def image_labels(entry: dict[str, Any], images: int, count: int) -> np.ndarray:
    """The integers under "image_labels", [images,count] int32.

    Raises:
        SampleError: there are not `count` integers for each image.
    """
    try:
        found = np.asarray(entry.get("image_labels", [])).reshape(images, count)
        labels = found.astype(np.int32)
        if found.size and (found.dtype.kind not in "iu" or (labels != found).any()):
            raise ValueError("not of int32")
    except (TypeError, ValueError, OverflowError):
        raise SampleError("annotation", f'"image_labels" must hold {count} whole numbers for each image') from None
    return labels
