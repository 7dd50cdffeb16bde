"""Meta files and annotations: every form that is documented, and what is wrong with others."""

import errno
import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest

from internvl_jax.data import annotations
from internvl_jax.data.annotations import Corpus, DataError, Entries, read_meta
from internvl_jax.utils import logs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_meta(directory, **sources):
    path = directory / "meta.json"
    path.write_text(json.dumps(sources))
    return path


def write_lines(path, count, newline="\n"):
    path.write_bytes(newline.join(json.dumps({"id": f"{path.stem}{i}"}) for i in range(count)).encode())
    return path


def ids(corpus):
    return [json.loads(corpus[i].text)["id"] for i in range(len(corpus))]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines(tmp_path, monkeypatch, chunk, newline):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    lines = ['{"id": 1}', "", '{"text": "图"}', "{", "", "", "{}", "not json"]
    path.write_bytes(newline.join(lines).encode())
    entries = Entries(path)
    assert [entries[i].decode().strip() for i in range(len(entries))] == [line for line in lines if line]
    assert [entries.location(i) for i in range(len(entries))] == [f"{path}:{n}" for n in (1, 3, 4, 7, 8)]


@pytest.mark.parametrize("indent", [None, 2])
def test_llava_json(tmp_path, indent):
    values = [{"id": "a", "conversations": [{"value": 'brackets ]}{[ and " quotes \\'}]}, {"id": "b"}, {"id": "图\n"}]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False))
    entries = Entries(path)
    assert [json.loads(entries[i]) for i in range(len(entries))] == values
    assert entries.location(1) == f"{path}:{10 if indent else 1} (entry 2)"
    assert read_meta(path)[0].annotation == path  # taken as the only data set
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    marked = Entries(path)
    assert [json.loads(marked[i]) for i in range(len(marked))] == values
    assert read_meta(path)[0].annotation == path
    path.write_text(json.dumps(values)[:-5])
    with pytest.raises(DataError, match="cut off"):
        Entries(path)
    for text in ("", '{"a": {}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="must hold a JSON list"):
            Entries(path)


def test_an_index_is_made_once_for_a_file_and_again_when_it_changes(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", 3)
    made = []
    spans = annotations.line_spans
    monkeypatch.setattr(annotations, "line_spans", lambda path: made.append(path) or spans(path))
    assert len(Entries(path)) == len(Entries(path)) == 3
    assert made == [path]
    write_lines(path, 4)
    assert len(Entries(path)) == 4
    assert made == [path, path]


def test_byte_order_marks(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", 2)
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes() + b"\n\xef\xbb\xbf" + b'{"id": "joined"}')  # as `cat` joins
    meta = write_meta(tmp_path, a={"root": "", "annotation": "a.jsonl"})
    meta.write_bytes(b"\xef\xbb\xbf" + meta.read_bytes())
    assert ids(Corpus(read_meta(meta))) == ["a0", "a1", "joined"]
    for path in (lines, tmp_path / "a.json", meta):
        path.write_text("[{}]", encoding="utf-16")
        with pytest.raises(DataError, match=rf"{path.name} is UTF-16 text: save it as UTF-8"):
            Corpus(read_meta(path))


@pytest.mark.parametrize("home", ["missing", "file", "read-only", "full", "full later"])
def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch, logged, home):
    logs.warn_once.cache_clear()
    if home == "missing":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr(Path, "expanduser", no_home)
    elif home == "file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif home == "read-only":
        monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    elif home == "full":
        monkeypatch.setattr(tempfile, "TemporaryFile", failing(errno.ENOSPC))
    else:
        monkeypatch.setattr(Path, "replace", failing(errno.ENOSPC))
    entries = Entries(write_lines(tmp_path / "a.jsonl", 3))
    assert [json.loads(entries[i])["id"] for i in range(3)] == ["a0", "a1", "a2"]
    assert entries.location(2) == f"{tmp_path}/a.jsonl:3"
    again = pickle.loads(pickle.dumps(entries))
    assert again[1] == entries[1]
    assert len(Entries(write_lines(tmp_path / "b.jsonl", 2))) == 2
    assert len(logged) == 1
    assert "indexes of annotations are made anew by every process; set XDG_CACHE_HOME to a directory" in logged[0]


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_torn_index_is_made_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", 3)
    index = Entries(path).index
    index.write_bytes(index.read_bytes()[:-1])
    assert len(Entries(path)) == 3
    assert index.stat().st_size == 3 * annotations.ROW


def test_another_file_of_the_same_size_is_indexed_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n{}  \n")
    assert Entries(path)[0] == b"{}"
    path.write_text("{}  \n{}\n")
    os.utime(path, ns=(1, 1))
    assert Entries(path)[0] == b"{}  "


def test_a_long_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": number} for number in range(20_001)]))
    entries = Entries(path)
    assert len(entries) == 20_001
    numbers = [0, 9_999, 10_000, 10_001, 20_000]
    assert [json.loads(entries[number])["id"] for number in numbers] == numbers


def test_fingerprints_follow_what_is_read_and_not_where(tmp_path):
    write_lines(tmp_path / "a.jsonl", 4)
    write_lines(tmp_path / "b.jsonl", 5)
    base = {"root": "", "annotation": "a.jsonl"}

    def fingerprint(name="a", **changes):
        return Corpus(read_meta(write_meta(tmp_path, **{name: base | changes}))).fingerprint()

    same = [fingerprint(), fingerprint(root="elsewhere"), fingerprint(length=9), fingerprint(repeat_time=1)]
    assert len(set(same)) == 1
    others = [
        fingerprint(name="b"),
        fingerprint(annotation="b.jsonl"),
        fingerprint(repeat_time=2),
        fingerprint(data_augment=True),
    ]
    assert len({*same, *others}) == 5


def test_meta(tmp_path):
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "sub" / "a.jsonl", 4)
    write_lines(tmp_path / "b.jsonl", 3)
    meta = write_meta(
        tmp_path,
        a={"root": "images", "annotation": "sub/a.jsonl", "repeat_time": 0.5, "data_augment": True, "length": 4},
        b={"root": str(tmp_path), "annotation": "b.jsonl", "repeat_time": 2, "max_dynamic_patch": 1},
    )
    first, second = read_meta(meta)
    assert (first.name, first.root, first.augment, first.length) == ("a", tmp_path / "images", True, 4)
    assert (second.root, second.augment, second.length) == (tmp_path, False, None)
    corpus = Corpus([first, second])
    assert ids(corpus) == ["a0", "a1", "b0", "b1", "b2", "b0", "b1", "b2"]
    assert corpus[3].location == f"{tmp_path / 'b.jsonl'}:2"
    assert ids(pickle.loads(pickle.dumps(corpus))) == ids(corpus)
    other = Corpus(read_meta(write_meta(tmp_path, b={"root": "", "annotation": "b.jsonl", "repeat_time": 1.5})))
    assert ids(other) == ["b0", "b1", "b2", "b0"]
    assert other.fingerprint() != corpus.fingerprint()
    assert Corpus([first, second]).fingerprint() == corpus.fingerprint()


