"""Training of InternVL-Chat-V1-2 and later is refused before anything is read."""

import pytest
from support.newer_cases import BUNDLES, Bundle

from internvl_jax.config import load_config
from internvl_jax.data.annotations import DataError
from internvl_jax.data.samples import SampleMaker
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", BUNDLES)
def test_training_is_refused(name):
    directory = Bundle(name).directory
    config = load_config(directory)
    tokenizer, processor = load_tokenizer(directory), load_processor(directory, config)
    with pytest.raises(DataError, match=f"not implemented for the template '{config.template}'"):
        SampleMaker.for_model(config, tokenizer, processor, max_length=128, image_slots=1)
