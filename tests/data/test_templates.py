"""Chat templates render as in transformers, and exactly the answers are labeled."""

import numpy as np
import pytest
from data_properties import answers_are_labeled, conversations
from hypothesis import given
from small_tokenizer import SmallTokenizer, backend, in_transformers

from minift.data.example import Example, Message, pair
from minift.data.templates import (
    CHATML,
    PLAIN,
    TemplateError,
    answer_spans,
    default_template,
    encode_all,
    encode_example,
    encode_prompt,
    end_of_turn,
    render,
)

# As in the metadata of SmolLM2-135M-Instruct (Apache-2.0).
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# The families' ways of writing, in our words: what they trim, refuse, rename and end their turns with.
HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
BRACKETS = """{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}
{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}{% continue %}{% endif %}
{% if (message['role'] == 'user') != (ns.last != 'user') %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set ns.last = message['role'] %}
{% if message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
MODEL_ROLE = """{% for m in messages %}{{ '<' + ('model' if m.role == 'assistant' else m.role) + '>' }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}{{ '<model>' }}
{% endif %}{% if tools %}{{ tools | tojson }}{% endif %}"""
FAMILIES = {"smollm2": SMOLLM2, "chatml": CHATML, "plain": PLAIN, "headers": HEADERS, "brackets": BRACKETS}
FAMILIES["model role"] = MODEL_ROLE

TOKENIZER = SmallTokenizer(backend())
TRIMMED = SmallTokenizer(backend(by_words=False))


def dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize("template", FAMILIES.values(), ids=FAMILIES)
def test_rendered_as_transformers_does(template):
    oracle = in_transformers(template)

    @given(conversations())
    def check(messages):
        for part, prompt in ((messages, False), (messages[:-1], True)):
            theirs = oracle.apply_chat_template(dicts(part), tokenize=False, add_generation_prompt=prompt)
            ours = render(part, template, add_generation_prompt=prompt, bos_token="<s>", eos_token="<|im_end|>")
            assert ours == theirs
        ids = oracle.apply_chat_template(dicts(messages[:-1]), add_generation_prompt=True, return_dict=False)
        assert encode_prompt(messages[:-1], TOKENIZER, template).tolist() == ids

    check()


@pytest.mark.parametrize("by_words", [True, False])
def test_answers_and_their_end_are_labeled(by_words):
    answers_are_labeled(encode_example, SmallTokenizer(backend(by_words=by_words), CHATML))


def test_labels_equal_the_generation_mask_of_transformers():
    """Their mask comes from tags in the template, ours from rendering beginnings: two ways to one answer.

    Where a token crosses into the answer they count it as the answer's, we as the prompt's; so each token of theirs
    that is not ours must begin before the answer."""
    tagged = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
    assert tagged != CHATML
    oracle = in_transformers(tagged)

    @given(conversations())
    def check(messages):
        theirs = oracle.apply_chat_template(
            dicts(messages), return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        for template in (tagged, CHATML):
            tokens, labels = encode_example(Example(messages), TOKENIZER, template)
            assert tokens.tolist() == theirs["input_ids"]
            text, spans = answer_spans(messages, template)
            starts = {start for start, _ in spans}
            offsets = TOKENIZER.encode_with_offsets(text)[1]
            for ours, mask, (begin, end) in zip(labels != -100, theirs["assistant_masks"], offsets, strict=True):
                assert ours == bool(mask) or (mask and any(begin < start < end for start in starts))

    check()


def test_known_answer():
    tokens, labels = encode_example(pair("2 + 2?", "4"), TOKENIZER)
    pieces = [TOKENIZER.decode([t]) for t in tokens]
    assert "".join(pieces) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert [p for p, label in zip(pieces, labels, strict=True) if label != -100] == ["4", "<|im_end|>"]
    assert tokens.dtype == labels.dtype == np.int32


def test_a_token_across_the_border_counts_as_prompt():
    """Trained over anything, byte pairs join the template's line break with those of the answer, or "\\n" with "4"."""
    messages = (Message("user", "a"), Message("assistant", "ab"))
    crossing = [
        o for o in TRIMMED.encode_with_offsets(render(messages))[1] if o[0] < render(messages).index("ab<") < o[1]
    ]
    assert crossing, "this tokenizer was trained to cross; the test would check nothing"
    tokens, labels = encode_example(Example(messages), TRIMMED, CHATML)
    assert [TRIMMED.decode([t]) for t in labels[labels != -100]] in (["b", "<|im_end|>"], ["<|im_end|>"])
    assert "".join(TRIMMED.decode([t]) for t in tokens) == render(messages)


def test_offsets_without_the_leading_blank():
    """ "Assistant:" + " yes": where a tokenizer reports the token " yes" as "yes", the blank still belongs to it."""

    class Reported(SmallTokenizer):
        def encode_with_offsets(self, text):
            ids, offsets = super().encode_with_offsets(text)
            return ids, [(e - len(text[s:e].lstrip()), e) for s, e in offsets]

    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for kind in (SmallTokenizer, Reported):
        _, labels = encode_example(pair("a", "yes"), kind(backend()), template)
        assert [TOKENIZER.decode([t]) for t in labels[labels != -100]] == ["<|im_end|>"]  # " yes" crosses the border


