"""`internvl-jax data check`: figures, problems and rendered samples."""

import json

import pytest
from support.annotation_files import damage, write_data
from support.golden import DATA

from internvl_jax.cli.main import main
from internvl_jax.data.annotations import DataError
from internvl_jax.data.check import CheckOptions, check, render, simulate_packing
from internvl_jax.data.packing import Layout

CHECKPOINT = DATA / "internvl_chat_v1_1" / "checkpoint"
LAYOUT = Layout(rows=2, lengths=(160,), image_slots=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def meta(tmp_path):
    sets = {**write_data(tmp_path), **write_data(tmp_path, 10, "b", every_other_image=False, repeat_time=2)}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    return tmp_path / "meta.json"


def run(capsys, *argv):
    code = main(["data", "check", *map(str, argv)])
    return code, capsys.readouterr()


def test_figures(meta):
    report, _ = check(meta, CHECKPOINT, LAYOUT, CheckOptions(show=0))
    a, b = (stats.to_dict() for stats in report.stats)
    assert (a["entries"], a["samples_per_epoch"], a["checked"], a["usable"]) == (40, 40, 40, 40)
    assert (b["entries"], b["samples_per_epoch"], b["checked"]) == (10, 20, 10)
    assert (a["images"], a["text_only"], b["images"], b["text_only"]) == (20, 20, 0, 10)
    assert a["supervised_tokens"] < a["tokens"] < 40 * a["tokens_max"]
    assert report.problems == 0
    assert 0.6 < report.fill_ratio <= 1
    tokens = a["tokens"] + 2 * b["tokens"]
    assert report.batches == pytest.approx(tokens / (2 * 160 * report.fill_ratio), rel=0.2)
    assert report.examples == []


def test_no_problems(meta, capsys):
    code, out = run(capsys, meta, "--checkpoint", CHECKPOINT, "--max-seq-length", 160, "--show", 1)
    assert code == 0
    assert "8 packed rows of 160 tokens and 32 images" in out.out
    assert out.out.count("⟦") == out.out.count("⟧") == 2  # one of each data set
    assert "cannot be used" not in out.out


def test_problems_with_file_and_line(meta, capsys):
    wrong = damage(meta.parent)
    code, out = run(capsys, meta, "--checkpoint", CHECKPOINT, "--max-seq-length", 160, "--show", 0)
    assert code == 1
    for line in wrong.values():
        assert f"{meta.parent}/a.jsonl:{line}: " in out.out
    assert "4 of 40 cannot be used: 2 image, 1 annotation, 1 placeholders" in out.out
    code, out = run(capsys, meta, "--checkpoint", CHECKPOINT, "--max-seq-length", 160, "--skip-images", "--json")
    report = json.loads(out.out)
    assert (code, report["problems"]) == (1, 2)
    assert report["sources"][0]["problems"] == {"annotation": 1, "placeholders": 1}


def test_a_part_and_buckets(meta, capsys):
    argv = ("--checkpoint", CHECKPOINT, "--no-packing", "--max-seq-length", 48, 96, "--limit", 5, "--json")
    code, out = run(capsys, meta, *argv)
    report = json.loads(out.out)
    assert (code, report["lengths"], report["packed"]) == (0, [48, 96], False)
    assert [source["checked"] for source in report["sources"]] == [5, 5]


def test_warnings(tmp_path, capsys):
    sets = write_data(tmp_path, 6, every_other_image=False)
    sets["a"]["length"] = 7
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    lines = [{"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "word " * 300}]}]
    (tmp_path / "a.jsonl").open("a").write(json.dumps(lines[0]) + "\n{}\n")
    code, out = run(capsys, tmp_path / "meta.json", "--checkpoint", CHECKPOINT, "--max-seq-length", 64, "--show", 0)
    assert code == 1
    assert 'says "length" 7, the annotation has 8 entries' in out.out
    assert "1 of 7 conversations are truncated" in out.out


def test_a_data_set_of_which_nothing_is_left(tmp_path, capsys):
    sets = {**write_data(tmp_path, 20, every_other_image=False), **write_data(tmp_path, 1, "b", repeat_time=0.1)}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    code, out = run(capsys, tmp_path / "meta.json", "--checkpoint", CHECKPOINT)
    assert code == 2
    assert "b: repeat_time 0.1 leaves none of 1 samples" in out.err


def test_a_data_set_of_which_nothing_can_be_used(tmp_path, capsys):
    write_data(tmp_path, 3)
    (tmp_path / "none.jsonl").write_text("{}\n" * 3)
    sets = {"none": {"root": "", "annotation": "none.jsonl", "length": 0}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    code, out = run(capsys, tmp_path / "meta.json", "--checkpoint", CHECKPOINT)
    assert code == 1
    assert "3 of 3 cannot be used" in out.out
    assert 'says "length" 0, the annotation has 3 entries' in out.out
    code, out = run(capsys, tmp_path / "meta.json", "--checkpoint", CHECKPOINT, "--json")
    report = json.loads(out.out)
    assert (code, report["fill_ratio"], report["batches_per_epoch"], report["sources"][0]["usable"]) == (1, 0, 0, 0)
    for empty, message in (("", "has no entries"), ("\n\n", "has no entries")):
        (tmp_path / "none.jsonl").write_text(empty)
        code, out = run(capsys, tmp_path / "meta.json", "--checkpoint", CHECKPOINT)
        assert (code, message in out.err) == (2, True)


def test_keys_that_nothing_reads_are_named_once_each(meta, capsys):
    lines = [json.loads(line) for line in (meta.parent / "a.jsonl").read_text().splitlines()]
    for line in lines[2:5]:
        line["img"] = line.pop("image", "x.png")
    (meta.parent / "a.jsonl").write_text("".join(json.dumps(line | {"images": []}) + "\n" for line in lines))
    code, out = run(capsys, meta, "--checkpoint", CHECKPOINT, "--max-seq-length", 160, "--json")
    report = json.loads(out.out)
    assert (code, report["sources"][1]["warnings"]) == (0, [])
    first = ", ".join(f"{meta.parent}/a.jsonl:{number}" for number in (3, 4, 5))
    assert report["sources"][0]["warnings"] == [
        f'the key "img" is not read: images are read from "image" or "images" (3 entries, first {first})'
    ]


def test_special_tokens_that_are_written_in_texts_are_flagged(tmp_path, capsys):
    texts = [
        "a </s> b </s>",
        "where is <img>?",
        "<ref>it</ref><box>[[1, 2, 3, 4]]</box>",
        "</s>",
        "</s>",
        "</s>",
        "a < b",
    ]
    turns = ([{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}] for text in texts)
    lines = "".join(json.dumps({"conversations": turn}) + "\n" for turn in turns)
    (tmp_path / "a.jsonl").write_text(lines)
    code, out = run(capsys, tmp_path / "a.jsonl", "--checkpoint", CHECKPOINT, "--json")
    assert code == 0
    name = tmp_path / "a.jsonl"
    assert json.loads(out.out)["sources"][0]["warnings"] == [
        "the text has </s>, which is read as that token and not as text "
        f"(4 entries, first {name}:1, {name}:4, {name}:5)",
        f"the text has <img>, which is read as that token and not as text (1 entries, first {name}:2)",
    ]


def test_batches_of_an_epoch_follow_repeat_time(tmp_path):
    found = []
    for repeat in (1, 10):
        sets = write_data(tmp_path, 12, every_other_image=False, repeat_time=repeat)
        (tmp_path / "meta.json").write_text(json.dumps(sets))
        found.append(check(tmp_path / "meta.json", CHECKPOINT, LAYOUT, CheckOptions(show=0))[0].batches)
    assert found[1] == pytest.approx(10 * found[0])


def test_rows_of_the_last_batch_do_not_count_as_full_or_empty():
    layout = Layout(rows=1, lengths=(10,), image_slots=1)
    assert simulate_packing([(10, 0), (10, 0), (3, 0)], layout) == (1.0, 3)
    assert simulate_packing([(3, 0)], layout) == (pytest.approx(0.3), 1)


def test_shown_samples_are_drawn_from_all(meta):
    shown = [
        check(meta, CHECKPOINT, LAYOUT, CheckOptions(show=2, seed=seed), with_pixels=False)[0].examples
        for seed in range(4)
    ]
    places = [sample.location for samples in shown for sample in samples if "a.jsonl" in sample.location]
    assert len(set(places)) > 5
    assert not all(any(sample.location.endswith("a.jsonl:40") for sample in samples) for samples in shown)


def test_llava_json_with_the_model_that_ships(tmp_path, capsys):
    turns = [{"from": "human", "value": "Look.\n<image>"}, {"from": "gpt", "value": "A square."}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "x.png", "conversations": turns}]))
    code, out = run(capsys, tmp_path / "llava.json", "--skip-images", "--images-first")
    assert code == 0
    assert "<IMG_CONTEXT> x " in out.out
    assert "⟦A square.</s>⟧" in out.out.replace("⟦ ", "⟦")
    assert out.out.index("<IMG_CONTEXT>") < out.out.index("Look.")


def test_supervised_tokens_are_green_and_others_dim(meta):
    report, tokenizer = check(meta, CHECKPOINT, LAYOUT, CheckOptions(show=2))
    assert len(report.examples) == 4
    for sample in report.examples:
        text = render(sample, tokenizer, report.image_token_id)
        styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
        green = [part for part, style in styles.items() if style == "bold green"]
        assert len(green) == 1
        assert green[0].startswith("⟦")
        assert set(styles.values()) <= {"bold green", "dim", "cyan"}
        assert ("cyan" in styles.values()) == bool(len(sample.pixel_values))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.json"], "missing.json does not exist"),
        (["meta.json", "--max-seq-length", "100000"], "longer than the model's context"),
        (["meta.json", "--max-seq-length", "96", "48"], "must be ascending"),
        (["meta.json", "--max-seq-length", "48", "96"], "packed rows have one length"),
    ],
)
def test_errors(meta, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(meta.parent)
    code, out = run(capsys, *argv)
    assert code == 2
    assert message in out.err


def test_nothing_to_check(meta, capsys):
    for option in ("--limit", "--batch-size"):
        with pytest.raises(SystemExit, match="2"):
            run(capsys, meta, option, 0)
        assert f"{option}: must be at least 1" in capsys.readouterr().err
    with pytest.raises(DataError, match="limit 0"):
        CheckOptions(limit=0)
    with pytest.raises(DataError, match="needs rows"):
        Layout(0, (160,), 4)