def test_everything_wrong_with_a_meta_file_is_listed(tmp_path):
    write_lines(tmp_path / "a.jsonl", 1)
    (tmp_path / "a.txt").write_text("x")
    good = {"root": "", "annotation": "a.jsonl"}
    wrong = {
        "missing": ({"root": "", "annotation": "b.jsonl"}, "b.jsonl does not exist"),
        "no annotation": ({"root": ""}, '"annotation" must be a file'),
        "text": ({"root": "", "annotation": "a.txt"}, "neither .jsonl nor .json"),
        "bucket": ({"root": "s3://x", "annotation": "a.jsonl"}, "URLs are not read"),
        "repeat": ({**good, "repeat_time": 0}, "a number above 0, not 0"),
        "augment": ({**good, "data_augment": "yes"}, "true or false, not 'yes'"),
        "length": ({**good, "length": "9"}, "a number of samples, not '9'"),
        "tiles": ({**good, "max_dynamic_patch": 12}, "asks for image tiles"),
        "key": ({**good, "repeat": 2}, "unknown keys repeat"),
        "list": ([], "must be an object, not list"),
    }
    with pytest.raises(DataError) as caught:
        read_meta(write_meta(tmp_path, good=good, **{name: values for name, (values, _) in wrong.items()}))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(wrong)
    for line, (name, (_, message)) in zip(lines[1:], wrong.items()):
        assert line.strip().startswith(f"{name}: ")
        assert message in line


def test_a_data_set_that_is_there_twice(tmp_path):
    write_lines(tmp_path / "a.jsonl", 1)
    source = '{"root": "", "annotation": "a.jsonl", "root": ""}'
    (tmp_path / "meta.json").write_text(f'{{"a": {source}, "b": {{"annotation": "a.jsonl"}}, "a": {{}}}}')
    with pytest.raises(DataError, match=r"root: appears 2 times\n  a: appears 2 times\n  a: \"annotation\" must be"):
        read_meta(tmp_path / "meta.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not JSON"), ("3", "must hold"), ("{}", "must hold"), ('{"a":' * 10**5, "not JSON")],
)
def test_no_meta_file(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_meta(tmp_path / "meta.json")
    for name in ("other.json", "other.jsonl"):
        with pytest.raises(DataError, match="does not exist"):
            Corpus(read_meta(tmp_path / name))
    with pytest.raises(DataError, match="is a directory: name the file"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text('{"a": {"root": ".", "annotation": "."}}')
    with pytest.raises(DataError, match=r"the annotation .* is a directory: name the file"):
        read_meta(tmp_path / "meta.json")


def test_nothing_to_learn_from(tmp_path):
    write_lines(tmp_path / "a.jsonl", 4)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="leaves none of 4 samples"):
        Corpus(read_meta(write_meta(tmp_path, a={"root": "", "annotation": "a.jsonl", "repeat_time": 0.1})))
    with pytest.raises(DataError, match="has no entries"):
        Corpus(read_meta(tmp_path / "empty.jsonl"))
