"""data/checkpoints.py, data/tensors.py: published weights open here with the same logits; damage is named in one line."""
import json
import math
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import Code, needs_pipes
from data.files import UserError
from data.tensors import read_safetensors
from model import Config, load, make_model, save


def tokens(l, b=2, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def random_peer(name, seed=0, **config):
    """A model of transformers with random weights, its norms and biases too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    peer = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**config)).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p += 0.2 * torch.randn_like(p)
    return peer


def agree(ours, peer, l=37):
    with torch.no_grad():
        want = peer(tokens(l), use_cache=False).logits
        torch.testing.assert_close(ours(tokens(l))[0], want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def failure(path):
    """The message of the UserError that loading must raise: one line, with the file's name."""
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# Files


def test_safetensors_are_a_length_a_header_and_bytes(tmp_path):
    """The whole format, written by hand."""
    header = json.dumps({"b": {"dtype": "I64", "shape": [], "data_offsets": [6, 14]}, "__metadata__": {"format": "pt"},
                         "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
                         "c": {"dtype": "F32", "shape": [0, 2], "data_offsets": [14, 14]}}).encode()
    data = torch.tensor([1.5, -2, 3], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() + struct.pack("<q", -7)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.tensor([[1.5], [-2], [3]], dtype=torch.bfloat16))
    assert found["b"] == -7 and found["b"].shape == () and found["c"].shape == (0, 2) and len(found) == 3


# Peers: other programs with the same weights

LLAMA = dict(vocab_size=17, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=29)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("kv_heads, tie", [(1, False), (2, True), (4, False)])
def test_llama_opens_with_the_same_logits(kv_heads, tie, scaling, tmp_path):
    """Grouped queries, rotary scaling of Llama 3.1 (also under its older name), tied head, one file or many."""
    peer = random_peer("Llama", num_key_value_heads=kv_heads, tie_word_embeddings=tie, rope_theta=500.0,
                       rope_scaling=scaling, **LLAMA)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    for folder in ("one", "many"):
        ours, extra = load(tmp_path / folder)
        agree(ours, peer, 70)
        assert extra == {"layout": "llama"} and ours.config.tie == tie and ours.config.n_kv_head == kv_heads
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if scaling else None}
    (tmp_path / "one" / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "one")[0].config == ours.config


MAMBA = dict(vocab_size=17, hidden_size=20, num_hidden_layers=3)
PEERS = {"plain": ("Mamba", {}), "untied": ("Mamba", dict(tie_word_embeddings=False)),
         "n 5, k 3": ("Mamba", dict(state_size=5, conv_kernel=3)), "biases": ("Mamba", dict(use_bias=True)),
         "no conv bias": ("Mamba", dict(use_conv_bias=False)), "expand 3": ("Mamba", dict(expand=3)),
         "eps": ("Mamba", dict(layer_norm_epsilon=0.1)),
         "mamba2": ("Mamba2", dict(num_heads=8, head_dim=5, n_groups=1)),
         "mamba2, groups": ("Mamba2", dict(num_heads=8, head_dim=5, n_groups=2, state_size=7, layer_norm_epsilon=0.1)),
         "mamba2, tied": ("Mamba2", dict(num_heads=4, head_dim=10, n_groups=4, state_size=3, tie_word_embeddings=True)),
         "mamba2, biases": ("Mamba2", dict(num_heads=2, head_dim=20, n_groups=1, use_bias=True, use_conv_bias=False))}


@pytest.mark.parametrize("shape", PEERS)
def test_mamba_and_mamba2_open_with_the_same_logits_in_both_directions(shape, tmp_path):
    """transformers' folder opens here; what is saved here opens there; safetensors, torch and sharded files."""
    transformers = pytest.importorskip("transformers")
    name, config = PEERS[shape]
    peer = random_peer(name, **MAMBA, **config)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="1GB" if shape == "plain" else "3KB")
    ours, extra = load(tmp_path / "theirs")
    assert extra == {"layout": "hf"}
    agree(ours, peer)
    save(tmp_path / "back", ours, layout="hf")
    theirs = getattr(transformers, name + "ForCausalLM")
    back, told = theirs.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    agree(ours, back.eval())
    assert load(tmp_path / "back")[0].config == ours.config
    torch.save(peer.state_dict(), tmp_path / "back" / "pytorch_model.bin")
    (tmp_path / "back" / "model.safetensors").unlink()
    agree(load(tmp_path / "back")[0], peer)


# Layouts: every model in every layout that can hold it

