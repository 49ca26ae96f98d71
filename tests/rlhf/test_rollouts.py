"""Sampling: which tokens are the answer, when it ends, the same again from the same numbers; and scores of texts."""

import numpy as np
import pytest

from minift.data.batches import pad
from minift.data.example import Message
from minift.data.templates import encode_prompt
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.rlhf import reward_model
from minift.rlhf.logprobs import counts
from minift.rlhf.rollouts import encoded, sample, scored_by_function, scored_by_model, stop_tokens

PROMPTS = [
    (Message("user", q),) for q in ("What does `a` do?", "Why?", "What does `os.path.join` do, and why is it so?")
]


@pytest.fixture(scope="module")
def model():
    config, params = load_model("tiny")
    return config, llama.fuse(params), load_tokenizer("tiny")


@pytest.fixture(scope="module")
def said(model):
    config, params, tokenizer = model
    return sample(params, PROMPTS * 6, config, tokenizer, max_new_tokens=12, seed=(3, 1))


def test_a_row_is_the_prompt_and_then_what_counts(said, model):
    for row, prompt in enumerate(PROMPTS * 6):
        asked = encode_prompt(prompt, model[2])
        n, length = len(asked), said.batch.lengths[row]
        assert np.array_equal(said.batch.tokens[row, :n], asked)
        assert np.array_equal(np.nonzero(counts(said.batch)[row])[0], np.arange(n, length))
        assert np.array_equal(said.batch.labels[row, n:length], said.batch.tokens[row, n:length])


def test_an_answer_ends_with_its_first_stop_token_or_is_cut_off(model):
    config, params, tokenizer = model
    end = next(iter(stop_tokens(tokenizer)))
    head = llama.head_name(config)
    always = params | {head: type(params[head])(params[head].dense().copy())}
    hidden, _ = llama.backbone(params, encode_prompt(PROMPTS[0], tokenizer)[None], config)
    always[head].array[end] = 20 * hidden[0, -1]  # ends at once after this prompt; others may go on
    said = sample(always, PROMPTS[:1] * 4, config, tokenizer, max_new_tokens=5)
    assert said.ended.all() and said.texts == ("",) * 4 and counts(said.batch).sum() == 4
    never = params | {head: type(params[head])(params[head].dense().copy())}
    never[head].array[sorted(stop_tokens(tokenizer))] = 0
    said = sample(never, PROMPTS, config, tokenizer, max_new_tokens=5, temperature=0.01)
    assert not said.ended.any() and (counts(said.batch).sum(axis=1) == 5).all()


def test_cut_off_or_not_is_what_the_tokens_say(said, model):
    last = said.batch.tokens[np.arange(len(said)), said.batch.lengths - 1]
    stops = np.isin(last, sorted(stop_tokens(model[2])))
    assert np.array_equal(stops, said.ended)
    assert (counts(said.batch).sum(axis=1)[~said.ended] == 12).all()


def test_the_same_numbers_give_the_same_answers(said, model):
    config, params, tokenizer = model
    again = sample(params, PROMPTS * 6, config, tokenizer, max_new_tokens=12, seed=(3, 1))
    assert again.texts == said.texts and np.array_equal(again.batch.tokens, said.batch.tokens)
    other = sample(params, PROMPTS * 6, config, tokenizer, max_new_tokens=12, seed=(3, 2))
    assert other.texts != said.texts


def test_the_likeliest_answer_does_not_depend_on_who_else_is_asked(model):
    config, params, tokenizer = model
    together = sample(params, PROMPTS, config, tokenizer, max_new_tokens=6, temperature=0).texts
    alone = [sample(params, [p], config, tokenizer, max_new_tokens=6, temperature=0).texts[0] for p in PROMPTS]
    assert list(together) == alone


def test_nobody_to_ask_is_refused(model):
    config, params, tokenizer = model
    with pytest.raises(ValueError, match="0 prompts"):
        sample(params, [], config, tokenizer)
    with pytest.raises(ValueError, match="0 new tokens"):
        sample(params, PROMPTS, config, tokenizer, max_new_tokens=0)


def test_a_function_is_asked_with_question_and_answer():
    score = scored_by_function(lambda prompt, answer: len(prompt) - 100 * len(answer))
    prompts = [(Message("user", "abc"), Message("assistant", "x"), Message("user", "de")), PROMPTS[1]]
    assert score(prompts, ["1", ""]).tolist() == [8 - 100, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e60])
def test_a_reward_that_is_no_number_is_refused(bad):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"'hello'.*needed a finite number"):
        scored_by_function(lambda prompt, answer: bad)(PROMPTS[:1], ["hello"])


def test_a_reward_model_reads_each_text_by_itself(model):
    config, _, tokenizer = model
    params = reward_model.with_head(load_model("tiny")[1], np.random.default_rng(1))
    prompts, texts = PROMPTS * 30, [f"Return {'very ' * (i % 7)}much." for i in range(90)]
    scores = scored_by_model(params, config, tokenizer)(prompts, texts)
    alone = [
        reward_model.score(params, pad([encoded(p, t, tokenizer)]), config)[0][0]
        for p, t in zip(prompts, texts, strict=True)
    ]
    # The same products in rectangles of another shape: sums of at most 352 float32 terms, a few layers deep.
    assert np.allclose(scores, alone, rtol=0, atol=352 * 2**-24 * np.abs(alone).max() * config.num_hidden_layers)
    assert np.ptp(alone) > 0.01
