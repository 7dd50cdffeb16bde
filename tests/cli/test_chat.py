"""`internvl-jax chat` with one question, and what it prints where; `verify`."""

import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.cli_cases import BUNDLE, CHECKPOINT, FACTS, IMAGE, LLAVA, QUESTION, SEEN, TEXT
from support.golden import bundle

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.inference import loading
from internvl_jax.inference.chat import Chat
from internvl_jax.processing.boxes import parse_boxes


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system names no open files")
@pytest.mark.parametrize("session", [False, True])
def test_an_image_from_a_pipe(golden, session):
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as file:
        file.write(Path(IMAGE).read_bytes())
    try:
        name = f"/dev/fd/{read_end}"  # what --image <(cat image.png) passes
        if session:
            code, out, _ = golden(stdin=f"/image {name}\n{QUESTION}\n/quit\n")
        else:
            code, out, _ = golden("--image", name, QUESTION)
    finally:
        os.close(read_end)
    assert (code, out) == (0, SEEN["response"] + "\n")


def test_an_answer_and_nothing_else(golden):
    code, out, err = golden("--image", IMAGE, QUESTION)
    assert code == 0
    assert out == SEEN["response"] + "\n"
    assert err == "(cut off after 32 tokens: --max-new-tokens allows more)\n"


def test_a_question_from_standard_input(golden):
    code, out, _ = golden("-", stdin=TEXT["question"] + "\n")
    assert (code, out) == (0, TEXT["response"] + "\n")


def test_an_answer_that_ends_by_itself_says_nothing_more(golden):
    assert golden("--stop", TEXT["response"][9:12], TEXT["question"]) == (0, TEXT["response"][:9].strip() + "\n", "")


@pytest.mark.parametrize("question", ["请详细描述这张图片。", "What is 😀 in this café?"])
def test_json(golden, question):
    code, out, err = golden("--json", "--image", IMAGE, IMAGE, question)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    reply = json.loads(out)
    assert set(reply) == {"answer", "tokens", "finish_reason", "history", "prompt_tokens", "timings"}
    assert set(reply["timings"]) == {"encode", "prefill", "decode", "total"}
    assert all(seconds > 0 for seconds in reply["timings"].values())
    assert len(reply["tokens"]) == 32
    assert reply["finish_reason"] == "length"
    assert reply["history"] == [[f"<image>\n{question}", reply["answer"]]]
    assert question in out  # readable, not escaped


def test_json_is_what_is_printed(golden):
    code, out, _ = golden("--json", TEXT["question"])
    reply = json.loads(out)
    assert code == 0
    assert (reply["answer"], reply["tokens"]) == (TEXT["response"], TEXT["generated_ids"])


