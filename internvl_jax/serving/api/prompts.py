"""From the messages of a request to the engine's prompt, with the prompt builder that offline inference uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from internvl_jax.inference.chat import Chat
from internvl_jax.inference.prompts import AskOptions
from internvl_jax.processing.conversation import Turn, unused_character
from internvl_jax.serving.api.errors import ApiError
from internvl_jax.serving.api.protocol import ImagePart, Message
from internvl_jax.serving.api.settings import ServerSettings
from internvl_jax.serving.caches import make_images
from internvl_jax.serving.requests import PromptImage

CHARACTERS_PER_TOKEN = 32  # more than a token of any text has: a longer prompt is refused before it is tokenized


@dataclass(frozen=True)
class Prompt:
    """A prompt for the engine.

    Attributes:
        input_ids: its tokens, with image tokens in place.
        images: its images in order.
    """

    input_ids: tuple[int, ...]
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for one model.

    Attributes:
        chat: the model.
        settings: limits.
        read_image: reads the image of a URL, scaled to the model's size; takes its URL, and its field for errors.
        room: tokens that prompt and answer have together.
    """

    chat: Chat
    settings: ServerSettings
    read_image: Callable[[str, str], Image.Image]
    room: int

    def conversation(self, messages: Sequence[Message], salt: str) -> Prompt:
        """The prompt of a conversation.

        Args:
            messages: a system message or none, then questions and answers in turn, and a question at the end.
            salt: keeps a tenant's cached images apart.

        Raises:
            ApiError: the messages have another order, or a text or an image cannot be used.
        """
        self._check_length(text for message in messages for text in _texts(message))
        system, asked = _split(messages)
        mark = unused_character(*(text for message in messages for text in _texts(message)))
        urls = [
            (part.image_url.url, f"messages.{number}.content.{index}.image_url.url")
            for number, message in enumerate(messages)
            if not isinstance(message.content, str)
            for index, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]
        if len(urls) > self.settings.max_images:
            limit = self.settings.max_images
            raise ApiError(400, f"{len(urls)} images, and this server takes {limit}", "too_many_images", "messages")
        texts = [_placed(message, mark) for message in asked]
        counts = [_num_images(message) for message in asked]
        history = [Turn((texts[at], texts[at + 1]), counts[at]) for at in range(0, len(texts) - 1, 2)]
        options = AskOptions(system=system, image_mark=mark)
        images = [self.read_image(url, field) for url, field in urls]
        try:
            batch = self.chat.prompts.build([texts[-1]], [images], [history], options)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "messages") from error
        pixels = [] if batch.pixel_values is None else list(batch.pixel_values)
        return Prompt(tuple(batch.input_ids[0].tolist()), self._images(pixels, salt))

    def text(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """The prompt of a text as it is. Special tokens in it are ordinary text.

        Raises:
            ApiError: the text cannot be tokenized.
        """
        self._check_length([text])
        tokenizer = self.chat.tokenizer
        assert tokenizer is not None  # Engine checks that the model can answer
        try:
            ids = tokenizer.encode(text, None if add_special_tokens else False, [(0, len(text))])
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "prompt") from error
        if not ids:
            raise ApiError(400, "the prompt is empty", "invalid_prompt", "prompt")
        return Prompt(tuple(ids))

    def _images(self, pixels: list[np.ndarray], salt: str) -> tuple[PromptImage, ...]:
        return make_images(pixels, self.chat.name, salt)

    def _check_length(self, texts: Iterable[str]) -> None:
        length = sum(map(len, texts))
        if length > CHARACTERS_PER_TOKEN * self.room:
            raise ApiError(
                400,
                f"the text has {length:,} characters, and prompt and answer have room for {self.room:,} tokens",
                "context_length_exceeded",
                "messages",
            )


def _split(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The system message, and the questions and answers."""
    system = None
    if messages[0].role in ("system", "developer"):
        if _num_images(messages[0]):
            raise ApiError(400, "a system message has no images", "invalid_prompt", "messages.0.content")
        system, messages = "\n".join(_texts(messages[0])), messages[1:]
    for number, message in enumerate(messages):
        wanted, at = "assistant" if number % 2 else "user", number + (system is not None)
        if message.role != wanted:
            raise ApiError(
                400,
                f"message {at} is from {message.role!r} where one from {wanted!r} is expected: after a system message "
                "or none, questions of the user and answers of the assistant alternate",
                "invalid_prompt",
                f"messages.{at}.role",
            )
        if message.role == "assistant" and _num_images(message):
            raise ApiError(400, "an answer has no images", "invalid_prompt", f"messages.{at}.content")
    if len(messages) % 2 == 0:
        raise ApiError(400, "the last message must be a question of the user", "invalid_prompt", "messages")
    return system, messages


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if not isinstance(part, ImagePart)]


def _num_images(message: Message) -> int:
    return 0 if isinstance(message.content, str) else sum(isinstance(part, ImagePart) for part in message.content)


def _placed(message: Message, mark: str) -> str:
    """The text of a message with a mark for each image.

    Images before or after the text stand before it, as in the models' training: one mark for all of them, which the
    prompt builder expands. Among texts each stands where it was put.
    """
    texts, images = "\n".join(_texts(message)), _num_images(message)
    if isinstance(message.content, str) or not images:
        return texts
    is_image = [isinstance(part, ImagePart) for part in message.content]
    first, last = is_image.index(True), len(is_image) - 1 - is_image[::-1].index(True)
    if all(is_image[first : last + 1]) and (first == 0 or last == len(is_image) - 1):
        return f"{mark}\n{texts}"
    return "\n".join(mark if isinstance(part, ImagePart) else part.text for part in message.content)