MODELS = {
    "mamba": Config(("mamba",) * 3, d_model=12, vocab=17, d_state=5, d_conv=3),
    "MambaByte": Config(("mamba",) * 2, d_model=20, vocab=19, norm="layer", tie=False),
    "mamba, biases": Config(("mamba",) * 2, d_model=20, bias=True, conv_bias=False, expand=3),
    "mamba2": Config(("mamba2",) * 3, d_model=12, vocab=17, d_state=5, head_dim=4, n_group=3),
    "mamba2, untied": Config(("mamba2",), d_model=12, vocab=17, d_state=5, head_dim=8, norm="layer", tie=False),
    "llama": Config(("attention+mlp",) * 2, d_model=12, vocab=17, n_head=2, n_kv_head=1, d_mlp=7, norm_eps=1e-3,
                    rope_base=77.0, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "BiGS": Config(("s4d",) * 2, block="gated", d_model=8, vocab=19, d_state=6, expand=3, norm="layer", norm_eps=1e-12,
                   n_position=24),
}
HOLDS = {"state-spaces": ("mamba", "MambaByte", "mamba, biases", "mamba2", "mamba2, untied"),
         "mambabyte": ("mamba", "MambaByte", "mamba, biases"), "hf": ("mamba", "mamba, biases", "mamba2"),
         "llama": ("llama",), "bigs": ("BiGS",)}


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = make_model(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def logits(model):
    with torch.no_grad():
        return model(tokens(23))[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_round_trip_through_all_layouts_changes_no_bit(kind, tmp_path):
    """One after the other: what the last one held, with every setting that the model has."""
    model, want = make(MODELS[kind]), logits(make(MODELS[kind]))
    layouts = [layout for layout in HOLDS if kind in HOLDS[layout]]
    for layout in ("own", *layouts, "own"):
        path = tmp_path / (layout + ".pt")
        save(path, model, layout)
        model, _ = load(path)
        assert torch.equal(logits(model), want) and model.config == MODELS[kind]


def test_what_no_shape_tells_comes_from_config_or_is_refused(tmp_path):
    """Heads: Llama 1 has as many of keys as of queries and does not say so. Mamba-2's d_state is 128 where none is given."""
    save(tmp_path / "llama", make(replace(MODELS["llama"], n_kv_head=2)), "llama")
    config = tmp_path / "llama" / "config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("num_key_value_heads") == 2
    config.write_text(json.dumps(settings))
    assert load(tmp_path / "llama")[0].config.n_kv_head == 2
    config.write_text(json.dumps({key: settings[key] for key in settings if key != "num_attention_heads"}))
    assert "lacks 'n_head'" in failure(tmp_path / "llama")
    config.unlink()
    assert "config.json is missing" in failure(tmp_path / "llama")
    model = make(replace(MODELS["mamba2"], d_state=128, n_group=1, head_dim=4))
    save(tmp_path / "mamba2", model, "state-spaces")
    (tmp_path / "mamba2" / "config.json").write_text(
        '{"d_model": 12, "n_layer": 3, "vocab_size": 16, "ssm_cfg": {"layer": "Mamba2", "headdim": 4}}')
    assert load(tmp_path / "mamba2")[0].config == model.config


def test_the_first_type_of_segment_is_part_of_every_position(tmp_path):
    """BiGS adds a row of a table of types to each position; here all of a text is of type 0."""
    model = make(MODELS["BiGS"]).double()
    save(tmp_path, model, "bigs")
    path = tmp_path / "pytorch_model.bin"
    saved = torch.load(path)
    types = saved["bigs.embeddings.token_type_embeddings.weight"]
    assert types.shape == (2, 8) and not types.any()
    types = torch.randn(2, 8, dtype=torch.float64)
    torch.save(saved | {"bigs.embeddings.token_type_embeddings.weight": types}, path)
    with torch.no_grad():
        model.position_table.weight += types[0]
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


@pytest.mark.parametrize("layout", HOLDS)
def test_a_layout_that_cannot_hold_a_model_says_so(layout, tmp_path):
    for kind in MODELS.keys() - set(HOLDS[layout]):
        with pytest.raises(UserError, match=f"layout {layout} holds layers of"):
            save(tmp_path / "x", make(MODELS[kind]), layout)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="not one of own, state-spaces, mambabyte"):
        save(tmp_path / "x", make(MODELS["mamba"]), "onnx")


@pytest.mark.parametrize("head", [None, 7, [1.0], torch.zeros(18, 20).to_sparse()])
def test_a_head_that_is_no_dense_tensor_is_one_line(head, tmp_path):
    save(tmp_path, make(MODELS["MambaByte"]), "state-spaces")
    saved = torch.load(tmp_path / "pytorch_model.bin")
    torch.save({**saved, "lm_head.weight": head}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="lm_head.weight is no dense tensor"):
        load(tmp_path)


def test_a_release_of_mambabyte_opens_whatever_its_config_says(tmp_path):
    """Trap: rms_norm true, but LayerNorms in the file. Saved from several processes: module. before each name."""
    model = make(MODELS["MambaByte"])
    save(tmp_path, model, "state-spaces")
    saved = torch.load(tmp_path / "pytorch_model.bin")
    assert {name.split(".")[0] for name in saved} == {"backbone", "lm_head"}
    torch.save({f"module.{name}": t for name, t in saved.items()}, tmp_path / "pytorch_model.bin")
    for settings in ({"rms_norm": True, "d_model": 20, "n_layer": 2, "vocab_size": 18, "ssm_cfg": {}}, None):
        (tmp_path / "config.json").write_text(json.dumps(settings)) if settings else (tmp_path / "config.json").unlink()
        loaded, _ = load(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
    loaded(tokens(9))[0].square().sum().backward()  # and it trains
    assert all(p.grad is not None and p.is_leaf for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_opens_as_float32(dtype, tmp_path):
    """The scan, A_log, D and the residual stream stay wide; the weights are the file's."""
    model = make(MODELS["mamba2"])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    want = logits(model)
    for layout in ("hf", "state-spaces"):
        save(tmp_path / layout, model.to(dtype), layout)
        again, _ = load(tmp_path / layout)
        assert {p.dtype for p in again.parameters()} == {torch.float32} and torch.equal(logits(again), want)


def test_an_equal_head_is_a_tied_head(tmp_path):
    """state-spaces' files hold both names; one parameter comes of them, as when they were trained."""
    model = make(MODELS["mamba"])
    weights = {f"backbone.{name}": t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    torch.save(weights | {"lm_head.weight": model.lm_head.weight.detach().clone()}, tmp_path / "x.pt")
    again, _ = load(tmp_path / "x.pt")
    assert again.lm_head.weight is again.embedding.weight and again.config.tie
    torch.save(weights | {"lm_head.weight": model.lm_head.weight.detach() + 1}, tmp_path / "x.pt")
    assert not load(tmp_path / "x.pt")[0].config.tie


def fill(seed, *shape):
    """Entry number i = 1, 2, ..., row by row, is sin(seed + 0.7 i) / 2."""
    return (0.5 * torch.sin(seed + 0.7 * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64))).view(shape)


def test_the_golden_bigs_layer_passes_through_the_loader(tmp_path):
    """The reference layer's numbers from a file with the published names; m = 6 is padded to twice d = 4 by zeros."""
    layer = {"LayerNorm.weight": 1 + 0.2 * fill(20, 4), "LayerNorm.bias": 0.2 * fill(21, 4)}
    for seed, (name, *shape) in enumerate((("dv", 6, 4), ("du_forward", 4, 4), ("du_backward", 4, 4),
                                           ("duc_forward", 4, 4), ("duc_backward", 4, 4), ("dol", 6, 4),
                                           ("do", 4, 6)), 1):
        weight, bias = fill(seed, *shape), fill(seed + 0.5, shape[0])
        layer[f"{name}.weight"] = F.pad(weight, (0, 2 * (shape[1] == 6), 0, 2 * (shape[0] == 6)))
        layer[f"{name}.bias"] = F.pad(bias, (0, 2 * (shape[0] == 6)))
    for ssm, D, dt, seed in (("fs4", 1.0, 0.1, 30), ("bs4", 0.5, 0.2, 40)):
        layer |= {f"{ssm}.D": torch.tensor([D]),
                  f"{ssm}.kernel.log_step": torch.tensor([dt], dtype=torch.float64).log(),
                  f"{ssm}.kernel.C": fill(seed, 2, 2), f"{ssm}.kernel.A_re": torch.full((2,), -0.5),
                  f"{ssm}.kernel.A_im": torch.tensor([0, math.pi], dtype=torch.float64)}
    e, head = "bigs.embeddings.", "cls.predictions."
    torch.save({**{f"bigs.encoder.layer.0.{name}": t for name, t in layer.items()},
                e + "word_embeddings.weight": fill(8, 11, 4), e + "position_embeddings.weight": fill(9, 5, 4),
                e + "token_type_embeddings.weight": fill(10, 2, 4), e + "position_ids": torch.arange(5)[None],
                e + "LayerNorm.weight": fill(11, 4), e + "LayerNorm.bias": fill(12, 4),
                "bigs.pooler.dense.weight": fill(13, 4, 4), "bigs.pooler.dense.bias": fill(14, 4),
                head + "transform.dense.weight": fill(15, 4, 4), head + "transform.dense.bias": fill(16, 4),
                head + "transform.LayerNorm.weight": fill(17, 4), head + "transform.LayerNorm.bias": fill(18, 4),
                head + "decoder.weight": fill(8, 11, 4), head + "decoder.bias": fill(19, 11),
                head + "bias": fill(19, 11)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"layer_norm_eps": 1e-12, "hidden_size": 4, "num_ssm": 2, "hidden_act": "gelu", "intermediate_size": 8,'
        ' "vocab_size": 11, "max_position_embeddings": 5, "num_hidden_layers": 1, "type_vocab_size": 2}')
    model, extra = load(tmp_path)
    assert (extra == {"layout": "bigs"} and model.lm_head.weight is model.embedding.weight
            and model.config.gelu == "tanh")
    with torch.no_grad():
        y = model.layers[0](2 * fill(50, 1, 5, 4))
        assert model(torch.tensor([[3, 1, 4, 1, 5]]))[0].shape == (1, 5, 11)
    for at, want in ((0, [0.9045281022, 1.1467310627, 0.8749861005, 0.1999478149]),
                     (4, [-0.2555063675, 0.0318710903, 0.2762901930, 0.6111110455])):
        torch.testing.assert_close(y[0, at], torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert abs(y.sum().item() - 3.199377598093915) < 1e-12


# What is damaged, and what is not what it says


def test_a_damaged_safetensors_file_says_where(tmp_path):
    """Lengths, shapes, types and offsets are checked against the file's size before memory is asked for."""
    save(tmp_path, make(MODELS["llama"]), "llama")
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")  # of the header
    cut = [whole[:size] for size in (0, 3, 8, 9, 200, len(whole) // 2, len(whole) - 1)]
    for data in cut + [struct.pack("<Q", length) + whole[8:] for length in (0, 1, 2**31, 2**63, 2**64 - 1)]:
        path.write_bytes(data)
        failure(tmp_path)
    for old, new, message in (
            ('"F32"', '"F4"', "'F4'"), ('"F32"', '"F16"', "expected bytes"), ("[12]", "[-12]", "expected bytes"),
            ("[12]", "[1099511627776]", "expected bytes"), ("[12]", "[12.0]", "TypeError"),
            ("[12]", "12", "not iterable"),
            ("[17, 12]", "[12, 17]", "shape"), ('"shape"', '"shapes"', "shape"),
            ("{", "[" * 100_000, "RecursionError"), ("{", "[{", "JSON"),
            ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "expected bytes"),
            ("model.norm.weight", "model.norm.scale", "model.norm.weight has shape none, expected [12]"),
            ("model.norm.weight", "model.rotary", "holds model.rotary, expected"),
            (".layers.1.", ".layers.2.", "model.layers.1.input_layernorm.weight has shape none")):
        header = whole[8:end].decode().replace(old, new).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[end:])
        assert message in failure(tmp_path)
    path.write_bytes(whole + b"x")
    assert "1 bytes after the last tensor" in failure(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in failure(tmp_path)


def test_settings_that_contradict_the_tensors_or_are_not_computed_here_say_so(tmp_path):
    for kind, layout, changes in (
            ("llama", "llama", {"num_attention_heads": 5, "num_key_value_heads": 2, "hidden_act": "gelu",
                                "vocab_size": 18, "hidden_size": 24, "rms_norm_eps": "small",
                                "rope_scaling": {"rope_type": "yarn"}, "model_type": "mistral", "rope_theta": [1],
                                "head_dim": 12, "intermediate_size": 8}),
            ("mamba2", "hf", {"n_groups": 2, "num_heads": 7, "state_size": 6, "model_type": "falcon_mamba", "expand": 0,
                              "time_step_limit": [0.1, 1.0], "use_bias": True, "num_hidden_layers": 4})):
        save(tmp_path, make(MODELS[kind]), layout)
        settings = json.loads((tmp_path / "config.json").read_text())
        assert changes.keys() - {"time_step_limit"} <= settings.keys()
        for key, value in changes.items():
            (tmp_path / "config.json").write_text(json.dumps(settings | {key: value}))
            failure(tmp_path / "model.safetensors")
        for text in ("", "[]", "{", '{"model_type": }', "\xff"):
            (tmp_path / "config.json").write_text(text, encoding="latin-1")
            assert "config.json" in failure(tmp_path)


@pytest.mark.parametrize("kind, layout, key, bad, good", [
    ("mamba2", "state-spaces", "ssm_cfg.dt_limit", [0, 0.01], [0.0, math.inf]),
    ("mamba2", "state-spaces", "ssm_cfg.activation", "relu", "silu"),
    ("mamba2", "state-spaces", "ssm_cfg.norm_before_gate", True, False),
    ("mamba2", "state-spaces", "ssm_cfg.ngroups", True, 3),
    ("mamba2", "state-spaces", "pad_vocab_size_multiple", 0, 128),
    ("mamba", "state-spaces", "pad_vocab_size_multiple", 1.5, 256),
    ("mamba", "hf", "hidden_act", "relu", "swish"), ("mamba", "hf", "layer_norm_epsilon", 10**11, 1e-5),
    ("mamba2", "hf", "time_step_limit", [0, 0.01], [0, {"__float__": "Infinity"}]),
    ("llama", "llama", "attention_bias", True, False), ("llama", "llama", "mlp_bias", True, None),
    ("llama", "llama", "rms_norm_eps", 10**11, 1e-3), ("llama", "llama", "rope_theta", 0, 77),
    ("llama", "llama", "rms_norm_eps", 1e308, 1e-3),
    ("BiGS", "bigs", "hidden_act", "gelu_new", "gelu"), ("BiGS", "bigs", "pre_norm", False, True)])
def test_settings_that_change_numbers_at_equal_shapes_are_read_or_refused(kind, layout, key, bad, good, tmp_path):
    save(tmp_path, make(MODELS[kind]), layout)
    settings = json.loads((tmp_path / "config.json").read_text())
    outer, _, inner = key.rpartition(".")
    for value in (bad, good):
        (settings[outer] if outer else settings)[inner] = value
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if value == bad:
            failure(tmp_path / ("pytorch_model.bin" if layout in ("state-spaces", "bigs") else "model.safetensors"))
    assert load(tmp_path)[0].config == MODELS[kind]


@pytest.mark.parametrize("kind, layout, key, default", [
    ("llama", "llama", "rms_norm_eps", 1e-6), ("BiGS", "bigs", "layer_norm_eps", 1e-12),
    ("mamba", "hf", "layer_norm_epsilon", 1e-5), ("mamba2", "hf", "layer_norm_epsilon", 1e-5)])
def test_a_missing_epsilon_is_its_layouts_own(kind, layout, key, default, tmp_path):
    """LlamaConfig, BiGSConfig, MambaConfig and Mamba2Config of the programs that wrote them."""
    save(tmp_path, make(replace(MODELS[kind], norm_eps=0.1)), layout)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop(key) == 0.1
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path)[0].config.norm_eps == default


def test_what_is_saved_says_what_other_programs_need(tmp_path):
    """LayerNorms to state-spaces' loader; to transformers the hidden size that 0 becomes here."""
    for kind, rms in (("MambaByte", False), ("mamba2, untied", False), ("mamba", True)):
        save(tmp_path / kind, make(MODELS[kind]), "state-spaces")
        assert json.loads((tmp_path / kind / "config.json").read_text())["rms_norm"] is rms
    model = make(Config(("attention+mlp",) * 2, d_model=64))
    save(tmp_path / "llama", model, "llama")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["intermediate_size"] == 192
    assert torch.equal(logits(load(tmp_path / "llama")[0]), logits(model))
    with pytest.raises(UserError, match="'gelu': 'tanh'.*this model has s4d with .*'gelu': 'none'"):
        save(tmp_path / "x", make(replace(MODELS["BiGS"], gelu="none")), "bigs")


def test_heads_of_another_width_are_refused_for_what_they_are(tmp_path):
    save(tmp_path, make(MODELS["llama"]), "llama")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"head_dim": 8}))
    assert "config.json has head_size 8, where 6 follows from the rest" in failure(tmp_path / "model.safetensors")


@pytest.mark.parametrize("file", ["pytorch_model.bin.index.json", "", "a\0.bin", "a.txt"])
def test_an_index_names_files_of_tensors_and_not_itself(file, tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"backbone.norm_f.weight": file}}))
    assert "Recursion" not in failure(index)


