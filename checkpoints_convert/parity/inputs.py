"""The inputs of a comparison: image, prompt, or random stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoints_convert.parity.report import ParityError
from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMG_CONTEXT, TEMPLATES
from internvl_jax.processing.conversation import place_images, prepare_prompt
from internvl_jax.processing.images import load_image
from internvl_jax.processing.tokenizer import encode_prompt, load_tokenizer

DEFAULT_PROMPT = "Please describe the image in detail."
RANDOM_TOKENS = 64  # length of the prompt where a checkpoint has no tokenizer


@dataclass(frozen=True)
class ParityInputs:
    """What both sides read.

    Attributes:
        image_name: the image's file, "drawn" or "random"; None without a vision tower.
        image: the image; pixels are a stage of their own then.
        pixels: [1,3,S,S], where there is no image.
        prompt: the question; None for random tokens.
        ids: token ids [T]; None without a language model.
        image_token_id: the id that stands for a visual token.
    """

    image_name: str | None
    image: Image.Image | None
    pixels: np.ndarray | None
    prompt: str | None
    ids: np.ndarray | None
    image_token_id: int | None

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return 0 if self.ids is None else len(self.ids)


def prepare_inputs(
    config: ChatConfig, directory: Path, has_processor: bool, image: str | Path | None, prompt: str | None
) -> ParityInputs:
    """Make image and prompt, or random stand-ins where the checkpoint lacks the files to make them from.

    Args:
        config: the model's configuration.
        directory: the checkpoint's directory.
        has_processor: whether there is a preprocessor_config.json.
        image: an image file; None: an image is drawn.
        prompt: a question; None: DEFAULT_PROMPT.

    Returns:
        The inputs.

    Raises:
        ParityError: an image or a prompt is given that the model cannot take, or the prompt is too long.
    """
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json", "vocab.json"))
    if image is not None and (config.vision is None or not has_processor):
        lacks = "vision tower" if config.vision is None else "preprocessor_config.json"
        raise ParityError(f"{directory} has no {lacks}: leave --image out")
    if prompt is not None and (config.text is None or not has_tokenizer):
        raise ParityError(
            f"{directory} has no {'language model' if config.text is None else 'tokenizer'}: leave --prompt out"
        )
    random = np.random.RandomState(0)
    name, opened, pixels = None, None, None
    if config.vision is not None and has_processor:
        name = "drawn" if image is None else str(image)
        # The reference ignores EXIF orientation.
        opened = draw_image() if image is None else load_image(image, honor_exif=False)
    elif config.vision is not None:
        name, size = "random", config.required_image_size
        pixels = random.standard_normal((1, config.vision.num_channels, size, size)).astype(np.float32)
    if config.text is None:
        return ParityInputs(name, opened, pixels, None, None, None)
    if has_tokenizer:
        prompt = DEFAULT_PROMPT if prompt is None else prompt
        ids, image_token_id = _encode(config, directory, prompt)
    else:
        ids, image_token_id = _random_tokens(config, directory, random), config.image_token_id
    limit = config.text.context
    if len(ids) > limit:
        raise ParityError(f"the prompt has {len(ids)} tokens, the model's context {limit}: ask something shorter")
    return ParityInputs(name, opened, pixels, prompt, np.asarray(ids, np.int32), image_token_id)


def _num_visual_tokens(config: ChatConfig) -> int:
    return config.tokens_per_image if config.projector is not None else 0


def _random_tokens(config: ChatConfig, directory: Path, random: np.random.RandomState) -> list[int]:
    count, image_token_id = _num_visual_tokens(config), config.image_token_id
    tokens = random.randint(0, config.required_text.vocab_size, RANDOM_TOKENS)
    if not count:
        return tokens[tokens != image_token_id].tolist()
    if image_token_id is None:
        raise ParityError(f"{directory} has no tokenizer files, which say what the image token is: add them")
    return [image_token_id] * count + tokens[tokens != image_token_id].tolist()


def _encode(config: ChatConfig, directory: Path, prompt: str) -> tuple[list[int], int | None]:
    """Token ids of the question in the model's template, and the id of the image token."""
    count, image_token_id = _num_visual_tokens(config), config.image_token_id
    tokenizer = load_tokenizer(directory)
    template = None if config.template is None else TEMPLATES.get(config.template)
    image_token = IMG_CONTEXT if template is None else template.image[1]
    image_token_id = tokenizer.token_to_id(image_token) if image_token_id is None else image_token_id
    if count and image_token_id is None:
        raise ParityError(f"{directory}: the tokenizer has no {image_token}, so images have no place in a prompt")
    if template is not None:
        placed = place_images(prompt, 1 if count else 0, has_history=False)
        text = prepare_prompt(template, placed, (), [count] if count else [])
        return encode_prompt(tokenizer, text, image_token, image_token_id), image_token_id
    visual = [] if image_token_id is None else [image_token_id] * count
    return visual + tokenizer.encode(prompt), image_token_id


def draw_image() -> Image.Image:
    """The default test image, 300 x 200: smooth colors, edges, and fine noise, none of them symmetric."""
    across, down = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    values = np.stack([across, down, 255 - (across + down) / 2], axis=-1)
    values[120:180, 20:130] = np.random.RandomState(0).uniform(0, 255, (60, 110, 3))
    image = Image.fromarray(values.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((170, 30, 270, 130), fill=(200, 30, 40), outline=(255, 255, 255), width=4)
    draw.polygon(((40, 90), (90, 15), (140, 80)), fill=(20, 60, 180))
    return image
