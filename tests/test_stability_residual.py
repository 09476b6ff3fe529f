"""Residual step size and Peri-LN: against blocks written out by hand, through saving, compiling and adapters."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers_models import distance, fill, oracle, scalora_config, tiny_bert, tiny_gpt2, tiny_llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_scalora.stability import load_residual, scale_residual, to_peri_ln
from peft_scalora.stability.residual import residual_ends

BUILDERS = {"GPT-2": tiny_gpt2, "Llama": tiny_llama, "BERT": tiny_bert}
CHANGES = {
    "step": lambda m: scale_residual(m, 0.3),
    "peri": to_peri_ln,
    "all": lambda m: (scale_residual(m, 0.3, zero_init=True), to_peri_ln(m)),
}
every_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def stirred(model):
    """Everything that starts as a constant made random, so that nothing hides behind a 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "residual_end" in name or "norm" in name.lower() or "ln_" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def by_hand(name, x, block, scale, norms, mask):
    """One block written out, x + scale norm(f(x)) twice; without `norms` it stays the Pre-LN or post-LN block it is."""
    first, second = norms
    if name == "GPT-2":
        f_x = block.attn(block.ln_1(x), attention_mask=mask)[0]
        x = x + scale * (f_x if first is None else first(f_x))
        f_x = block.mlp(block.ln_2(x))
        return x + scale * (f_x if second is None else second(f_x))
    f_x = block.attention.output.dense(block.attention.self(x)[0])
    x = block.attention.output.LayerNorm(x + scale * f_x) if first is None else x + scale * first(f_x)
    f_x = block.output.dense(block.intermediate(x))
    return block.output.LayerNorm(x + scale * f_x) if second is None else x + scale * second(f_x)


@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
@every_change
def test_the_function_is_that_of_a_block_written_out(name, change):
    plain = stirred(BUILDERS[name]()).double()
    changed = copy.deepcopy(plain)
    change(changed)
    changed = stirred(changed).double()
    for path, parameter in plain.named_parameters():  # the two share all that both have
        if path in dict(changed.named_parameters()):
            parameter.data = changed.get_parameter(path).data
    ends = list(residual_ends(changed).values())
    blocks = plain.transformer.h if name == "GPT-2" else plain.bert.encoder.layer
    taken = changed.transformer.h if name == "GPT-2" else changed.bert.encoder.layer
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for i, (block, other) in enumerate(zip(blocks, taken)):
        pair, scale = ends[2 * i : 2 * i + 2], 1.0 if change is to_peri_ln else 0.3
        for end in pair:
            if end.alpha is not None:
                end.alpha.data.fill_(0.7)
        scale *= 1.0 if pair[0].alpha is None else 0.7
        expected = by_hand(name, x, block, scale, [end.norm for end in pair], mask)
        result = other(x, attention_mask=mask) if name == "GPT-2" else other(x)
        result = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert len(ends) == 4


@every_model
def test_a_step_of_one_changes_nothing_and_steps_are_set_anew(build):
    model = stirred(build())
    before = model(tokens()).logits
    names = set(model.state_dict())
    paths = scale_residual(model, 1.0)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    for step in (0.5, 0.1):
        assert scale_residual(model, step) == paths
        assert {end.step for end in residual_ends(model).values()} == {step}
    assert (model(tokens()).logits - before).abs().max() > 1e-2


@every_model
def test_zero_init_makes_blocks_the_identity_that_can_learn(build):
    model = build().eval()
    scale_residual(model, 1.0, zero_init=True)
    states = model(tokens(), output_hidden_states=True).hidden_states
    if build is not tiny_bert:  # whose blocks still normalise
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    model(tokens(), labels=torch.zeros(4, dtype=int) if build is tiny_bert else tokens()).loss.backward()
    assert all(end.alpha.grad.abs() > 0 for end in residual_ends(model).values())


@every_model
@every_change
def test_compiled_and_checkpointed_models_are_the_same(build, change):
    torch._dynamo.reset()
    model = build()
    change(model)
    model = stirred(model)
    expected = model(tokens()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()).logits, expected, rtol=1e-5, atol=1e-6)


@every_change
def test_the_configuration_that_was_given_stays_as_it_is(tmp_path, change):
    """Another model is built from the same configuration: it is saved and loaded as the ordinary model it is."""
    plain = tiny_gpt2().eval()
    config = plain.config
    before = config.to_dict()
    changed = type(plain)(config)
    change(changed)
    assert type(config).__name__ == "GPT2Config" and config.to_dict() == before
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(loaded(tokens()).logits, plain(tokens()).logits)
    with pytest.raises(ValueError, match="ordinary residual branches"):
        load_residual(tmp_path / "plain")
    configs = {id(m.config) for m in changed.modules() if hasattr(m, "config")}
    assert configs == {id(changed.config)}  # what is set on it reaches all of the model