def test_shapes_and_names_that_no_tensor_has_are_one_line(tmp_path):
    for name, shape in (("a", [2**63, 0]), ("backbone.a\nb", [0])):
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        failure(tmp_path / "x.safetensors")


@needs_pipes
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "model.safetensors.index.json"])
def test_no_pipe_is_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    assert "is no file" in failure(tmp_path / name)


def test_shards_that_are_missing_or_repeat_each_other_are_named(tmp_path):
    save(tmp_path, make(MODELS["mamba"]), "state-spaces")
    weights = torch.load(tmp_path / "pytorch_model.bin")
    names, index = sorted(weights), tmp_path / "pytorch_model.bin.index.json"
    (tmp_path / "pytorch_model.bin").unlink()
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    where = {name: file for file, part in parts.items() for name in part}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(load(tmp_path)[0]), logits(make(MODELS["mamba"])))
    for bad in (where | {"x": "a.bin"}, where | {names[0]: "../a.bin"}, 1, None, {name: 7 for name in names}):
        index.write_text(json.dumps({"weight_map": bad}))
        failure(index)
    index.write_text(json.dumps({"weight_map": where}))
    torch.save({name: weights[name] for name in names}, tmp_path / "b.bin")
    assert "and b.bin differ in backbone." in failure(tmp_path)
    (tmp_path / "b.bin").unlink()
    assert "b.bin cannot be read: No such file" in failure(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_of_a_checkpoint_runs(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"backbone.embedding.weight": Code(tmp_path / "was run")}, tmp_path / "pytorch_model.bin")
        failure(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_values_that_are_not_plain_tensors_are_refused(tmp_path):
    """A view of one number as a million would fill the memory when it is copied."""
    good = {f"backbone.{name}": t for name, t in make(MODELS["mamba"]).state_dict().items() if name != "lm_head.weight"}
    for name, bad in (("norm_f.weight", [1]), ("norm_f.weight", torch.ones(1).expand(10**12)), ("norm_f.weight", None),
                      ("norm_f.weight", torch.ones(12).to_sparse()), ("norm_f.weight", torch.ones(12).long()),
                      ("norm_f.weight", torch.ones(12, device="meta")),
                      ("embedding.weight", torch.zeros(17, 0)), ("embedding.weight", torch.ones(())),
                      ("layers.999999.norm.weight", torch.ones(12)), ("layers.9.norm.weight", torch.ones(12)),
                      ("layers.0.mixer.A_log", torch.ones(24)), ("layers.0.mixer.D", torch.ones(23)),
                      ("layers.0.mixer.dt_bias", torch.ones(2))):
        torch.save(good | {f"backbone.{name}": bad}, tmp_path / "x.pt")
        failure(tmp_path / "x.pt")
    for other in ({7: torch.ones(1)}, {("a",): 1}, {}, {"a": {"b": torch.ones(1)}}):
        torch.save(other, tmp_path / "x.pt")
        failure(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin", "old.bin", "own.pt"])
def test_mutations_end_in_one_line_or_in_a_model(file, tmp_path):
    """80 of each file: bytes changed, cut out, repeated, or a number of the header or pickle exchanged."""
    model = make(MODELS["mamba2"])
    layout = {"pytorch_model.bin": "state-spaces", "old.bin": "state-spaces", "own.pt": "own"}.get(file, "hf")
    save(tmp_path / "own.pt" if layout == "own" else tmp_path, model, layout)
    if file == "old.bin":  # the format of torch before 1.6, a bare pickle
        torch.save(torch.load(tmp_path / "pytorch_model.bin"), tmp_path / file, _use_new_zipfile_serialization=False)
        (tmp_path / "pytorch_model.bin").unlink()
    whole, random = (tmp_path / file).read_bytes(), np.random.default_rng(0)
    head = min(len(whole), 2000)  # where names, types and shapes are
    for i in range(80):
        data, at = bytearray(whole), int(random.integers(head if i % 4 else len(whole)))
        if i % 3 == 0:
            data[at:at + 4] = random.integers(0, 256, 4, dtype=np.uint8).tobytes()
        elif i % 3 == 1:
            del data[at:at + int(random.integers(1, 40))]
        else:
            data[at:at] = data[at:at + int(random.integers(1, 40))]
        (tmp_path / file).write_bytes(bytes(data))
        path = tmp_path / "own.pt" if layout == "own" else tmp_path
        try:
            load(path)
        except UserError as e:
            assert "\n" not in str(e)
