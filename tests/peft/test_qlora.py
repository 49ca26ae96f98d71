"""QLoRA: 4-bit linear layers, and everything else left as it is."""

import numpy as np
import pytest

from minift.models import llama
from minift.nn.weight import Frozen, learns, replace, trainable
from minift.peft import lora, qlora
from minift.peft.lora import LoRA
from minift.quant import double_quant, nf4
from minift.quant.nf4 import NF4Tensor

CONFIG = llama.Config(23, 16, 24, 2, 4, 2, 6)


@pytest.fixture
def params(rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in llama.shapes(CONFIG).items()}


@pytest.mark.parametrize("nested", [False, True])
def test_quantize_is_nf4_on_the_linear_layers_alone(params, nested):
    quantized = qlora.quantize(params, block_size=32, use_double_quant=nested)
    linear = lora.targets(params, "all-linear")
    assert list(quantized) == list(params)
    for name, weight in quantized.items():
        if name not in linear:
            assert weight is params[name]
            continue
        expected = nf4.quantize(params[name], 32)
        expected = double_quant.compress(expected) if nested else expected
        assert isinstance(weight, NF4Tensor)
        assert weight.block_size == 32
        assert np.array_equal(weight.codes, expected.codes)
        assert np.array_equal(weight.scales(), expected.scales())
        assert isinstance(weight.absmax, np.ndarray) != nested


def test_defaults(params, rng):
    """All linear layers, blocks of 64, double quantization; r = 8 and lora_alpha = 16, as in `lora.attach`."""
    for quantized in (qlora.quantize(params), lora.detach(qlora.attach(params, rng=rng))[0]):
        assert {n for n, w in quantized.items() if isinstance(w, NF4Tensor)} == set(lora.targets(params, "all-linear"))
        some = quantized["model.layers.0.mlp.up_proj.weight"]
        assert some.block_size == 64
        assert isinstance(some.absmax, double_quant.DoubleQuantizedScales)
        assert some.absmax.block_size == 256
    adapter = lora.detach(qlora.attach(params, rng=rng))[1]
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.lora_dropout) == (8, 16, False, 0)


def test_attach_passes_everything_on(params, rng):
    attached = qlora.attach(
        params,
        ["v_proj"],
        r=3,
        lora_alpha=7,
        rng=np.random.default_rng(4),
        use_rslora=True,
        lora_dropout=0.25,
        block_size=128,
        use_double_quant=False,
    )
    base, adapter = lora.detach(attached)
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.lora_dropout) == (3, 7, True, 0.25)
    assert adapter.target_modules == ("v_proj",)
    assert adapter.over_nf4
    on_two = qlora.quantize(params, ["v_proj"])  # one base of each kind: it still belongs to the quantized one
    assert lora.detach(lora.attach(on_two, ["v_proj", "q_proj"], rng=rng))[1].over_nf4
    assert not lora.detach(lora.attach(params, ["v_proj"], rng=rng))[1].over_nf4
    assert isinstance(base["model.layers.0.mlp.up_proj.weight"], NF4Tensor)  # quantized, though it has no adapter
    assert base["model.layers.0.mlp.up_proj.weight"].block_size == 128
    assert isinstance(base["model.layers.0.mlp.up_proj.weight"].absmax, np.ndarray)
    assert not any(learns(w) for w in base.values())
    plain = lora.detach(lora.attach(params, ["v_proj"], r=3, rng=np.random.default_rng(4)))[1]
    assert all(np.array_equal(adapter.arrays[n], plain.arrays[n]) for n in plain.arrays)


def test_training_leaves_every_quantized_byte_as_it_was(params, rng):
    attached = qlora.attach(params, ["q_proj", "down_proj"], r=2, rng=rng)
    attached = replace(attached, {n: rng.standard_normal(a.shape).astype("f") for n, a in trainable(attached).items()})
    before = {n: w.base.codes.tobytes() for n, w in attached.items() if isinstance(w, LoRA)}
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 5))
    y, vjp = llama.forward(attached, tokens, CONFIG)
    gradients = vjp(rng.standard_normal(y.shape).astype(np.float32))
    stepped = replace(attached, {n: a - np.float32(0.1) * gradients[n] for n, a in trainable(attached).items()})
    assert {n: w.base.codes.tobytes() for n, w in stepped.items() if isinstance(w, LoRA)} == before
    dense = {n: Frozen(w.dense()) if isinstance(w, NF4Tensor) else w for n, w in lora.detach(attached)[0].items()}
    same = lora.insert(dense, lora.detach(attached)[1])
    y_dense, _ = llama.forward(same, tokens, CONFIG)
    assert np.array_equal(y, y_dense)  # QLoRA is the LoRA on the dequantized weights


def test_what_is_quantized_stays_as_it_is(params):
    once = qlora.quantize(params, ["q_proj"], block_size=32)
    twice = qlora.quantize(once)
    assert all(twice[n] is once[n] for n in lora.targets(params, ["q_proj"]))
    assert isinstance(twice["model.layers.0.self_attn.k_proj.weight"], NF4Tensor)
    frozen = {n: Frozen(w) for n, w in params.items()}
    assert isinstance(qlora.quantize(frozen)["model.layers.1.mlp.down_proj.weight"], NF4Tensor)


def test_refusals_name_the_layer(params, rng):
    name = r"^model\.layers\.0\.self_attn\.q_proj\.weight"
    with pytest.raises(ValueError, match=rf"{name} is LoRA.*: merge or detach the adapter before quantizing$"):
        qlora.quantize(lora.attach(params, ["q_proj"], rng=rng))
    params["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    name = r"^model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=rf"{name}: cannot quantize nan at index \(3, 4\)"):
        qlora.quantize(params)
