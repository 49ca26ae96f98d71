"""Layers of PyTorch: what they register, what survives a move, state dicts, merging, PEFT beside them, the compiler."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import peft
from minift_kernels.modules import LoRALinear, NF4Linear, QLoRALinear
from minift_kernels.peft import lora
from minift_kernels.quant import nf4

SETTINGS = {"lora_alpha": 7, "use_rslora": True, "lora_dropout": 0.25}


@pytest.fixture
def linear():
    torch.manual_seed(3)
    return nn.Linear(40, 24)


def trained(layer):
    """In the middle of training: B is not zero."""
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer


@pytest.mark.parametrize("make", [LoRALinear, QLoRALinear])
def test_forward_is_the_functions(make, linear):
    w = linear.weight.detach().clone()
    layer = trained(make.from_linear(linear, 3, **SETTINGS))
    x = torch.randn(2, 5, 40)
    base = layer.base_layer.weight if make is QLoRALinear else w
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert torch.equal(layer(x, 9), lora.forward(x, base, A, B, 7 / 3**0.5, 0.25, 9) + linear.bias)
    plain = lora.forward(x, base, A, B, 7 / 3**0.5) + linear.bias
    assert torch.equal(layer(x), plain) and torch.equal(layer.eval()(x, 9), plain)


@pytest.mark.parametrize("make", [LoRALinear, QLoRALinear])
def test_only_a_and_b_learn(make, linear):
    layer = make.from_linear(linear, 3, **SETTINGS)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    x = torch.randn(5, 40)
    base = nn.functional.linear(x, linear.weight, linear.bias) if make is LoRALinear else layer.base_layer(x)
    assert torch.equal(layer(x), base), "a fresh adapter is the base"
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        layer(x, 9).square().sum().backward()
        optimizer.step()
    changed = {n for n, t in layer.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize("use_double_quant", [False, True])
@pytest.mark.parametrize(
    "move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.float16)]
)
def test_codes_and_scales_survive_every_move(move, use_double_quant, linear):
    layer = trained(QLoRALinear.from_linear(linear, 3, use_double_quant=use_double_quant))
    base = layer.base_layer
    before, w = {n: b.clone() for n, b in base.named_buffers() if n != "bias"}, base.weight.dense()
    move(layer)
    assert layer.lora_A.weight.dtype == base.bias.dtype != torch.float32
    for name, buffer in before.items():
        kept = getattr(base, name)
        assert kept.dtype == buffer.dtype and torch.equal(kept, buffer), name
    assert torch.equal(base.weight.dense(), w)
    x = torch.randn(5, 40, dtype=base.bias.dtype)
    assert layer(x, 9).dtype == x.dtype


def test_a_move_to_another_device_takes_everything(linear):
    layer = QLoRALinear.from_linear(linear, 3).to("meta", torch.float16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    scales = [layer.base_layer.nested_absmax, layer.base_layer.nested_code, layer.base_layer.offset]
    assert {t.dtype for t in scales} == {torch.float32}


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_state_dicts_have_pefts_names_and_restore_every_bit(use_double_quant, linear):
    layer = trained(QLoRALinear.from_linear(linear, 3, lora_alpha=7, use_double_quant=use_double_quant))
    nested = {"nested_absmax", "nested_code", "offset"} if use_double_quant else set()
    base = {f"base_layer.{name}" for name in {"codes", "absmax", "bias"} | nested}
    assert set(layer.state_dict()) == {"lora_A.weight", "lora_B.weight"} | base
    other = QLoRALinear.from_linear(nn.Linear(40, 24), 3, lora_alpha=7, use_double_quant=use_double_quant)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 40)
    assert torch.equal(other(x), layer(x))
    dense = LoRALinear.from_linear(linear, 3)
    assert set(dense.state_dict()) == {
        "lora_A.weight", "lora_B.weight", "base_layer.weight", "base_layer.bias"
    }  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
def test_from_the_weight_of_a_model(quantized, linear):
    w = linear.weight.detach()
    base = nf4.quantize(w) if quantized else lora.Frozen(w)
    A, B = torch.randn(3, 40, requires_grad=True), torch.randn(24, 3, requires_grad=True)
    weight = lora.LoRA(base, A, B, 7, lora_dropout=0.25)
    layer = (QLoRALinear if quantized else LoRALinear).from_weight(weight)
    x = torch.randn(5, 40)
    assert torch.equal(layer(x, 9), weight.linear(x, 9))
    assert layer.lora_A.weight.data_ptr() != A.data_ptr()
    if quantized:
        assert torch.equal(NF4Linear.from_weight(base)(x), base.linear(x))


@pytest.mark.parametrize("make", [LoRALinear, QLoRALinear])
def test_merge(make, linear):
    layer = trained(make.from_linear(linear, 3, lora_alpha=7))
    base = layer.base_layer.weight.dense() if make is QLoRALinear else linear.weight
    merged = layer.merge()
    torch.testing.assert_close(merged.weight, base + 7 / 3 * layer.lora_B.weight @ layer.lora_A.weight)
    assert type(merged) is nn.Linear and not any(p.requires_grad for p in merged.parameters())
    assert torch.equal(merged.bias, linear.bias) and layer.merge(torch.float16).weight.dtype == torch.float16
    if make is QLoRALinear:
        assert torch.equal(layer.base_layer.merge().weight, base)


def test_peft_computes_the_same(linear):
    """Its layer on ours: the same state dict but for its adapter's name."""
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=7, lora_dropout=0.0)
    theirs = peft.get_peft_model(nn.Sequential(linear), config)
    ours = trained(LoRALinear.from_linear(nn.Linear(40, 24), 3, 7))
    theirs.base_model.model[0].load_state_dict(
        {n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t
         for n, t in ours.state_dict().items()}
    )  # fmt: skip
    x = torch.randn(5, 40)
    torch.testing.assert_close(ours(x), theirs(x))


