"""Texts from files and data sets, and sliding windows over them."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from hf_gdn.errors import UserError
from hf_gdn.loading import texts


def scored(windows):
    """Places in the text of the tokens that are scored, window by window."""
    return [
        list(range(begin + first, begin + windows.ids.shape[1]))
        for begin, first in zip(windows.begin.tolist(), windows.first.tolist())
    ]


@pytest.mark.parametrize("length", [10, 11, 12, 19, 20, 21, 29, 30, 47])
@pytest.mark.parametrize("stride", [1, 3, 9])
def test_overlapping_windows_score_every_token_once(length, stride):
    found = texts.windows(torch.arange(length), 10, stride)
    assert list(itertools.chain(*scored(found))) == list(range(1, length))
    assert found.scored == length - 1 and found.text_tokens == length
    for begin, ids in zip(found.begin.tolist(), found.ids.tolist()):
        assert ids == list(range(begin, begin + 10))
    assert all(first >= 10 - stride for first in found.first.tolist()[1:])  # each has its context


def test_windows_that_do_not_overlap():
    found = texts.windows(torch.arange(25), 10)
    assert found.begin.tolist() == [0, 10, 15] and found.first.tolist() == [1, 1, 5]
    assert scored(found)[2] == [20, 21, 22, 23, 24]  # the rest, in a full window


def test_a_limit_spreads_windows_over_the_text():
    assert texts.windows(torch.arange(100), 10, None, 4).begin.tolist() == [0, 30, 60, 90]
    assert texts.windows(torch.arange(105), 10, None, 4).begin.tolist() == [0, 30, 60, 90]
    assert texts.windows(torch.arange(100), 10, 5, 2).first.tolist() == [1, 5]
    assert texts.windows(torch.arange(100), 10, None, 99).ids.shape == (10, 10)


def test_windows_that_cannot_be():
    with pytest.raises(UserError, match="text 'file' has 9 tokens, a window takes 10; give a shorter --context"):
        texts.windows(torch.arange(9), 10, source="file")
    for stride in (0, 11):
        with pytest.raises(UserError, match=f"--stride must be between 1 and --context 10, got {stride}"):
            texts.windows(torch.arange(99), 10, stride)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "rows.jsonl").write_text('{"text": "zwei", "other": "x"}\n\n{"text": "drei", "other": 1}\n')
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": ["vier", "", "fünf"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    return tmp_path


def test_files_are_joined_in_order(folder):
    paths = [str(folder / name) for name in ("a.txt", "rows.jsonl", "rows.parquet")]
    found = texts.read_files(paths)
    assert found.text == "eins\n\nzwei\n\ndrei\n\nvier\n\nfünf" and found.source == ", ".join(paths)
    assert texts.read_files(paths[:1]).text == "eins"


def test_a_data_set(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    local = tmp_path_factory.mktemp("set")
    (local / "test.jsonl").write_text((folder / "rows.jsonl").read_text().replace(', "other": 1', ', "other": "y"'))
    assert texts.read_dataset(str(local), "test").text == "zwei\n\ndrei"
    assert texts.read_dataset(str(local), "test[:1]", "other").text == "x"
    with pytest.raises(UserError, match="has no field 'body'; fields: text, other"):
        texts.read_dataset(str(local), "test", "body")
    with pytest.raises(UserError, match="split 'train', cannot be loaded"):
        texts.read_dataset(str(local), "train")
    with pytest.raises(UserError, match="data set 'nobody/nothing', split 'test', cannot be loaded") as error:
        texts.read_dataset("nobody/nothing", "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("none.txt", None, "text", "cannot be read as UTF-8: No such file"),
        ("none.parquet", None, "text", "cannot be read: No such file"),
        ("bytes.txt", b"\xff\xfe\x00", "text", "cannot be read as UTF-8"),
        ("empty.txt", b" \n", "text", "is empty"),
        ("rows.jsonl", b'{"text": "a"}\n{"text"', "text", "line 2 is no JSON"),
        ("rows.jsonl", b"[1]\n", "text", "line 1: expected a JSON object, got list"),
        ("rows.jsonl", b'{"a": "x", "b": 1}\n', "text", "line 1 has no field 'text'; fields: a, b"),
        ("rows.jsonl", b'{"a": "x", "b": 1}\n', "b", "field 'b' must be text, got int"),
        ("rows.parquet", b"no parquet", "text", "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_read(name, content, field, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts.read_files([str(tmp_path / name)], field)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_column_that_is_missing_or_no_text(folder):
    with pytest.raises(UserError, match="has no field 'body'; fields: text, n"):
        texts.read_files([str(folder / "rows.parquet")], "body")
    with pytest.raises(UserError, match="row 0: field 'n' must be text, got int"):
        texts.read_files([str(folder / "rows.parquet")], "n")


def test_tokens_are_those_of_the_text():
    def words(text, **options):
        assert options["add_special_tokens"] is False
        return SimpleNamespace(input_ids=torch.tensor([[len(word) for word in text.split()]]))

    assert texts.tokenize(words, texts.Text("", "a bb a")).tolist() == [1, 2, 1]


def test_json_of_another_kind_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps("text") + "\n")
    with pytest.raises(UserError, match="got str"):
        texts.read_files([str(tmp_path / "x.jsonl")])
