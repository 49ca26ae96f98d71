"""Reward models in files: as adapters of type SEQ_CLS and as whole models, between minift, transformers and PEFT."""

import json

import numpy as np
import pytest
import small_policy
import torch
import transformers

from minift.data.batches import Batch
from minift.io import (
    FormatError,
    is_reward_model,
    load_adapter,
    load_model,
    load_reward_model,
    save_adapter,
    save_model,
    save_reward_model,
)
from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.weight import trainable
from minift.peft import lora
from minift.rlhf.reward_model import score, with_head
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import moved_by_rounding

CONFIG = small_policy.CONFIG
PAD = CONFIG.vocab_size - 1
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def base(tmp_path):
    """A language model's folder, and its parameters."""
    params = small_policy.params("full", dtype=np.float32)
    save_model(tmp_path / "base", CONFIG, params)
    return tmp_path / "base", params


def batch():
    """Rows of several lengths, filled up with a token that stands nowhere else, as transformers needs it."""
    rows = small_policy.batch(rows=6)
    real = np.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
    return Batch(np.where(real, rows.tokens % PAD, PAD), rows.labels, rows.lengths)


def assert_same_scores(params, theirs):
    """Both are float32, and within the bound of the exact scores; these differ by more from row to row."""
    bound, exact = moved_by_rounding(lambda p: score(p, batch(), CONFIG)[0], params, CONFIG.intermediate_size)
    assert np.ptp(exact) > 1000 * bound
    theirs.config.pad_token_id = PAD
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(batch().tokens)).logits[:, 0].numpy()
    assert np.abs(found - exact).max() <= bound
    assert np.abs(score(params, batch(), CONFIG)[0] - exact).max() <= bound


def classifier(folder):
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert type(network).__name__ == "LlamaForSequenceClassification"
    return network


def trained(params, seed=3):
    """A reward model that has learned something, with α ≠ r."""
    rng = np.random.default_rng(seed)
    headed = with_head(params, rng)
    fresh = lora.attach(headed, TARGETS, r=3, lora_alpha=7, rng=rng, modules_to_save=["score"])
    return small_policy.move(fresh, dtype=np.float32)


def test_peft_scores_with_our_adapter(base, tmp_path):
    folder, params = base
    ours = trained(params)
    save_adapter(tmp_path / "a", lora.detach(ours)[1])
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = PeftModel.from_pretrained(classifier(folder), tmp_path / "a")
    assert_same_scores(ours, theirs)


def test_we_score_with_peft_s_adapter(base, tmp_path):
    folder, params = base
    torch.manual_seed(0)
    settings = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=7, target_modules=TARGETS)
    theirs = get_peft_model(classifier(folder), settings)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "a")
    headed = with_head(params, np.random.default_rng(9))  # another head: the file's replaces it
    ours = lora.insert(headed, load_adapter(tmp_path / "a", headed))
    assert trainable(ours).keys() >= {SCORE}
    assert_same_scores(ours, theirs)


def test_a_whole_reward_model_there_and_back(base, tmp_path):
    """Written here with the adapter merged, scored by transformers, written there, and read here again bit for bit."""
    ours = trained(base[1])
    save_reward_model(tmp_path / "whole", CONFIG, ours)
    assert is_reward_model(tmp_path / "whole")
    theirs = classifier(tmp_path / "whole")
    assert_same_scores(lora.merge(ours), theirs)
    theirs.config.pad_token_id = None
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("whole", "again"):
        config, params = load_reward_model(tmp_path / folder)
        assert config == CONFIG
        for name, weight in lora.merge(ours).items():
            assert np.array_equal(params[name], weight.dense()), name


def test_folders_of_other_models_are_refused(base, tmp_path):
    folder, params = base
    with pytest.raises(FormatError, match=r"architectures.*needed \['LlamaForSequenceClassification'\]"):
        load_reward_model(folder)
    with pytest.raises(FormatError, match=r"score\.weight.*nothing.*shape \(1, 8\)"):
        save_reward_model(tmp_path / "a", CONFIG, params)
    two = with_head(params, np.random.default_rng(0)) | {SCORE: np.ones((2, 8), np.float32)}
    with pytest.raises(FormatError, match=r"score\.weight.*shape \(2, 8\).*shape \(1, 8\)"):
        save_reward_model(tmp_path / "a", CONFIG, two)
    surplus = with_head(params, np.random.default_rng(0)) | {llama.HEAD: np.ones((23, 8), np.float32)}
    with pytest.raises(FormatError, match=r"lm_head\.weight.*a tensor that a reward model does not have"):
        save_reward_model(tmp_path / "a", CONFIG, surplus)
    infinite = with_head(params, np.random.default_rng(0)) | {SCORE: np.full((1, 8), np.inf, np.float32)}
    with pytest.raises(FormatError, match=r"score\.weight"):
        save_reward_model(tmp_path / "a", CONFIG, infinite)
    assert not (tmp_path / "a").exists()
    save_reward_model(tmp_path / "a", CONFIG, with_head(params, np.random.default_rng(0)))
    with pytest.raises(FormatError):
        save_reward_model(tmp_path / "a", CONFIG, with_head(params, np.random.default_rng(0)))
    with pytest.raises(FormatError, match=r"score\.weight"):
        load_model(tmp_path / "a")  # no language model: it writes no text
