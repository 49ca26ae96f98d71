"""JSONL files in every form, and refusals that say where."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.data.example import DataError, Example, Message, pair
from minift.data.json_lines import MAX_LINE_BYTES
from minift.data.jsonl import read, read_split, write

GOOD = b'{"text": "good"}\n'


def put(folder, content: bytes, name="set.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


def test_the_four_forms(tmp_path):
    lines = [
        '{"prompt": "2 + 2?", "completion": "4", "source": null}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "x"},'
        ' {"role": "assistant", "content": "a"}]}',
        '{"instruction": "Add.", "input": "2, 2", "output": "4"}',
        '{"instruction": "Add.", "input": "", "output": "4"}',
        '{"instruction": "Add.", "output": "4"}',
        '{"text": " as it is\\n"}',
    ]
    chat = Example((Message("system", "s"), Message("user", "u"), Message("assistant", "a")))
    expected = [pair("2 + 2?", "4"), chat, pair("Add.\n\n2, 2", "4"), pair("Add.", "4"), pair("Add.", "4")]
    expected.append(Example(text=" as it is\n"))
    for end in ("\n", "\r\n"):
        assert read(put(tmp_path, end.join([*lines, ""]).encode())) == expected
        assert read(put(tmp_path, end.join(lines).encode())) == expected  # no line end at the end


def test_only_line_feeds_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    assert read(put(tmp_path, f'{{"text": "{text}"}}\n'.encode())) == [Example(text=text)]


REFUSED = [
    (b"\xef\xbb\xbf" + GOOD, 1, "byte-order mark"),
    (GOOD + b"\n" + GOOD, 2, "blank line"),
    (GOOD + b"  \r\n", 2, "blank line"),
    (GOOD + b'{"text": NaN}\n', 2, "NaN is not JSON"),
    (b'{"text": "a", "weight": -Infinity}', 1, "-Infinity is not JSON"),
    (GOOD * 2 + b'{"text": "a"', 3, "not JSON: .*delimiter"),
    (b'{"text": "a"} {"text": "b"}', 1, "not JSON: Extra data"),
    (b"{'text': 'a'}", 1, "not JSON"),
    (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", 1, "not JSON: Exceeds the limit"),
    (b'["text"]', 1, "found a list, needed a JSON object"),
    (b'"text"', 1, "found a string"),
    (b"null", 1, "found null"),
    (b"{}", 1, "no keys, which fits no form; needed one of"),
    (b'{"question": "a", "answer": "b"}', 1, "'question', 'answer', which fits no form"),
    (b'{"prompt": "a"}', 1, "'completion' is missing; found 'prompt'"),
    (b'{"completion": "a"}', 1, "'prompt' is missing"),
    (b'{"instruction": "a", "input": "b"}', 1, "'output' is missing"),
    (b'{"prompt": "a", "completion": "b", "text": "c"}', 1, r"several forms \(prompt, text\)"),
    (b'{"messages": [], "prompt": "a"}', 1, "several forms"),
    (b'{"text": 3}', 1, "'text' is a number, needed a string"),
    (b'{"text": true}', 1, "'text' is true"),
    (b'{"text": null}', 1, "'text' is null"),
    (b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', 1, "'prompt' is a list, needed a string"),
    (b'{"instruction": "a", "input": 3, "output": "b"}', 1, "'input' is a number"),
    (b'{"text": ""}', 1, "'text' is empty"),
    (b'{"text": " \\n"}', 1, "'text' is empty"),
    (b'{"prompt": "a", "completion": ""}', 1, "'completion' is empty"),
    (b'{"text": "a\\ud800"}', 1, r"'text' has half a surrogate pair \(U\+D800\) at character 1"),
    (b'{"text": "a", "text": "b"}', 1, "'text' stands twice"),
    (b'{"text": "a", "x": [{"k": 1, "k": 2}]}', 1, "'k' stands twice"),
    (b"[" * 100_000, 1, "nested too deeply"),
    (b'{"x": ' * 100_000, 1, "nested too deeply"),
    (GOOD + b'{"text": "caf\xe9"}', 2, r"byte 14 \(0xe9\) is not valid UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', 1, "not valid UTF-8"),
    (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', 1, "longer than 16,777,216 bytes"),
    (b'{"messages": "hi"}', 1, "'messages' is a string, needed a list"),
    (b'{"messages": []}', 1, "'messages' is an empty list"),
    (b'{"messages": ["hi"]}', 1, r"messages\[0\] is a string, needed an object"),
    (b'{"messages": [{"role": "user"}]}', 1, r"messages\[0\]: 'content' is missing; found 'role'"),
    (b'{"messages": [{"content": "a"}]}', 1, r"messages\[0\]: 'role' is missing"),
    (
        b'{"messages": [{"role": "human", "content": "a"}]}',
        1,
        "unknown role 'human', needed one of system, user, assis",
    ),
    (b'{"messages": [{"role": "user", "content": "a"}]}', 1, "no message of the assistant"),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        1,
        r"\[1\]: 'content' is",
    ),
]


@pytest.mark.parametrize(("content", "line", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_refused_with_file_and_line(tmp_path, content, line, message):
    path = put(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert len(str(caught.value)) < 600


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"set\.jsonl: the file is empty"):
        read(put(tmp_path, b""))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "hi"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["prompt", "completion", "messages", "instruction", "input", "output", "text", "x"])
records = st.dictionaries(keys, json_values, max_size=3).map(lambda r: json.dumps(r).encode())
noise = st.binary(max_size=30) | st.sampled_from(
    [b"\n", b"\r", b"\xef\xbb\xbf", b'{"text": "a"}', b"\xff", b"[[", b"NaN"]
)


@given(st.lists(records | noise, max_size=4).map(b"\n".join) | st.lists(noise, max_size=6).map(b"".join))
def test_any_bytes_are_examples_or_a_data_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    path = put(folder, content, "fuzz.jsonl")
    try:
        examples = read(path)
    except DataError as error:
        assert str(error).startswith(str(path))
        return
    assert examples
    write(folder / "again.jsonl", examples)
    assert read(folder / "again.jsonl") == examples


def test_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = put(tmp_path, GOOD)
    with pytest.raises(UnicodeEncodeError):
        write(path, [Example(text="\ud800")])
    assert path.read_bytes() == GOOD and list(tmp_path.iterdir()) == [path]


def test_split_of_a_file_and_of_a_folder(tmp_path):
    examples = [pair("q", f"answer {i}") for i in range(100)]
    write(tmp_path / "all.jsonl", examples)
    train, held_out = read_split(tmp_path / "all.jsonl")
    assert sorted(map(str, train + held_out)) == sorted(map(str, examples)) and 2 <= len(held_out) <= 25
    with pytest.raises(DataError, match=r"found all\.jsonl, needed train\.jsonl and valid\.jsonl"):
        read_split(tmp_path)
    write(tmp_path / "train.jsonl", examples[:3])
    write(tmp_path / "test.jsonl", examples[2:4])
    assert read_split(tmp_path) == (examples[:3], examples[2:4])
    write(tmp_path / "valid.jsonl", examples[5:6])
    assert read_split(tmp_path) == (examples[:3], examples[5:6])


@pytest.mark.parametrize("fields", [{}, {"messages": (Message("user", "a"),), "text": "b"}])
def test_an_example_is_one_thing(fields):
    with pytest.raises(DataError, match="either messages or text"):
        Example(**fields)
