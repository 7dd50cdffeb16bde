"""Compare this implementation with the PyTorch reference on the same inputs, a layer at a time from disk.

Both sides run as chains: pixels, embeddings, every vision layer, features, projector, every language layer, logits.
Each stage has two errors. "local": both get the reference's input, so the error is made in this very stage.
"accumulated": each side gets its own chain's input, so the error is what the whole way up to here comes to. A wrong
tensor or a wrong formula fails the local comparison where it is, and the accumulated one from there on.

Errors are relative to |reference| + its root mean square over the array, entry by entry, the largest counts: towers of
this size have a few channels a thousand times larger than the rest, which an absolute limit cannot serve.

Norms with a wrong epsilon hardly differ on inputs of ordinary size. So the first layer of each tower and the projector
are also run on the same inputs shrunk to a root mean square of 1e-3 (stages ending in "~0").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import methodcaller
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from internvl_jax import checkpoint
from internvl_jax.config import (
    ChatConfig,
    ConfigError,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    find_vision_tower,
    load_config,
)
from internvl_jax.config.conversation_templates import IMG_CONTEXT, TEMPLATES
from internvl_jax.models import chat_model, intern_vit, llama, projector
from internvl_jax.models.layers import Params
from internvl_jax.processing.conversation import place_images, prepare_prompt
from internvl_jax.processing.images import ImageProcessor, load_image, load_processor
from internvl_jax.processing.tokenizer import encode_prompt, load_tokenizer
from internvl_jax.utils.files import read_json_object

try:
    from checkpoints_convert.files import peak_rss
    from checkpoints_convert.mapping import Tensor, plan, tensors
    from checkpoints_convert.parity_report import TINY, Distribution, Errors, ParityError, Report, Stage, rms
    from checkpoints_convert.readers import Weights, open_checkpoint
    from checkpoints_convert.reference import Reference
except ImportError as missing:
    raise ImportError(
        f"comparing with the PyTorch reference needs more packages ({missing}): pip install 'internvl-jax[convert]'"
    ) from None

Progress = Callable[[int, int, str], None]
Run = Callable[[Any], np.ndarray]  # a stage with its weights: hidden state in, hidden state out

DEFAULT_PROMPT = "Please describe the image in detail."
RANDOM_TOKENS = 64  # length of the prompt where a checkpoint has no tokenizer
SMALL = 1e-3


def run_parity(
    checkpoint_dir: str | Path,
    *,
    image: str | Path | None = None,
    prompt: str | None = None,
    reference: str | Path | None = None,
    vision_tower: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both implementations, one layer in memory at a time, and return how far each stage differs.

    checkpoint_dir: what this implementation runs, a published directory or a converted one.
    reference: the published directory that the PyTorch reference runs. None: checkpoint_dir itself; a converted one
        then gives the reference its weights through the mapping table backwards, which shows errors of the
        computation but none of the conversion.
    vision_tower: the directory of the vision tower, where the layout has one of its own. None: it is looked for in the
        directories and beside them (config.find_vision_tower).
    image: an image, for models with a vision tower; None: one that is drawn here. Without preprocessor_config.json
        both sides get the same random pixels.
    prompt: a question; None: a description is asked for. Without tokenizer files both sides get the same random tokens.
        The tokens are this project's (transformers 5's LlamaTokenizer gets V1-1's prompts wrong).
    progress: called as progress(done_bytes, total_bytes, what) while weights are read.
    Raises ParityError, ConfigError, ConversionError or CheckpointError (ValueErrors all) before any layer runs.
    """
    started = time.perf_counter()
    ours_dir = Path(checkpoint_dir)
    theirs_dir = ours_dir if reference is None else Path(reference)
    for directory in (ours_dir, theirs_dir):
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: pass the one that holds config.json")
    towers = [
        find_vision_tower(path, read_json_object(path / "config.json", ConfigError), vision_tower)
        for path in (ours_dir, theirs_dir)
    ]
    config, theirs_config = (load_config(path, vision_tower) for path in (ours_dir, theirs_dir))
    _check_same_model(config, theirs_config, ours_dir, theirs_dir)
    with _Source(ours_dir, config, towers[0]) as source, _Source(theirs_dir, theirs_config, towers[1]) as published:
        total = source.bytes_needed + published.bytes_needed
        judge = Reference(theirs_dir, published.keys, published.theirs, towers[1])
        ours = _Ours(config, load_processor(ours_dir, config, towers[0]), source)
        inputs = _prepare(config, ours_dir, ours.processor is not None, image, prompt)
        report = Report(
            ours_dir, theirs_dir, inputs.image_name, inputs.prompt, 0 if inputs.ids is None else len(inputs.ids)
        )

        def tick(what: str) -> None:
            if progress is not None:
                progress(source.bytes_read + published.bytes_read, total, what)

        chains = _Chains(judge, ours, report, tick)
        if config.vision is not None:
            chains.vision(inputs)
        if config.text is not None:
            chains.text(inputs)
    report.seconds = time.perf_counter() - started
    report.peak_rss = peak_rss()
    return report


