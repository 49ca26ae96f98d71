"""Small random models, made by the libraries whose files we read."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def torch_llama(seed=0, dtype=torch.float32, **changes):
    """A Llama with random weights, also in the norms, so that no two tensors are alike."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1 if p.ndim == 1 else 0))
    return model.to(dtype).eval()


def numpy_state(model):
    """A torch model's parameters as float32 arrays; a tied head is not a parameter of its own."""
    return {name: p.detach().float().numpy() for name, p in model.named_parameters()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape, name
        a, b = (np.atleast_1d(x[name]).view(np.uint8) for x in (found, expected))
        np.testing.assert_array_equal(a, b, err_msg=name)
