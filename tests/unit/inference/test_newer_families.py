"""Chat with InternVL-Chat-V1-2 and InternVL 2, 2.5 and 3.5, from questions and image files to the recorded answers."""

import pytest
from support.newer_cases import BUNDLES, Bundle

import internvl_jax
from internvl_jax.config.conversation_templates import TEMPLATES, default_system
from internvl_jax.inference.prompts import AskOptions
from internvl_jax.inference.replies import Reply
from internvl_jax.processing.boxes import Box

pytest.importorskip("torch")  # the bundles are published checkpoints


@pytest.fixture(scope="module", params=BUNDLES)
def asked(request):
    bundle = Bundle(request.param)
    return bundle, internvl_jax.load(bundle.directory)


def test_prompts(asked):
    """Ids of every prompt: one and several images, combined and separate, turns, frames of a video, Chinese, system."""
    bundle, chat = asked
    for prompt in bundle.facts["prompts"]:
        question, images, history, options = bundle.asked(prompt)
        batch = chat.prompts.build([question], [images], [history], AskOptions(**options))
        assert batch.input_ids[0].tolist() == prompt["input_ids"], prompt["id"]
        assert (0 if batch.pixel_values is None else len(batch.pixel_values)) == sum(prompt["tiles"])


def test_answers(asked):
    bundle, chat = asked
    for prompt in bundle.facts["prompts"]:
        question, images, history, options = bundle.asked(prompt)
        reply = chat.chat(question, images, history, max_new_tokens=16, **options)
        assert reply.tokens == prompt["generated_ids"], prompt["id"]
        expected = prompt.get("response_skip_special", prompt["response"])
        assert reply.text == expected.strip(), prompt["id"]
        assert reply.finish_reason == ("stop" if prompt["finished_by_eos"] else "length")


def test_a_ragged_batch(asked):
    bundle, chat = asked
    batch = bundle.facts["batches"][0]
    images = [[bundle.image(name)] for name in batch["images"]]
    limit = {"max_tiles": batch["max_num"]} if bundle.facts["config"]["dynamic_image_size"] else {}
    replies = chat.batch_chat(batch["questions"], images, honor_exif=False, max_new_tokens=16, **limit)
    expected = bundle.arrays[f"batch/{batch['id']}/generated_ids"]
    for reply, row in zip(replies, expected, strict=True):
        assert reply.tokens == row[: len(reply.tokens)].tolist()
        assert reply.finish_reason == "stop" or len(reply.tokens) == 16


def test_boxes_of_an_answer(asked):
    """The tags are special tokens of most families, which the text of an answer leaves out."""
    _, chat = asked
    tokens = chat.tokenizer.encode("<ref>cat</ref><box>[[100, 200, 300, 400]]</box>")
    reply = Reply("", tokens, "stop", [], prompt_tokens=1, timings={})
    assert chat.boxes(reply, 2000, 500) == [Box("cat", 200, 100, 600, 200)]


def test_the_default_system_message_of_hermes():
    """V1-2's, and the later one of models that cut images into tiles; a checkpoint's own comes before both."""
    chinese = TEMPLATES["internlm2-chat"].system
    assert [default_system("Hermes-2", tiled) for tiled in (False, True)] == ["Answer the questions.", chinese]
    bundle = Bundle("internvl2_5_qwen2")
    chat = internvl_jax.load(bundle.directory, template="Hermes-2")
    ids = chat.prompts.build(["Hi"]).input_ids[0]
    assert chat.tokenizer.decode(ids, skip_special_tokens=False).startswith(f"<|im_start|>system\n{chinese}<|im_end|>")
