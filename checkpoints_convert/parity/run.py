"""Compare this implementation with the PyTorch reference on the same inputs, reading one layer at a time from disk.

Both sides run as chains: pixels, embeddings, every vision layer, features, projector, every language layer, logits.
Each stage has two errors. "local": both sides get the reference's input, so the error arises in this stage.
"accumulated": each side gets the output of its own chain, so the error is that of all stages up to here. A wrong tensor
or formula fails the local comparison of its stage, and the accumulated one from there on.

The error of an entry is relative to |reference| + the array's root mean square, and the largest counts: towers of this
size have a few channels a thousand times larger than the rest, which no absolute limit suits.

A norm with a wrong epsilon hardly differs on inputs of ordinary size. So the first layer of each tower and the
projector are also run on the same inputs scaled to a root mean square of 1e-3 (stages ending in "~0").
"""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.config import ChatConfig, ConfigError, find_vision_tower, load_config
from internvl_jax.processing.images import load_processor
from internvl_jax.utils.files import read_json_object

try:
    from checkpoints_convert.conversion_report import peak_rss
    from checkpoints_convert.parity.inputs import ParityInputs, prepare_inputs
    from checkpoints_convert.parity.reference import Reference
    from checkpoints_convert.parity.report import TINY, Distribution, Errors, ParityError, Report, Stage, rms
    from checkpoints_convert.parity.source import ParitySource, parameter_shapes
    from checkpoints_convert.parity.stages import OurStages, RunStage
except ImportError as missing:
    raise ImportError(
        f"comparing with the PyTorch reference needs more packages ({missing}): pip install 'internvl-jax[convert]'"
    ) from None

Progress = Callable[[int, int, str], None]

SMALL = 1e-3  # root mean square of the inputs on which epsilons show


def run_parity(
    checkpoint_dir: str | Path,
    *,
    image: str | Path | None = None,
    prompt: str | None = None,
    reference: str | Path | None = None,
    vision_tower: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run both implementations, one layer in memory at a time, and report how far each stage differs.

    Token ids are this project's on both sides, because transformers 5's LlamaTokenizer gets V1-1's prompts wrong.

    Args:
        checkpoint_dir: what this implementation runs, a published directory or a converted one.
        image: an image file, for models with a vision tower; None: an image is drawn. Without preprocessor_config.json
            both sides get the same random pixels.
        prompt: a question; None: the model is asked for a description. Without tokenizer files both sides get the same
            random tokens.
        reference: the published directory that the PyTorch reference runs. None: checkpoint_dir itself; the reference
            then gets a converted directory's weights through the inverse of the mapping table, so that errors of the
            computation show, but none of the conversion.
        vision_tower: the directory of the vision tower, where the layout has one of its own; None: it is looked for in
            the directories and beside them (config.find_vision_tower).
        progress: called as progress(done_bytes, total_bytes, what) while weights are read.

    Returns:
        The report.

    Raises:
        ValueError: a ParityError, ConfigError, ConversionError or CheckpointError, before any layer runs.
    """
    started = time.perf_counter()
    ours_dir = Path(checkpoint_dir)
    theirs_dir = ours_dir if reference is None else Path(reference)
    for directory in (ours_dir, theirs_dir):
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: pass the one that holds config.json")
    ours_tower, theirs_tower = (
        find_vision_tower(path, read_json_object(path / "config.json", ConfigError), vision_tower)
        for path in (ours_dir, theirs_dir)
    )
    config, theirs_config = (load_config(path, vision_tower) for path in (ours_dir, theirs_dir))
    _check_same_model(config, theirs_config, ours_dir, theirs_dir)
    with (
        ParitySource(ours_dir, config, ours_tower) as source,
        ParitySource(theirs_dir, theirs_config, theirs_tower) as published,
    ):
        total = source.bytes_needed + published.bytes_needed
        judge = Reference(theirs_dir, published.keys, published.theirs, theirs_tower)
        ours = OurStages(config, load_processor(ours_dir, config, ours_tower), source)
        inputs = prepare_inputs(config, ours_dir, ours.processor is not None, image, prompt)
        report = Report(ours_dir, theirs_dir, inputs.image_name, inputs.prompt, inputs.num_tokens)

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

    def __init__(self, judge: Reference, ours: OurStages, report: Report, tick: Callable[[str], None]):
        self._judge, self._ours, self._report, self._tick = judge, ours, report, tick
        self._theirs: Any = None  # the reference's hidden state
        self._mine: Any = None

    def vision(self, inputs: ParityInputs) -> None:
        """Run the stages from pixels to the projector."""
        judge, ours = self._judge, self._ours
        if inputs.image is None:
            self._theirs = self._mine = inputs.pixels
        else:
            self._theirs, self._mine = judge.pixels(inputs.image), ours.pixels(inputs.image)
            self._add("pixels", "pixels", None, Errors.of(self._theirs, self._mine))
        self._step("vision.embeddings", "op", methodcaller("vision_embeddings"))
        # Each side derives from select_layer how many layers run.
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

    def text(self, inputs: ParityInputs) -> None:
        """Run the stages from the text embeddings to the logits."""
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
        load: Callable[[Any], RunStage],
        *,
        local_input: np.ndarray | None = None,
        probe: bool = False,
    ) -> None:
        """Run a stage on the reference's side and then on ours; each side's weights are dropped after use.

        Args:
            name: the stage's name in the report.
            kind: a key of LIMITS.
            load: reads a side's weights and returns the function that runs the stage.
            local_input: what our side gets for the local comparison; None: the reference's input.
            probe: also run on small inputs.
        """
        run = load(self._judge)
        theirs = run(self._theirs)
        small = theirs_small = None
        if probe:
            small = self._theirs * np.float32(SMALL / max(rms(self._theirs), TINY))
            theirs_small = run(small)
        del run
        self._tick(name)
        run = load(self._ours)
        local = Errors.of(theirs, run(self._theirs if local_input is None else local_input))
        mine = run(self._mine)
        self._add(name, kind, local, Errors.of(theirs, mine))
        if theirs_small is not None:
            self._add(f"{name}~0", "probe", Errors.of(theirs_small, run(small)), None)
        del run
        self._tick(name)
        self._theirs, self._mine = theirs, mine

    def _add(self, name: str, kind: str, local: Errors | None, accumulated: Errors | None) -> None:
        self._report.stages.append(Stage(name, kind, local, accumulated))


def _check_same_model(ours: ChatConfig, theirs: ChatConfig, ours_dir: Path, theirs_dir: Path) -> None:
    a, b = ({name: leaf.shape for name, leaf in parameter_shapes(config).items()} for config in (ours, theirs))
    different = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if different:
        raise ParityError(
            f"{ours_dir} and {theirs_dir} are not the same model: "
            + ", ".join(f"{n} {list(a.get(n, ()))} and {list(b.get(n, ()))}" for n in different[:3])
            + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        )