def test_a_loaded_model_changes_no_other_one(tmp_path):
    changed = tiny_gpt2()
    scale_residual(changed, 0.5)
    twin = type(changed)(changed.config)
    scale_residual(twin, 0.25)
    assert {entry["step"] for entry in changed.config.residual} == {0.5}
    assert {entry["step"] for entry in twin.config.residual} == {0.25}


FRESH = """
import sys, torch
from peft_scalora.stability import load_residual
model = load_residual(sys.argv[1]).eval()
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@every_model
@every_change
def test_saved_models_load(tmp_path, build, change):
    model = build()
    change(model)
    model = stirred(model)
    model.save_pretrained(tmp_path)
    loaded = load_residual(tmp_path).eval()
    expected = model(tokens()).logits
    assert torch.equal(loaded(tokens()).logits, expected)
    assert {p: e.step for p, e in residual_ends(loaded).items()} == {p: e.step for p, e in residual_ends(model).items()}
    loaded.save_pretrained(tmp_path / "again")  # what was loaded can be changed, saved and loaded again
    scale_residual(loaded, 0.9)
    again = load_residual(tmp_path / "again", type(build())).eval()
    assert torch.equal(again(tokens()).logits, expected)


def test_saved_models_load_in_a_fresh_process_and_nowhere_else(tmp_path):
    model = tiny_gpt2()
    CHANGES["all"](model)
    model = stirred(model)
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens(), tmp_path / "tokens.pt")
    script = [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in ("model", "tokens.pt", "logits.pt"))]
    subprocess.run(script, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens()).logits)
    with pytest.raises(ValueError, match="residual_gpt2"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_other_folders_are_not_loaded(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ordinary residual branches: use from_pretrained"):
        load_residual(tmp_path)
    model = tiny_gpt2()
    scale_residual(model, 0.1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ResidualMine"]}))
    with pytest.raises(ValueError, match="no class 'Mine': give model_class"):
        load_residual(tmp_path)


@every_model
def test_adapters_go_on_top_and_merge(build):
    model = build()
    CHANGES["all"](model)
    model = get_peft_model(stirred(model), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="model has adapters"):
        scale_residual(get_peft_model(build(), LoraConfig(target_modules="all-linear")), 0.1)


def tiny_opt():
    """Its second branch ends in a linear layer of the block itself, fc2."""
    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.0, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config)


@every_change
@pytest.mark.parametrize("adapter", ["LoRA", "ScaLoRA"])
def test_an_adapter_on_the_last_linear_is_within_the_branch(tmp_path, change, adapter):
    """X + Δt f(X) with W + s B A in f: against the changed model with that weight written out."""
    model = tiny_opt()
    change(model)
    base = stirred(model)
    for end in residual_ends(base).values():
        if end.alpha is not None:
            end.alpha.data.fill_(0.7)
    if adapter == "LoRA":
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["fc2"], init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(base), config).eval()
    else:
        model = fill(get_peft_model(copy.deepcopy(base), scalora_config(target_modules=["fc2"])), inputs=tokens())
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    plain, expected = base(tokens()).logits, oracle(base, model, tokens())
    result = model(tokens()).logits
    assert distance(result, plain) > 1e-2
    assert distance(result, expected) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, result)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    torch.testing.assert_close(again(tokens()).logits, result)
    torch._dynamo.reset()
    compiled = torch.compile(again, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()).logits, result, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()).logits, plain)
    names = set(base.state_dict())
    assert set(again.unload().state_dict()) == names
    torch.testing.assert_close(again.unload()(tokens()).logits, plain)
    merged = model.merge_and_unload().eval()
    assert set(merged.state_dict()) == names and set(residual_ends(merged)) == set(residual_ends(base))
    assert distance(merged(tokens()).logits, expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert distance(load_residual(tmp_path / "merged").eval()(tokens()).logits, expected) < 1e-5


class Block(nn.Module):
    """A pre-LN block that nobody has heard of: its branches are a Sequential and a module that returns a tuple."""

    def __init__(self, width=6):
        super().__init__()
        self.before, self.then = nn.LayerNorm(width), nn.RMSNorm(width)
        self.mixing = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x):
        y = self.before(x)
        x = x + self.mixing(y, y, y, need_weights=False)[0]
        return x + self.feed(self.then(x))


class Stack(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_ones_own_are_found_by_what_they_compute():
    x = torch.randn(2, 5, 6)
    model = Stack()
    plain = copy.deepcopy(model)
    assert scale_residual(model, 0.25, inputs={"x": x}) == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("mixing", "feed")
    ]
    to_peri_ln(model, {"x": x})
    expected = x
    for block in plain.blocks:
        y = block.before(expected)
        expected = expected + 0.25 * nn.functional.layer_norm(block.mixing(y, y, y)[0], (6,))
        expected = expected + 0.25 * nn.functional.layer_norm(block.feed(block.then(expected)), (6,))
    torch.testing.assert_close(model(x), expected)
    again = Stack()
    scale_residual(again, 0.25, inputs={"x": x})
    to_peri_ln(again, {"x": x})
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)
    with pytest.raises(ValueError, match="Stack brings no dummy_inputs: give inputs"):
        scale_residual(Stack(), 0.25)


BRANCHES = {"GPT-2": ("attn", "mlp"), "Llama": ("self_attn", "mlp"), "BERT": ("attention.output", "output")}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("last_layers", ["zero", "tiny", "huge"])
def test_every_branch_is_found_whatever_the_weights(name, dtype, last_layers):
    """Rounding must not hide a branch, nor a branch that adds nothing yet, as where its last projection starts at 0."""
    model = BUILDERS[name]().to(dtype)
    for path, parameter in model.named_parameters():
        if path.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight", "output.dense.weight")):
            parameter.data *= {"zero": 0.0, "tiny": 1e-4, "huge": 1.0}[last_layers]
        elif last_layers == "huge" and path.endswith(("wte.weight", "embed_tokens.weight")):
            parameter.data *= 50  # against which the branches are below the rounding of bfloat16
    before = {path: parameter.clone() for path, parameter in model.state_dict().items()}
    random_state = torch.get_rng_state()
    paths = scale_residual(model, 0.1)
    blocks = {"GPT-2": "transformer.h", "Llama": "model.layers", "BERT": "bert.encoder.layer"}[name]
    found = [path.removesuffix(".dropout") for path in paths]
    assert found == [f"{blocks}.{i}.{branch}" for i in (0, 1) for branch in BRANCHES[name]]
    assert all(torch.equal(parameter, before[path]) for path, parameter in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


class Halved(Block):
    """Δt is there already, but outside of any module: nothing to put an end into."""

    def forward(self, x):
        return x + 0.5 * self.feed(self.before(x))


class Odd(Block):
    def forward(self, x):
        return self.then(x * self.feed(self.before(x)))


def test_what_cannot_be_placed_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"blocks\.0 \(Odd\) is not a block whose output .* mixing \(MultiheadAttention\)"
    ):
        scale_residual(Stack(Odd), 0.1, inputs={"x": torch.randn(2, 5, 6)})
    with pytest.raises(ValueError, match=r"blocks\.0 \(Halved\) is not a block whose output"):
        scale_residual(Stack(Halved), 0.1, inputs={"x": torch.randn(2, 5, 6)})
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        to_peri_ln(nn.Linear(2, 2))
    # Its second branch is two of the block's children, of which the last is what is added: it can be placed.
    assert scale_residual(tiny_opt(), 0.1) == [
        f"model.decoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "fc2")
    ]
    for step in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            scale_residual(tiny_gpt2(), step)


def tiny_gemma():
    """Its norms multiply by 1 + weight."""
    config = GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return GemmaForCausalLM(config)


@pytest.mark.parametrize("build", [tiny_gemma, tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_norms_normalise(tmp_path, build, dtype):
    """Whatever the class makes of its weight, and whatever the norm that was copied had learnt."""
    model = stirred(build()).to(dtype)
    to_peri_ln(model)
    x = 3 * torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True) if build is tiny_gpt2 else x
    expected = centred / centred.square().mean(-1, keepdim=True).sqrt()
    for end in residual_ends(model).values():
        torch.testing.assert_close(
            end.norm(x.to(dtype)).double(), expected, rtol=0, atol=1e-5 if dtype.itemsize > 2 else 0.04
        )
        assert end.norm.weight.dtype is dtype
    model.save_pretrained(tmp_path)
    loaded = load_residual(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_run_on_its_dummy_inputs_asks_for_inputs():
    """A ViT's are token ids."""
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = ViTForImageClassification(config).train()
    with pytest.raises(
        ValueError, match=r"ViTForImageClassification cannot run on its dummy_inputs \(input_ids\): give inputs"
    ):
        scale_residual(model, 0.1)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert scale_residual(model, 0.1, inputs={"pixel_values": torch.zeros(1, 3, 16, 16)}) == [
        f"vit.layers.{i}.{name}" for i in (0, 1) for name in ("attention", "mlp")
    ]
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):  # what the user gives speaks for itself
        scale_residual(Stack(), 0.1, inputs={"z": torch.zeros(2, 5, 6)})


class TripledNorm(nn.RMSNorm):
    def forward(self, x):
        return 3 * super().forward(x)


def test_norms_of_an_unknown_kind_are_refused_by_name():
    model = Stack()
    for block in model.blocks:
        block.before = TripledNorm(6)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks\.0\.before \(TripledNorm\) has a gain of 1 neither"):
        to_peri_ln(model, inputs={"x": torch.randn(2, 5, 6)})
    assert set(model.state_dict()) == names


def test_models_that_are_peri_ln_are_refused_and_can_be_scaled():
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.post_attention_layernorm normalises the output .* already"
    ):
        to_peri_ln(model)
    assert [path.rpartition(".")[2] for path in scale_residual(model, 0.1)][:2] == [
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ]
    ours = tiny_gpt2()
    to_peri_ln(ours)
    with pytest.raises(ValueError, match="already"):
        to_peri_ln(ours)
