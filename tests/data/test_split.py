"""What is held out appears in no training text."""

import hashlib

from data_properties import held_out_is_unseen

from minift.data.example import pair
from minift.data.split import is_held_out, normalize, train_and_held_out


def test_held_out_is_unseen():
    held_out_is_unseen(train_and_held_out)


def test_sides_are_fixed():
    """By sha256, not by a hash that changes from process to process; these may never change, or old results lie."""
    assert normalize("  Return\tthe `x_y`,\n(THE) value! ") == "return the x y the value"
    assert normalize("+") == "+" != normalize("-")
    assert [i for i in range(60) if is_held_out(f"answer {i}")] == [0, 6, 19, 20, 24, 32, 49]
    assert [i for i in range(60) if hashlib.sha256(b"answer %d" % i).hexdigest() < "1999999999999999999"] == [
        0,
        6,
        19,
        20,
        24,
        32,
        49,
    ]  # 0x0.1999… is a tenth
    assert is_held_out("Answer: 19!") and not is_held_out("answer 19", share=0.0) and is_held_out("x", share=1.0)


def test_other_training_text_counts():
    answers = [f"answer {i}" for i in range(50)]
    train, held_out = train_and_held_out([pair("?", a) for a in answers])
    assert held_out and all(is_held_out(e.answer) for e in held_out)
    clean_train, clean = train_and_held_out([pair("?", a) for a in answers], [f"… as the *{held_out[0].answer}*, so"])
    assert clean_train == train and clean == held_out[1:]