def test_json_on_a_terminal_that_knows_no_chinese(golden, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    question = "请详细描述这张图片。"
    assert golden("--json", question)[0] == 0
    plain.flush()
    assert json.loads(plain.buffer.getvalue())["history"][0][0] == question


def test_settings_without_effect_are_named(golden):
    _, _, err = golden("--top-p", 0.5, "--seed", 3, TEXT["question"])
    assert "--top-p, --seed: ignored at temperature 0" in err
    assert golden("--top-p", 0.5, "--seed", 3, "--temperature", 1, TEXT["question"])[2].count("ignored") == 0


def test_settings_arrive(golden):
    search = FACTS["beam_search"][0]
    assert golden("--num-beams", 5, "--image", IMAGE, QUESTION)[:2] == (0, search["response"] + "\n")
    warm = [golden("--temperature", 1.5, "--seed", seed, TEXT["question"])[1] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    for option in (("--top-k", 1), ("--top-p", 1e-6)):
        assert golden("--temperature", 1.5, *option, TEXT["question"])[1] == TEXT["response"] + "\n"
    for option in (("--repetition-penalty", 5), ("--system", "Answer in Chinese.")):
        code, out, _ = golden(*option, TEXT["question"])
        assert code == 0
        assert out not in ("\n", TEXT["response"] + "\n")
    turned = BUNDLE / FACTS["images"]["exif_rot"]["file"]
    assert golden("--image", turned, QUESTION)[1] != golden("--image", turned, "--ignore-exif", QUESTION)[1]


def test_the_model_is_loaded_as_asked(golden):
    golden(TEXT["question"])
    path, options = golden.loaded
    assert path == CHECKPOINT
    assert (options.mesh, options.dtype) == (None, None)
    golden("--mesh", "data=2,tensor=4", "--dtype", "bfloat16", TEXT["question"])
    _, options = golden.loaded
    assert (options.mesh, options.dtype) == ("data=2,tensor=4", "bfloat16")


def test_an_image_of_one_pixel(golden, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    code, out, _ = golden("--image", tmp_path / "dot.png", QUESTION)
    assert code == 0
    assert out.strip()


def test_an_image_through_a_pipe(golden, tmp_path):
    """It can be read once only."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content, expected in (
        ((BUNDLE / FACTS["images"]["rgb"]["file"]).read_bytes(), (0, SEEN["response"] + "\n")),
        (b"", (2, "")),
    ):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        code, out, err = golden("--image", pipe, QUESTION)
        writer.join()
        assert (code, out) == expected
    assert "is empty" in err


@pytest.mark.parametrize("name", ["..", "sp ace", "uni中", "new\nline", "~", "x" * 250, "link", "slash/"])
def test_names_of_checkpoints_and_images(run, tmp_path, monkeypatch, name):
    """Every kind of name, relative ones too, reaches the parameters and the image."""
    real = tmp_path / "home" / (name.rstrip("/") if name not in ("..", "~", "link") else "model")
    shutil.copytree(loading.NANO, real)
    shutil.copy(IMAGE, real / "im age.png")
    (tmp_path / "link").symlink_to(real)
    (real / "inner").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(real / "inner")
    where = {"..": "..", "~": "~/model", "link": "../../../link/../model"}.get(name, f"../../{name}")
    code, out, _ = run("chat", "--checkpoint", where, "--image", f"{where}/im age.png", "--max-new-tokens", 1, "Hi")
    assert code == 0
    assert out.strip()


def test_llava_with_its_tower_beside_it(run):
    pytest.importorskip("torch")
    facts = bundle("llava_1_5")[1]
    prompt = next(prompt for prompt in facts["orig_prompts"] if prompt["id"] == "en_single")
    options = ("--checkpoint", LLAVA / "original", "--image", LLAVA / "images" / "rgb.png", "--max-new-tokens", 32)
    code, out, _ = run("chat", *options, prompt["messages"][0].removeprefix("<image>\n"))
    assert (code, out) == (0, prompt["response"].strip() + "\n")


def test_verify(run, tmp_path):
    """What ships and what is saved has checksums, by which a flipped bit is found; earlier checkpoints have none."""
    nano = Path(internvl_jax.__file__).parent / "nano" / "model"
    code, out, err = run("verify", str(nano))
    assert (code, out) == (0, "")
    assert "4.35 MB, sizes, checksums and numbers checked" in " ".join(err.split())
    shutil.copytree(nano, tmp_path / "earlier")
    (tmp_path / "earlier" / "params" / "checksums.json").unlink()
    code, out, err = run("verify", str(tmp_path / "earlier"))
    assert (code, out) == (0, "")
    assert "4.35 MB, sizes and numbers checked; it has no checksums" in " ".join(err.split())
    checkpoint.save(tmp_path / "new", {"mlp1": {"norm": {"scale": np.ones(4, np.float32)}}})
    code, out, err = run("verify", str(tmp_path / "new"))
    assert code == 0
    assert "sizes, checksums and numbers checked" in " ".join(err.split())
    (tmp_path / "new" / "params" / "mlp1.norm.scale" / "0").write_bytes(bytes(16))
    code, out, err = run("verify", str(tmp_path / "new"))
    assert code == 2
    assert "mlp1.norm.scale/0 is damaged" in "".join(err.split()).replace("isdamaged", " is damaged")
    code, out, err = run("verify", str(tmp_path))
    assert code == 2
    assert "convert a checkpoint" in " ".join(err.split())


def test_drawn_boxes(golden, tmp_path, monkeypatch):
    text = "<box>[[100, 100, 900, 900]]</box>"  # the tiny model answers without boxes
    monkeypatch.setattr(Chat, "boxes", lambda _, reply, width, height: parse_boxes(text, width, height))
    file = tmp_path / "drawn.png"
    code, out, _ = golden("--image", IMAGE, "--draw", file, QUESTION)
    assert (code, out) == (0, SEEN["response"] + "\n")
    with Image.open(file) as drawn, Image.open(IMAGE) as image:
        assert drawn.size == image.size
        assert drawn.getpixel((image.width // 10, image.height // 2)) == (255, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_an_answer_without_boxes_draws_nothing(golden, tmp_path):
    file = tmp_path / "drawn.png"
    code, _, err = golden("--image", IMAGE, "--draw", file, QUESTION)
    assert code == 0
    assert f"(the answer has no boxes: {file} is not written)" in " ".join(err.split())
    assert not file.exists()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--draw", "a.png", QUESTION], "--draw needs a PROMPT about one --image"),
        (["--draw", "a.png", "--image", IMAGE, IMAGE, QUESTION], "--draw needs a PROMPT about one --image"),
        (["--draw", "a.txt", "--image", IMAGE, QUESTION], "give it the ending of an image format"),
        (["--draw", "no/such/a.png", "--image", IMAGE, QUESTION], "there is no directory"),
    ],
)
def test_what_draw_refuses(run, capsys, argv, problem):
    with pytest.raises(SystemExit) as stopped:
        run("chat", *argv)
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err