class _Chains:
    """The two implementations' hidden states side by side, and the stages that advance them."""

    def __init__(self, judge: Reference, ours: _Ours, report: Report, tick: Callable[[str], None]):
        self._judge, self._ours, self._report, self._tick = judge, ours, report, tick
        self._theirs: Any = None  # the reference's hidden state
        self._mine: Any = None

    def vision(self, inputs: _Inputs) -> None:
        judge, ours = self._judge, self._ours
        if inputs.image is None:
            self._theirs = self._mine = inputs.pixels
        else:
            self._theirs, self._mine = judge.pixels(inputs.image), ours.pixels(inputs.image)
            self._add("pixels", "pixels", None, Errors.of(self._theirs, self._mine))
        self._step("vision.embeddings", "op", methodcaller("vision_embeddings"))
        # Either side counts for itself how many layers select_layer runs.
        counts = (judge.num_vision_layers, ours.num_vision_layers)
        states = {0: (self._theirs, self._mine)}
        for layer in range(max(counts)):
            self._step(f"vision.layers.{layer}", "block", methodcaller("vision_layer", layer), probe=layer == 0)
            if layer + 1 in counts:
                states[layer + 1] = (self._theirs, self._mine)
        self._theirs, self._mine = states[counts[0]][0], states[counts[1]][1]
        if ours.has_projector:
            self._step("features", "op", methodcaller("features"), local_input=states[counts[1]][0])
            self._step("projector", "block", methodcaller("projector"), probe=True)

    def text(self, inputs: _Inputs) -> None:
        self._step("text.embeddings", "op", methodcaller("text_embeddings", inputs.ids, inputs.image_token_id))
        for layer in range(self._judge.num_text_layers):
            self._step(f"text.layers.{layer}", "block", methodcaller("text_layer", layer), probe=layer == 0)
        self._step("text.norm", "op", methodcaller("text_norm"))
        self._step("logits", "op", methodcaller("logits"))
        self._report.distribution = Distribution.of(self._theirs, self._mine)

    def _step(
        self,
        name: str,
        kind: str,
        load: Callable[[Any], Run],
        *,
        local_input: np.ndarray | None = None,
        probe: bool = False,
    ) -> None:
        """Load a stage's weights on one side, run it, drop them; then the other side.

        local_input: what our side gets for the local comparison, the reference's own input by default.
        """
        small = self._theirs * np.float32(SMALL / max(rms(self._theirs), TINY)) if probe else None
        run = load(self._judge)
        theirs, theirs_small = run(self._theirs), run(small) if probe else None
        del run
        self._tick(name)
        run = load(self._ours)
        local = Errors.of(theirs, run(self._theirs if local_input is None else local_input))
        mine = run(self._mine)
        self._add(name, kind, local, Errors.of(theirs, mine))
        if probe:
            self._add(f"{name}~0", "probe", Errors.of(theirs_small, run(small)), None)
        del run
        self._tick(name)
        self._theirs, self._mine = theirs, mine

    def _add(self, name: str, kind: str, local: Errors | None, accumulated: Errors | None) -> None:
        self._report.stages.append(Stage(name, kind, local, accumulated))


# This implementation's stages, on the modules of internvl_jax.models. Compiled once for all layers of a tower.


@partial(jax.jit, static_argnames="config")
def _vision_embeddings(params: Params, x: jax.Array, config: VisionConfig) -> jax.Array:
    return intern_vit.Embeddings(config, jnp.float32).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _vision_layer(params: Params, x: jax.Array, config: VisionConfig) -> jax.Array:
    return intern_vit.Block(config, jnp.float32).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _features(params: Params, x: jax.Array, config: ChatConfig) -> jax.Array:
    side = config.image_size // config.vision.patch_size
    grid = x[:, 1:].reshape(x.shape[0], side, side, -1)
    folded = projector.pixel_unshuffle(grid, config.unshuffle, config.ps_version)
    return folded.reshape(x.shape[0], -1, folded.shape[-1])


