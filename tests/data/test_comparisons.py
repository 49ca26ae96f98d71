"""Files of comparisons and of candidates: every form, refusals that say where, and appending that survives a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.data import candidates, comparisons
from minift.data.candidates import Candidates
from minift.data.comparisons import Comparison, read, write
from minift.data.example import DataError, Example, Message, pair
from minift.data.templates import CHATML, PLAIN, answer_spans

SKY = (Message("user", "What color is the sky?"),)
BLUE = Comparison(SKY, "It is blue.", "It is green.")
BLUE_LINE = b'{"prompt": "What color is the sky?", "chosen": "It is blue.", "rejected": "It is green."}\n'


def put(folder, content: bytes, name="c.jsonl"):
    (folder / name).write_bytes(content)
    return folder / name


def turn(role, content):
    return {"role": role, "content": content}


ASKED, SYSTEM = turn("user", "What color is the sky?"), turn("system", "s")
GOOD, BAD = turn("assistant", "It is blue."), turn("assistant", "It is green.")
FORMS = [
    ({"prompt": "What color is the sky?", "chosen": "It is blue.", "rejected": "It is green."}, BLUE),
    ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "score": 3}, BLUE),
    ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "margin": None}, BLUE),
    ({"prompt": "passed over", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, BLUE),
    ({"chosen": "The sky is blue.", "rejected": "The sky is black."},
     Comparison((Message("user", "The sky is"),), " blue.", " black.")),
    ({"chosen": [SYSTEM, ASKED, GOOD, ASKED, BAD], "rejected": [SYSTEM, ASKED, GOOD, ASKED, GOOD]},
     Comparison((Message("system", "s"), *SKY, Message("assistant", "It is blue."), *SKY),
                "It is green.", "It is blue.")),
    ({"prompt": "p", "chosen": " x\n", "rejected": "", "margin": 2, "rater": "me", "tie": True, "side": "right"},
     Comparison((Message("user", "p"),), " x\n", "", 2.0, "me", True, "right")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), FORMS)
def test_forms(tmp_path, fields, expected):
    path = put(tmp_path, json.dumps(fields).encode() + b"\n" + BLUE_LINE)
    assert read(path) == [expected, BLUE]
    write(tmp_path / "again.jsonl", [expected, BLUE])
    assert read(tmp_path / "again.jsonl") == [expected, BLUE]


def shared_turns(fields):
    """The rule by which TRL finds an implicit prompt, for messages: all that both lists begin with."""
    n = next(i for i, (a, b) in enumerate(zip(fields["chosen"], fields["rejected"], strict=False)) if a != b)
    return fields["chosen"][:n], fields["chosen"][n:], fields["rejected"][n:]


@pytest.mark.parametrize("fields", [f for f, _ in FORMS if "prompt" not in f and isinstance(f["chosen"], list)])
def test_the_implicit_prompt_is_that_of_trl(fields):
    ours = comparisons.to_record(comparisons.from_record(fields))
    assert (ours["prompt"], ours["chosen"], ours["rejected"]) == shared_turns(fields)


def refused(**fields):
    return json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"} | fields).encode()


REFUSED = [
    (refused(rejected="a"), "'chosen' and 'rejected' are equal"),
    (refused(rejected=" a\n"), "'chosen' and 'rejected' are equal"),
    (b'{"prompt": "p", "chosen": "a"}', "'rejected' is missing; found 'prompt', 'chosen'; needed"),
    (b'{"prompt": "p", "completion": "a"}', "'chosen' is missing"),
    (refused(prompt=""), "'prompt' is empty"),
    (refused(prompt=None), "'prompt' is null, needed a string"),
    (refused(chosen=3), "'chosen' is a number, needed a string"),
    (refused(chosen=[GOOD]), "'chosen' is a list, needed a string"),
    (refused(margin="1"), "'margin' is a string, needed a number"),
    (refused(margin=True), "'margin' is true, needed a number"),
    (refused(margin=-1), "'margin' is -1.0, needed a finite number of 0 or more"),
    (refused(margin=10**400), "'margin' is too large"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1e999}', "'margin' is inf, needed a finite"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "NaN is not JSON"),
    (refused(tie=1), "'tie' is a number, needed true or false"),
    (refused(side="top"), "'side' is 'top', needed 'left' or 'right'"),
    (refused(rater=["me"]), "'rater' is a list"),
    (refused(chosen="\ud800"), "half a surrogate pair"),
    (b'{"chosen": "It is", "rejected": "They are"}', "begin differently, so there is no prompt"),
    (b'{"chosen": "blue", "rejected": "black"}', "begin differently, so there is no prompt"),
    (b'{"chosen": " a", "rejected": " b"}', "begin differently, so there is no prompt"),
    (refused(prompt=[ASKED], chosen=[ASKED, GOOD], rejected=[BAD]), "'chosen' has, after the prompt, messages of user"),
    (refused(prompt=[ASKED], chosen=[GOOD], rejected=[ASKED]), "'rejected' has, after the prompt, messages of user;"),
    (refused(prompt=[SYSTEM], chosen=[GOOD], rejected=[BAD]), "the prompt ends with the system"),
    (refused(prompt=[ASKED, GOOD], chosen=[GOOD], rejected=[BAD]), "the prompt ends with the assistant"),
    (json.dumps({"chosen": [GOOD], "rejected": [BAD]}).encode(), "the prompt ends before it began"),
    (refused(prompt=[], chosen=[GOOD], rejected=[BAD]), "'prompt' is an empty list"),
    (refused(prompt=[ASKED], chosen=[GOOD], rejected=["b"]), r"rejected\[0\] is a string"),
    (refused(prompt=[turn("human", "q")], chosen=[GOOD], rejected=[BAD]), r"prompt\[0\]: unknown role 'human'"),
    (refused(prompt=[turn("user", "")], chosen=[GOOD], rejected=[BAD]), r"prompt\[0\]: 'content' is empty"),
    (b"[]", "found an empty list, needed a JSON object with"),
    (b"", "a blank line"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}', "'chosen' stands twice"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused_with_file_and_line(tmp_path, line, message):
    path = put(tmp_path, BLUE_LINE + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and len(str(caught.value)) < 600


values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries({"role": inner, "content": inner}),
    max_leaves=6,
)
turns = st.lists(
    st.builds(turn, st.sampled_from(["user", "user", "assistant", "assistant", "system"]), st.text(max_size=3)),
    max_size=3,
)
KEYS = ["prompt", "chosen", "rejected", "margin", "tie", "side", "rater", "answers"]
lines = st.dictionaries(st.sampled_from(KEYS), st.text(max_size=3) | turns | values, max_size=6).map(
    lambda fields: json.dumps(fields).encode()
)


@given(st.lists(lines | st.binary(max_size=12) | st.just(BLUE_LINE.strip()), max_size=3).map(b"\n".join))
def test_any_bytes_are_comparisons_or_a_data_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for module in (comparisons, candidates):
        path = put(folder, content, "fuzz.jsonl")
        try:
            found = module.read(path)
        except DataError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1000
            str(error).encode("utf-8", "backslashreplace")
            with pytest.raises(DataError), module.journal(put(folder, content + b"\n?\n", "j.jsonl")):
                pass
            assert (folder / "j.jsonl").read_bytes() == content + b"\n?\n"  # nothing of ours is cut off
            continue
        (folder / "again.jsonl").unlink(missing_ok=True)
        with module.journal(folder / "again.jsonl") as journal:
            for entry in found:
                journal.append(entry)
        assert module.read(folder / "again.jsonl") == found == journal.entries


@given(st.builds(Comparison, st.just(SKY), st.text("ab 🎉\n\u2028\x00", max_size=5),
                 st.text("cd", min_size=1, max_size=3), st.none() | st.floats(0, 1e300),
                 st.none() | st.just("é"), st.booleans(), st.sampled_from([None, "left", "right"])))  # fmt: skip
def test_what_is_written_is_read(tmp_path_factory, comparison):
    path = tmp_path_factory.getbasetemp() / "w.jsonl"
    write(path, [comparison, BLUE])
    assert read(path) == [comparison, BLUE]


def test_candidates(tmp_path):
    path = put(tmp_path, b'{"prompt": "p", "answers": ["a", "", "b"], "x": 1}\n')
    assert candidates.read(path) == [Candidates((Message("user", "p"),), ("a", "", "b"))]
    for line, message in [
        (b'{"prompt": "p", "answers": ["a"]}', "'answers' holds 1, needed at least 2"),
        (b'{"prompt": "p", "answers": "ab"}', "'answers' is a string, needed a list"),
        (b'{"prompt": "p", "answers": ["a", 2]}', r"'answers\[1\]' is a number"),
        (b'{"prompt": [{"role": "assistant", "content": "p"}], "answers": ["a", "b"]}', "does not end with a question"),
        (b'{"prompt": "p"}', "'answers' is missing"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            candidates.read(put(tmp_path, line))
        assert str(caught.value).startswith(f"{path}, line 1: ")


def test_an_empty_answer_goes_through_the_template():
    """A model may say nothing; what is learned of it is to stop."""
    for template, end in ((CHATML, "<|im_end|>"), (PLAIN, "</s>")):
        conversation = (*SKY, Message("assistant", ""))
        text, [(start, stop)] = answer_spans(conversation, template, eos_token="</s>")
        assert text[start:stop].strip() == end
    assert Example(conversation) == pair(SKY[0].content, "")


# --- appending --------------------------------------------------------------------------------------------------------


def test_a_line_that_was_not_finished_is_cut_off(tmp_path):
    """At every byte where a kill can come."""
    write(tmp_path / "c.jsonl", [BLUE])
    first = (tmp_path / "c.jsonl").read_bytes()
    second = json.dumps(comparisons.to_record(Comparison(SKY, "é🎉", "no", tie=True)), ensure_ascii=False).encode()
    for kept in range(len(second) + 1):
        path = put(tmp_path, first + second[:kept])
        with comparisons.journal(path) as journal:
            assert len(journal.entries) == (2 if kept == len(second) else 1)
            journal.append(BLUE)
        assert read(path)[-1] == BLUE and path.read_bytes().endswith(b"}\n" + first)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    for content in (b"a diary", b'{"prompt": 3', b"a\nb", b'{"a": 1}', b'{"a": 1}\n{"pro'):
        path = put(tmp_path, content)
        with pytest.raises(DataError, match=r"c\.jsonl, line"), comparisons.journal(path):
            pass
        assert path.read_bytes().removesuffix(b"\n") in (content, b'{"a": 1}')
    with (
        pytest.raises(DataError, match="Is a directory, needed a JSONL file to write into"),
        comparisons.journal(tmp_path),
    ):
        pass


def test_two_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "new" / "c.jsonl"
    again = comparisons.journal(path)
    with comparisons.journal(path), pytest.raises(DataError, match="another process is writing it"):
        again.__enter__()
    with comparisons.journal(path) as journal:
        journal.append(BLUE)
    assert read(path) == [BLUE]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    write_to = os.write
    with comparisons.journal(tmp_path / "c.jsonl") as journal:
        journal.append(BLUE)

        def full(handle, data):
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return write_to(handle, data[:60])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(BLUE)
        monkeypatch.setattr(os, "write", lambda handle, data: write_to(handle, data[:7]))  # short writes are no error
        journal.append(BLUE)
        assert journal.entries == [BLUE, BLUE]
    assert read(tmp_path / "c.jsonl") == [BLUE, BLUE]


@pytest.mark.parametrize("when", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_appends(tmp_path, when):
    """All that the process said it had saved is there; the file can be gone on with."""
    program = (
        "from minift.data import comparisons as c\n"
        f"from minift.data.example import Message\nwith c.journal({str(tmp_path / 'c.jsonl')!r}) as journal:\n"
        "    for i in range(10**6):\n"
        "        journal.append(c.Comparison((Message('user', 'q'),), f'{i}', 'x' * 3000)); print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(20):
            process.stdout.readline()
        time.sleep(0.02)
        process.send_signal(when)
        said = [int(line) for line in process.stdout.read().split()]
    with comparisons.journal(tmp_path / "c.jsonl") as journal:
        assert len(journal.entries) >= max(said, default=19) + 1
        assert [c.chosen for c in journal.entries] == [f"{i}" for i in range(len(journal.entries))]
        journal.append(BLUE)
    assert read(tmp_path / "c.jsonl")[-1] == BLUE