def test_repr_and_refusals(linear):
    layer = QLoRALinear.from_linear(linear, 3, **SETTINGS)
    assert "QLoRALinear(\n  r=3, lora_alpha=7, lora_dropout=0.25\n" in repr(layer)
    assert "NF4Linear(40 to 24, 4.192 bits per parameter)" in repr(layer)
    for settings, message in (
        ({"r": 0}, "r is 0 and lora_alpha 16, needed"),
        ({"lora_alpha": -1}, "r is 8 and lora_alpha -1, needed"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, needed 0 <= lora_dropout < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRALinear(linear, **settings)
    with pytest.raises(ValueError, match=r"weight: shape \(64,\), needed \(out, in\)"):
        NF4Linear(nf4.quantize(torch.ones(64)))


def test_compiles_to_one_graph():
    """In a process of its own: here the compiler is off. Both passes, both backends, the same bits."""
    program = """
        import torch
        from minift_kernels.modules import LoRALinear, NF4Linear, QLoRALinear

        torch.manual_seed(0)
        for backend in ("torch", "interpreter"):
            for make in (LoRALinear, QLoRALinear):
                linear = torch.nn.Linear(64, 10)
                layer = make.from_linear(linear, 3, lora_alpha=7, lora_dropout=0.25, backend=backend)
                torch.nn.init.normal_(layer.lora_B.weight)
                x = torch.randn(3, 64, requires_grad=True)
                compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
                results = []
                for f in (layer, compiled):
                    y = f(x, 9)
                    results.append((y, *torch.autograd.grad(
                        y.square().sum(), (x, layer.lora_A.weight, layer.lora_B.weight))))
                assert all(map(torch.equal, *results)), (backend, make)
            layer = NF4Linear.from_linear(linear, backend=backend)
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        print("same bits")
    """
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == "same bits\n", done.stderr[-2000:]