@partial(jax.jit, static_argnames="config")
def _projector(params: Params, x: jax.Array, config: ProjectorConfig) -> jax.Array:
    return projector.Projector(config).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _text_layer(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    # Llama returns the last layer's output after the final norm only, so two run; XLA drops the second.
    layers = {"layers": (params, params), "norm": {"scale": jnp.ones(config.hidden_size)}}
    positions = jnp.arange(x.shape[1])[None]
    valid = jnp.ones_like(positions, bool)
    _, _, out = llama.Llama(config).apply({"params": layers}, x, positions, valid, collect=True)
    return out["hidden_states"][1]


@partial(jax.jit, static_argnames="config")
def _text_norm(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    return llama.RMSNorm((config.hidden_size,), config.rms_norm_eps).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    return llama.Llama(config).apply({"params": {_head(config): params}}, x, method="logits")


def _head(config: TextConfig) -> str:
    return "embed_tokens" if config.tie_word_embeddings else "lm_head"


class _Ours:
    """This implementation under the same stages as Reference.

    The weights pass through the mapping table, or come from a converted directory as they stand there.
    """

    def __init__(self, config: ChatConfig, processor: ImageProcessor | None, source: _Source):
        self._config, self._source = config, source
        self.processor = processor
        self.has_projector = config.projector is not None
        self.num_vision_layers = 0 if config.vision is None else config.num_vision_layers

    def pixels(self, image: Image.Image) -> np.ndarray:
        return self.processor(image)[None]

    def vision_embeddings(self) -> Run:
        return self._stage(_vision_embeddings, self._config.vision, "vision_model/embeddings")

    def vision_layer(self, layer: int) -> Run:
        return self._stage(_vision_layer, self._config.vision, "vision_model/layers", layer)

    def features(self) -> Run:
        return lambda x: np.asarray(_features({}, jnp.asarray(x), self._config))

    def projector(self) -> Run:
        return self._stage(_projector, self._config.projector, "mlp1")

    def text_embeddings(self, ids: np.ndarray, image_token_id: int | None) -> Run:
        params = {"language_model": {"embed_tokens": self._source.ours("language_model/embed_tokens")}}
        model = chat_model.InternVLChat(self._config)
        return lambda features: np.asarray(
            model.apply({"params": params}, jnp.asarray(ids)[None], features, image_token_id, method="embed_prompt")
        )

    def text_layer(self, layer: int) -> Run:
        return self._stage(_text_layer, self._config.text, "language_model/layers", layer)

    def text_norm(self) -> Run:
        return self._stage(_text_norm, self._config.text, "language_model/norm")

    def logits(self) -> Run:
        return self._stage(_logits, self._config.text, f"language_model/{_head(self._config.text)}")

    def _stage(self, function: Callable[..., jax.Array], config: Any, part: str, layer: int | None = None) -> Run:
        params = self._source.ours(part, layer)
        return lambda x: np.asarray(function(params, jnp.asarray(x), config))


class _Source:
    """A published or a converted directory, read one tensor at a time under either side's names."""

    def __init__(self, directory: Path, config: ChatConfig, tower: Path | None):
        self._leaves = _leaves(config)
        self._weights: Weights | None = None
        self._names: dict[str, str] = {}  # the tables' key -> the files'
        if checkpoint.is_converted(directory):
            self._reader = checkpoint.Reader(directory)
            if any(name.endswith(f"/{checkpoint.QVALUE}") for name in self._reader.leaves):
                raise ParityError(
                    f"{directory} is quantized, which is not what the reference computes: compare the checkpoint that "
                    "was converted without --quantize"
                )
            stored = {name: shape for name, (shape, _) in self._reader.leaves.items()}
            checkpoint.check_shapes(directory, self._leaves, stored)
            self._tensors = {tensor.key: tensor for tensor in tensors(config)}
        else:
            self._weights = open_checkpoint(directory, tower)
            matched = plan(config, self._weights.shapes)
            self._tensors = {tensor.key: tensor for tensor in matched.values()}
            self._names = {tensor.key: name for name, tensor in matched.items()}
        self.bytes_read = 0
        # Layers past select_layer never run.
        last = config.num_vision_layers if config.vision is not None else 0
        self.bytes_needed = sum(
            self._size(tensor)
            for tensor in self._tensors.values()
            if not (tensor.path.startswith("vision_model/layers/") and tensor.index[0] >= last)
        )

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def theirs(self, key: str) -> np.ndarray:
        """A tensor by its published name, in its published shape and stored dtype."""
        tensor = self._tensors[key]
        self.bytes_read += self._size(tensor)
        if self._weights is not None:
            return self._weights.read(self._names[key])
        return tensor.to_theirs(self._reader.read(tensor.path, tensor.index))

    def ours(self, part: str, layer: int | None = None) -> Params:
        """The subtree of our parameters called `part`, of one layer where it is a stack; float32."""
        tree: Params = {}
        index = () if layer is None else (layer,)
        for name, leaf in self._leaves.items():
            if not name.startswith(f"{part}/"):
                continue
            *parents, last = name[len(part) + 1 :].split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = self._leaf(name, leaf.shape[len(index) :], index)
        return tree

    def _leaf(self, name: str, shape: tuple[int, ...], index: tuple[int, ...]) -> jax.Array:
        sources = [t for t in self._tensors.values() if t.path == name and t.index[: len(index)] == index]
        self.bytes_read += sum(map(self._size, sources))
        if self._weights is None:
            values = self._reader.read(name, index)
        else:
            parts = [(t.index[len(index) :], t.to_ours(self._weights.read(self._names[t.key]))) for t in sources]
            values = parts[0][1]
            if parts[0][0]:  # q, k and v of a fused leaf
                values = np.empty(shape, values.dtype)
                for part, of_part in parts:
                    values[part] = of_part
        # Upcast by jax: a float32 copy in numpy besides would be the peak of memory.
        return jnp.asarray(values).astype(jnp.float32)

    def _size(self, tensor: Tensor) -> int:
        if self._weights is not None:
            itemsize = self._weights.dtypes[self._names[tensor.key]].itemsize
        else:
            itemsize = self._reader.leaves[tensor.path][1].itemsize
        return math.prod(tensor.shape) * itemsize

    def __enter__(self) -> _Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._weights is not None:
            self._weights.close()


@dataclass(frozen=True)
class _Inputs:
    """What both sides read."""

    image_name: str | None
    image: Image.Image | None  # pixels are a stage of their own then
    pixels: np.ndarray | None  # [1,3,S,S], where there is no image
    prompt: str | None
    ids: np.ndarray | None  # [T]
    image_token_id: int | None


def _prepare(
    config: ChatConfig, directory: Path, has_processor: bool, image: str | Path | None, prompt: str | None
) -> _Inputs:
    """Image and prompt, or random stand-ins where the checkpoint lacks the files to make them from."""
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    random = np.random.RandomState(0)
    name, opened, pixels = None, None, None
    if image is not None and (config.vision is None or not has_processor):
        lacks = "vision tower" if config.vision is None else "preprocessor_config.json"
        raise ParityError(f"{directory} has no {lacks}: leave --image out")
    if prompt is not None and (config.text is None or not has_tokenizer):
        raise ParityError(
            f"{directory} has no {'language model' if config.text is None else 'tokenizer'}: leave --prompt out"
        )
    if config.vision is not None and has_processor:
        name = "drawn" if image is None else str(image)
        # The reference ignores EXIF orientation.
        opened = draw_image() if image is None else load_image(image, honour_exif=False)
    elif config.vision is not None:
        name, size = "random", config.image_size
        pixels = random.standard_normal((1, config.vision.num_channels, size, size)).astype(np.float32)
    if config.text is None:
        return _Inputs(name, opened, pixels, None, None, None)

    count = config.tokens_per_image if config.projector is not None else 0
    image_token_id = config.image_token_id
    if not has_tokenizer:
        if count and image_token_id is None:
            raise ParityError(f"{directory} has no tokenizer files, which say what the image token is: add them")
        tokens = random.randint(0, config.text.vocab_size, RANDOM_TOKENS)
        tokens = tokens[tokens != image_token_id]
        ids = [image_token_id] * count + tokens.tolist()
    else:
        tokenizer = load_tokenizer(directory)
        prompt = DEFAULT_PROMPT if prompt is None else prompt
        template = TEMPLATES.get(config.template)
        image_token = IMG_CONTEXT if template is None else template.image[1]
        image_token_id = tokenizer.token_to_id(image_token) if image_token_id is None else image_token_id
        if count and image_token_id is None:
            raise ParityError(f"{directory}: the tokenizer has no {image_token}, so images have no place in a prompt")
        if template is not None:
            placed = place_images(prompt, 1 if count else 0, has_history=False)
            text = prepare_prompt(template, placed, (), 1 if count else 0, count)
            ids = encode_prompt(tokenizer, text, image_token, image_token_id)
        else:
            ids = [image_token_id] * count + tokenizer.encode(prompt)
    limit = config.text.max_position_embeddings
    if len(ids) > limit:
        raise ParityError(f"the prompt has {len(ids)} tokens, the model's context {limit}: ask something shorter")
    return _Inputs(name, opened, pixels, prompt, np.asarray(ids, np.int32), image_token_id)


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


@lru_cache(maxsize=8)
def _leaves(config: ChatConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Our parameters by name."""
    return dict(checkpoint.named_leaves(chat_model.abstract_params(config)))


def _check_same_model(ours: ChatConfig, theirs: ChatConfig, ours_dir: Path, theirs_dir: Path) -> None:
    a, b = ({name: leaf.shape for name, leaf in _leaves(config).items()} for config in (ours, theirs))
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if different:
        raise ParityError(
            f"{ours_dir} and {theirs_dir} are not the same model: "
            + ", ".join(f"{n} {list(a.get(n, ()))} and {list(b.get(n, ()))}" for n in different[:3])
            + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        )
