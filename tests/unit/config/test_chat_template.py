"""A checkpoint's own chat_template: recognized by what it renders, bounded, and refused where it is another one."""

import json
import shutil
import time

import pytest
from support.golden import DATA

import internvl_jax
from internvl_jax.config import config_from_hf, config_to_hf, load_config
from internvl_jax.config.chat_template import find_template, recognize

HF = DATA / "llava_1_5" / "hf"

# As llava-hf/llava-1.5-7b-hf has it.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = (
    "{{ bos_token }}" + SYSTEM + " {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZH = (
    " {% for m in messages %}{% if m.role == 'user' %}<human>: {{ m.content }} <bot>:{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} "
    "{{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (LLAVA_HF, "vicuna_v1"),
        (VICUNA, "vicuna_v1"),
        (ZH, "internvl_zh"),
        (LLAMA_3, None),
        (LLAMA_2, None),
        (CHATML, None),
        (VICUNA.replace(SYSTEM, "You are a pirate."), None),
        (VICUNA.replace(" {% else %}", "\n{% else %}"), None),  # lines in place of blanks
        (LLAVA_HF.replace("<image>\n", ""), None),  # without a place for images
        ("{{ raise_exception('no') }}", None),
        ("{% for", None),
        ("", None),
        (json.dumps(VICUNA)[:-30], None),
    ],
)
def test_templates_are_known_by_what_they_render(template, name):
    assert recognize(template) == name


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% for a in range(99999) %}{{ 'a long line, again and again' }}{% endfor %}",
        "{% set x = namespace(s='a') %}{% for a in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_hangs_or_grows_or_reaches_out_is_none_of_ours(template):
    start = time.monotonic()
    assert recognize(template) is None
    assert time.monotonic() - start < 60


def write(directory, name, value):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8-sig")


def test_where_the_template_is_looked_for(tmp_path):
    """In transformers' order: what the processor has goes before the tokenizer's."""
    assert find_template(tmp_path, "llava_hf") is None
    write(tmp_path, "tokenizer_config.json", {"chat_template": LLAMA_3})
    assert find_template(tmp_path, "llava_hf") == "the chat_template of tokenizer_config.json"
    named = [{"name": "default", "template": VICUNA}, {"name": "tool_use", "template": LLAMA_3}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert find_template(tmp_path, "llava_hf") == "vicuna_v1"
    write(tmp_path, "processor_config.json", {"chat_template": CHATML})
    assert find_template(tmp_path, "llava_hf") == "the chat_template of processor_config.json"
    write(tmp_path, "chat_template.json", {"chat_template": LLAVA_HF})
    assert find_template(tmp_path, "llava_hf") == "vicuna_v1"
    write(tmp_path, "chat_template.jinja", LLAMA_2)
    assert find_template(tmp_path, "llava_hf") == "the chat_template of chat_template.jinja"
    (tmp_path / "chat_template.jinja").write_text("{# " + "a" * (1 << 20) + " #}" + VICUNA)
    assert find_template(tmp_path, "llava_hf") == "the chat_template of chat_template.jinja"


def test_tokens_are_the_checkpoints(tmp_path):
    template = VICUNA.replace("{{ bos_token }}", "<|b|>").replace("{{ eos_token }}", "<|e|>")
    write(tmp_path, "tokenizer_config.json", {"chat_template": template})
    assert find_template(tmp_path, "llava_hf") != "vicuna_v1"
    tokens = {"bos_token": {"content": "<|b|>"}, "eos_token": "<|e|>"}
    write(tmp_path, "tokenizer_config.json", {"chat_template": template, **tokens})
    assert find_template(tmp_path, "llava_hf") == "vicuna_v1"


def test_llavas_own_layout_goes_by_the_name(tmp_path):
    for name, template in (("llava-v1.5-7b", None), ("LLaVA-Llama-2-13b", "llava_llama_2")):
        (tmp_path / name).mkdir()
        assert find_template(tmp_path / name, "llava") == template
    assert find_template(tmp_path / "LLaVA-Llama-2-13b", "llava_hf") is None


def test_a_template_that_nothing_names_is_said(tmp_path, logged):
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    directory = shutil.copytree(HF, tmp_path / "model")
    internvl_jax.load(directory)
    assert [text.split(": ")[0] for text in logged] == [
        f"{directory} does not say which conversation template it was trained with"
    ]
    internvl_jax.load(directory, template="vicuna_v1")
    write(directory, "chat_template.json", {"chat_template": LLAVA_HF})
    internvl_jax.load(directory)
    assert len(logged) == 1
    (directory / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat_template\.json is not readable JSON"):
        internvl_jax.load(directory)


def test_a_checkpoint_of_another_template_is_not_asked_in_ours(tmp_path):
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    directory = shutil.copytree(HF, tmp_path / "model")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write(directory, "tokenizer_config.json", {**config, "chat_template": LLAMA_3})
    chat = internvl_jax.load(directory)
    with pytest.raises(ValueError, match=r"template 'the chat_template of tokenizer_config.json', and the known"):
        chat.chat("Hello", max_new_tokens=2)
    named = internvl_jax.load(directory, template="vicuna_v1")
    expected = internvl_jax.load(HF).chat("Hello", max_new_tokens=2)
    assert named.chat("Hello", max_new_tokens=2).tokens == expected.tokens
    with pytest.raises(ValueError, match=r"no conversation template 'vicuna'; there are .*internvl_zh, vicuna_v1"):
        internvl_jax.load(directory, template="vicuna")
    # The other way out serves every command, and stays with the model.
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "template": "internvl_zh"}))
    read = load_config(directory)
    assert read.template == "internvl_zh"
    assert config_from_hf(config_to_hf(read)) == read
    assert "template" not in config_to_hf(load_config(HF))
    write(directory, "chat_template.json", {"chat_template": LLAVA_HF})
    (directory / "config.json").write_text(json.dumps(values))
    assert load_config(directory).template == "vicuna_v1"
