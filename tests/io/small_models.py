"""Small random models, made by the libraries whose files we read, and their logits."""

import functools

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from minift.models import llama
from minift.nn.rope import frequencies
from minift.nn.weight import replace, trainable
from minift.peft import lora

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


def config(**changes):
    """What `torch_llama` makes, as minift says it."""
    return llama.Config(**(SIZES | {"head_dim": 8, "rms_norm_eps": 1e-6} | changes))


def in_double(network):
    """A network of transformers, or of PEFT around one, in float64 throughout; its angles and its RMSNorm are float32
    inside whatever its dtype."""

    def angles(x, position_ids):
        phi = position_ids[..., None].double() * torch.tensor(frequencies(8, 10000.0))
        both = torch.cat([phi, phi], -1)
        return both.cos(), both.sin()

    def norm(module, x):
        return torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)

    for module in network.double().eval().modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.forward = angles
        elif isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(norm, module)
    return network


def assert_same_logits(params, adapter, network, ours=None):
    """Our logits and theirs, both in float64. Two right results differ by the network's condition times 2⁻⁵³, and the
    condition is measured on the spot: how far float32 moves ours, times 2⁻²⁹ (the ratio of the roundoffs) times 16, for
    what one run happens to be luckier in than another. (tests/models/test_llama.py)"""
    tokens = np.arange(24).reshape(2, 12) * 7 % SIZES["vocab_size"]
    ours = ours or (lambda carried: llama.forward(carried, tokens, config())[0])
    single, double = (
        ours(cast(lora.insert({n: w.astype(dtype) for n, w in params.items()}, adapter), dtype))
        for dtype in (np.float32, np.float64)
    )
    with torch.no_grad():
        theirs = in_double(network)(torch.from_numpy(tokens)).logits.numpy()
    assert double.dtype == theirs.dtype == np.float64 and double.shape == theirs.shape
    slack = 16 * 2.0**-29 * np.abs(double - single).max()
    assert np.abs(double - theirs).max() <= slack, f"off by {np.abs(double - theirs).max():.3g} of {slack:.3g}"


def cast(params, dtype):
    return replace(params, {name: array.astype(dtype) for name, array in trainable(params).items()})


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape, name
        a, b = (np.atleast_1d(x[name]).view(np.uint8) for x in (found, expected))
        np.testing.assert_array_equal(a, b, err_msg=name)