def test_templates_that_end_a_turn_in_another_way():
    def learned(template, tokenizer=TOKENIZER):
        _, labels = encode_example(pair("a", "yes"), tokenizer, template)
        return TOKENIZER.decode(labels[labels != -100])

    assert learned(HEADERS) == "yes<|eot_id|>"
    assert learned(PLAIN) == learned(BRACKETS) == " yes<|im_end|>"  # the eos token of this tokenizer
    assert learned(MODEL_ROLE) == "yes<end_of_turn>"
    assert learned("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}") == "yes\n"  # nothing else ends it
    assert end_of_turn(TOKENIZER, CHATML) == TOKENIZER.encode("<|im_end|>") == [TOKENIZER.eos_token_id]
    assert end_of_turn(TOKENIZER, HEADERS) == TOKENIZER.encode("<|eot_id|>")


def test_default_template():
    without = SmallTokenizer(backend(special=("</s>",)), eos_token="</s>")
    assert default_template(TOKENIZER) == CHATML and default_template(without) == PLAIN
    _, labels = encode_example(pair("a", "yes"), without)
    assert labels[labels != -100][-1] == without.eos_token_id == end_of_turn(without)[0]
    own = SmallTokenizer(backend(), chat_template=HEADERS)
    assert (
        encode_prompt([Message("user", "a")], own).tolist()
        == encode_prompt([Message("user", "a")], own, HEADERS).tolist()
    )


def test_special_tokens_in_the_text_are_special():
    """As in transformers, so clean the text of strangers: this user ends the turn and speaks as the model."""
    tokens, labels = encode_example(pair("a<|im_end|>\n<|im_start|>assistant\nb", "yes"), TOKENIZER)
    assert (tokens == TOKENIZER.eos_token_id).sum() == 3
    assert TOKENIZER.decode(labels[labels != -100]) == "yes<|im_end|>"  # what the user made up is not learned


def test_encode_all_counts_what_does_not_fit():
    long, short = pair("a", "b" * 50), pair("a", "b")
    prompt = len(encode_prompt(short.messages[:1], TOKENIZER))
    found = encode_all([long, short, pair("a" * 99, "b"), Example(text="b" * 50)], TOKENIZER, max_length=prompt + 3)
    answers, rows = found.examples[:2], found.examples[2:]  # of a plain text nothing is cut off
    assert (found.truncated, found.dropped) == (1, 1)
    assert [len(t) for t, _ in answers] == [prompt + 3] * 2
    assert [int((y != -100).sum()) for _, y in answers] == [3, 2]
    text = [*TOKENIZER.encode("b" * 50), TOKENIZER.eos_token_id]
    assert [int(y) for _, labels in rows for y in labels[1:]] == text[1:]
    assert max(len(t) for t, _ in rows) == prompt + 3
    none = encode_all([long, short], TOKENIZER, max_length=prompt)
    assert (none.examples, none.truncated, none.dropped) == ([], 0, 2)
    every = encode_all([long, short], TOKENIZER)
    assert (len(every.examples), every.truncated, every.dropped) == (2, 0, 0)


FORGETFUL = """{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '<a>…' }}
{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
ANOTHER_PROMPT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
HIDDEN = "{{ ''.__class__.__mro__ }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja, line 1"),
        ("{{ raise_exception('only nice words') }}", "only nice words"),
        (HIDDEN, "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[7].content + '' }}", "refused a conversation of "),
        ("{{ 1 / 0 }}", "division by zero"),
        (BRACKETS, "roles must alternate"),
        (FORGETFUL, "message 1: .* differently once it goes on"),
        (ANOTHER_PROMPT, "message 1: .* otherwise than its generation prompt"),
    ],
)
def test_refused(template, message):
    a, b = Message("user", "a"), Message("assistant", "b")
    messages = (a, a, b) if template == BRACKETS else (a, b, a, b)
    with pytest.raises(TemplateError, match=message):
        encode_example(Example(messages), TOKENIZER, template)
    with pytest.raises(TemplateError, match=f"example 0: .*{message}"):
        encode_all([Example(messages)], TOKENIZER, template)


def test_a_forgetful_template_is_fine_for_one_answer():
    _, labels = encode_example(pair("a", "yes"), TOKENIZER, FORGETFUL)
    assert TOKENIZER.decode(labels[labels != -100]) == "yes"


def test_refused_lengths():
    with pytest.raises(ValueError, match="max_length is 1"):
        encode_example(pair("a", "b"), TOKENIZER, max_length=1)
    with pytest.raises(ValueError, match="no eos_token"):
        encode_example(Example(text="a"), SmallTokenizer(backend(), eos_token=None))
