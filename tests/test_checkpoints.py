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

F64 = torch.float64


def tokens(l, b=2, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def random_peer(name, **config):
    """A model of transformers with random weights, its norms and biases too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
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


def edit(folder, **changes):
    """config.json with other settings; None takes one out, a__b is b of the settings in a."""
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    for key, value in changes.items():
        outer, _, inner = key.rpartition("__")
        (settings[outer] if outer else settings)[inner] = value
    settings = {key: value for key, value in settings.items() if value is not None}
    config.write_text(json.dumps(settings))


def write_by_hand(path, header, data=b""):
    """safetensors: a length, a header, bytes."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors_are_a_length_a_header_and_bytes(tmp_path):
    header = {"b": {"dtype": "I64", "shape": [], "data_offsets": [6, 14]},
              "__metadata__": {"format": "pt"},
              "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
              "c": {"dtype": "F32", "shape": [0, 2], "data_offsets": [14, 14]}}
    a = torch.tensor([[1.5], [-2], [3]], dtype=torch.bfloat16)
    data = a.view(torch.uint8).numpy().tobytes() + struct.pack("<q", -7)
    write_by_hand(tmp_path / "x.safetensors", json.dumps(header).encode(), data)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], a) and found["c"].shape == (0, 2) and len(found) == 3
    assert found["b"] == -7 and found["b"].shape == ()


# Peers: other programs with the same weights

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("kv_heads, tie", [(1, False), (2, True), (4, False)])
def test_llama_opens_with_the_same_logits(kv_heads, tie, scaling, tmp_path):
    """Grouped queries, rotary scaling of Llama 3.1 (also under its older name), tied head, one file or many."""
    peer = random_peer("Llama", vocab_size=17, hidden_size=24, intermediate_size=29,
                       num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
                       rope_theta=500.0, tie_word_embeddings=tie, rope_scaling=scaling)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    for folder in ("one", "many"):
        ours, extra = load(tmp_path / folder)
        agree(ours, peer, 70)
        assert extra == {"layout": "llama"} and ours.config.tie == tie and ours.config.n_kv_head == kv_heads
    edit(tmp_path / "one", rope_parameters=None, rope_theta=500.0, rope_scaling=scaling or {})
    assert load(tmp_path / "one")[0].config == ours.config


@pytest.mark.parametrize("name, config", [
    ("Mamba", {}),
    ("Mamba", dict(tie_word_embeddings=False, state_size=5, conv_kernel=3, use_bias=True,
                   use_conv_bias=False, expand=3, layer_norm_epsilon=0.1)),
    ("Mamba2", dict(num_heads=8, head_dim=5, n_groups=1)),
    ("Mamba2", dict(num_heads=8, head_dim=5, n_groups=2, state_size=7, layer_norm_epsilon=0.1)),
    ("Mamba2", dict(num_heads=4, head_dim=10, n_groups=4, use_bias=True, use_conv_bias=False,
                    tie_word_embeddings=True))])
def test_mamba_and_mamba2_open_with_the_same_logits_in_both_directions(name, config, tmp_path):
    """transformers' folder opens here; what is saved here opens there; safetensors, torch and sharded files."""
    peer = random_peer(name, vocab_size=17, hidden_size=20, num_hidden_layers=3, **config)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="3KB" if config else "1GB")
    ours, extra = load(tmp_path / "theirs")
    assert extra == {"layout": "hf"}
    agree(ours, peer)
    save(tmp_path / "back", ours, layout="hf")
    back, told = type(peer).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    agree(ours, back.eval())
    assert load(tmp_path / "back")[0].config == ours.config
    torch.save(peer.state_dict(), tmp_path / "back" / "pytorch_model.bin")
    (tmp_path / "back" / "model.safetensors").unlink()
    agree(load(tmp_path / "back")[0], peer)


# Layouts: every model in every layout that can hold it

MODELS = {
    "mamba": Config(("mamba",) * 3, d_model=12, vocab=17, d_state=5, d_conv=3, bias=True,
                    conv_bias=False, expand=3),
    "MambaByte": Config(("mamba",) * 2, d_model=20, vocab=19, norm="layer", tie=False),
    "mamba2": Config(("mamba2",) * 3, d_model=12, vocab=17, d_state=5, head_dim=4, n_group=3),
    "llama": Config(("attention+mlp",) * 2, d_model=12, vocab=17, n_head=2, n_kv_head=1, d_mlp=7, norm_eps=1e-3,
                    rope_base=77.0, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "BiGS": Config(("s4d",) * 2, block="gated", d_model=8, vocab=19, d_state=6, expand=3,
                   norm="layer", norm_eps=1e-3, n_position=24),
}
HOLDS = {"state-spaces": ("mamba", "MambaByte", "mamba2"), "mambabyte": ("mamba", "MambaByte"),
         "hf": ("mamba", "mamba2"), "llama": ("llama",), "bigs": ("BiGS",)}


def make(config):
    torch.manual_seed(0)
    model = make_model(config).eval()
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
        assert (model.lm_head.weight is model.embedding.weight) == model.config.tie


def test_what_no_shape_tells_comes_from_config_or_is_refused(tmp_path):
    """Llama 1 has as many heads of keys as of queries and does not say so. Mamba-2's d_state is 128
    where none is given."""
    save(tmp_path / "llama", make(replace(MODELS["llama"], n_kv_head=2)), "llama")
    edit(tmp_path / "llama", num_key_value_heads=None)
    assert load(tmp_path / "llama")[0].config.n_kv_head == 2
    edit(tmp_path / "llama", num_attention_heads=None)
    assert "lacks 'n_head'" in failure(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()
    assert "config.json is missing" in failure(tmp_path / "llama")
    model = make(replace(MODELS["mamba2"], d_state=128))
    save(tmp_path / "mamba2", model, "state-spaces")
    config = {"layer": "Mamba2", "headdim": 4, "ngroups": 3}
    edit(tmp_path / "mamba2", ssm_cfg=config, vocab_size=16)
    assert load(tmp_path / "mamba2")[0].config == model.config
    for kind, layout, key, default in (
            ("llama", "llama", "rms_norm_eps", 1e-6), ("BiGS", "bigs", "layer_norm_eps", 1e-12),
            ("mamba", "hf", "layer_norm_epsilon", 1e-5)):  # other programs have these
        save(tmp_path / layout, make(replace(MODELS[kind], norm_eps=0.1)), layout)
        edit(tmp_path / layout, **{key: None})
        assert load(tmp_path / layout)[0].config.norm_eps == default


def test_a_layout_that_cannot_hold_a_model_says_so(tmp_path):
    for layout in HOLDS:
        others = [MODELS[kind] for kind in MODELS.keys() - HOLDS[layout]]
        for config in (*others, replace(MODELS["BiGS"], gelu="none")):
            with pytest.raises(UserError, match=f"{layout} holds layers of .* this model has"):
                save(tmp_path / "x", make_model(config), layout)
    with pytest.raises(UserError, match="not one of own, state-spaces, mambabyte"):
        save(tmp_path / "x", make_model(config), "onnx")
    assert not (tmp_path / "x").exists()


def test_a_release_of_mambabyte_opens_whatever_its_config_says(tmp_path):
    """Trap: rms_norm true, but LayerNorms in the file. Saved from several processes: module. before each name."""
    model = make(MODELS["MambaByte"])
    save(tmp_path, model, "state-spaces")
    saved = torch.load(tmp_path / "pytorch_model.bin")
    assert {name.split(".")[0] for name in saved} == {"backbone", "lm_head"}
    assert json.loads((tmp_path / "config.json").read_text())["rms_norm"] is False
    torch.save({f"module.{name}": t for name, t in saved.items()}, tmp_path / "pytorch_model.bin")
    edit(tmp_path, rms_norm=True, vocab_size=18, ssm_cfg={})
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))
    (tmp_path / "config.json").unlink()
    loaded, _ = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded(tokens(9))[0].square().sum().backward()  # and it trains
    assert all(p.grad is not None and p.is_leaf for p in loaded.parameters())


@pytest.mark.parametrize("layout, dtype", [("hf", torch.bfloat16), ("state-spaces", torch.float16)])
def test_half_precision_opens_as_float32(layout, dtype, tmp_path):
    """The weights are the file's; the scan, A_log, D and the residual stream stay wide."""
    model = make(MODELS["mamba2"]).to(dtype)
    save(tmp_path, model, layout)
    again, _ = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(logits(again), logits(model.float()))


def fill(seed, *shape):
    """Entry number i = 1, 2, ..., row by row, is sin(seed + 0.7 i) / 2."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=F64)
    return (torch.sin(seed + 0.7 * i) / 2).view(shape)


def test_the_golden_bigs_layer_passes_through_the_loader(tmp_path):
    """The reference layer's numbers from a file with the published names; m = 6 is padded to twice
    d = 4 by zeros. All of a text is of type 0, so that type's row is part of every position."""
    saved, layer, head = {}, "bigs.encoder.layer.0.", "cls.predictions."
    for seed, (name, *shape) in enumerate((
            (layer + "dv", 6, 4), (layer + "du_forward", 4, 4), (layer + "du_backward", 4, 4),
            (layer + "duc_forward", 4, 4), (layer + "duc_backward", 4, 4), (layer + "dol", 6, 4),
            (layer + "do", 4, 6), ("bigs.embeddings.LayerNorm", 4), ("bigs.pooler.dense", 4, 4),
            (head + "transform.dense", 4, 4), (head + "transform.LayerNorm", 4)), 1):
        padding = [size for n in shape for size in (n % 4, 0)][::-1]
        saved[name + ".weight"] = F.pad(fill(seed, *shape), padding)
        saved[name + ".bias"] = F.pad(fill(seed + 0.5, shape[0]), padding[-2:])
    for ssm, D, dt, seed in (("fs4.", 1.0, 0.1, 30), ("bs4.", 0.5, 0.2, 40)):
        saved |= {layer + ssm + "D": torch.tensor([D]), layer + ssm + "kernel.C": fill(seed, 2, 2),
                  layer + ssm + "kernel.log_step": torch.tensor([dt], dtype=F64).log(),
                  layer + ssm + "kernel.A_re": torch.full((2,), -0.5),
                  layer + ssm + "kernel.A_im": torch.tensor([0, math.pi], dtype=F64)}
    saved |= {layer + "LayerNorm.weight": 1 + 0.2 * fill(20, 4),
              layer + "LayerNorm.bias": 0.2 * fill(21, 4),
              "bigs.embeddings.word_embeddings.weight": fill(22, 11, 4),
              "bigs.embeddings.position_embeddings.weight": fill(23, 5, 4),
              "bigs.embeddings.token_type_embeddings.weight": fill(24, 2, 4),
              "bigs.embeddings.position_ids": torch.arange(5)[None], head + "bias": fill(25, 11),
              head + "decoder.weight": fill(22, 11, 4), head + "decoder.bias": fill(25, 11)}
    torch.save(saved, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"layer_norm_eps": 1e-12, "hidden_size": 4, "num_ssm": 2, "hidden_act": "gelu", "intermediate_size": 8,'
        ' "vocab_size": 11, "max_position_embeddings": 5, "num_hidden_layers": 1, "type_vocab_size": 2}')
    model, extra = load(tmp_path)
    assert extra == {"layout": "bigs"} and model.config.gelu == "tanh"
    assert model.lm_head.weight is model.embedding.weight
    assert torch.equal(model.position_table.weight, fill(23, 5, 4) + fill(24, 2, 4)[0])
    with torch.no_grad():
        y = model.layers[0](2 * fill(50, 1, 5, 4))
        assert model(torch.tensor([[3, 1, 4, 1, 5]]))[0].shape == (1, 5, 11)
    want = torch.tensor([[0.9045281022, 1.1467310627, 0.8749861005, 0.1999478149],
                         [-0.2555063675, 0.0318710903, 0.2762901930, 0.6111110455]], dtype=F64)
    torch.testing.assert_close(y[0, [0, 4]], want, rtol=1e-9, atol=1e-9)
    assert abs(y.sum().item() - 3.199377598093915) < 1e-12
    save(tmp_path, model, "bigs")
    back = torch.load(tmp_path / "pytorch_model.bin")
    unused = ("decoder.bias", "position_ids", "pooler.dense.weight", "pooler.dense.bias")
    assert back.keys() == {name for name in saved if not name.endswith(unused)}


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
            ('"F32"', '"F4"', "'F4'"), ('"F32"', '"F16"', "expected bytes"),
            ("[12]", "[1099511627776]", "expected bytes"), ("[12]", "[12.0]", "TypeError"),
            ("[17, 12]", "[12, 17]", "shape"), ('"shape"', '"shapes"', "shape"),
            ("{", "[" * 100_000, "RecursionError"), ("{", "[{", "JSON"),
            ("model.norm.weight", "model.norm.scale", 'Missing key(s) in state_dict: "norm_f.weight"'),
            ("model.norm.weight", r"model.rotary\n", r"holds model.rotary\n, expected")):
        write_by_hand(path, whole[8:end].decode().replace(old, new).encode(), whole[end:])
        assert message in failure(tmp_path)
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}
    write_by_hand(path, json.dumps(header).encode())
    failure(tmp_path)  # torch's message has many lines
    path.write_bytes(whole + b"x")
    assert "1 bytes after the last tensor" in failure(tmp_path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in failure(tmp_path)


@pytest.mark.parametrize("kind, layout, bad, good", [
    ("llama", "llama",
     dict(num_attention_heads=5, num_key_value_heads=2, hidden_act="gelu", vocab_size=18,
          hidden_size=24, intermediate_size=8, head_dim=12, model_type="mistral",
          rms_norm_eps="small", rope_scaling={"rope_type": "yarn"}, rope_theta=0,
          attention_bias=True, mlp_bias=True),
     dict(attention_bias=False)),
    ("mamba2", "hf",
     dict(n_groups=2, num_heads=7, state_size=6, model_type="falcon_mamba", expand=0, use_bias=True,
          num_hidden_layers=4, layer_norm_epsilon=10**11, time_step_limit=[0, 0.01]),
     dict(hidden_act="swish", time_step_limit=[0, {"__float__": "Infinity"}])),
    ("mamba2", "state-spaces",
     dict(ssm_cfg__dt_limit=[0, 0.01], ssm_cfg__activation="relu", ssm_cfg__norm_before_gate=True,
          ssm_cfg__ngroups=True, pad_vocab_size_multiple=0),
     dict(ssm_cfg__dt_limit=[0.0, math.inf], ssm_cfg__activation="silu",
          pad_vocab_size_multiple=8)),
    ("BiGS", "bigs", dict(hidden_act="gelu_new", pre_norm=False), {})])
def test_settings_are_read_or_refused(kind, layout, bad, good, tmp_path):
    """Those that contradict the tensors, and those that change numbers at equal shapes."""
    save(tmp_path, make(MODELS[kind]), layout)
    config, weights = tmp_path / "config.json", next(tmp_path.glob("*model.*"))
    whole = config.read_text()
    for key, value in bad.items():
        edit(tmp_path, **{key: value})
        failure(weights)
        config.write_text(whole)
    for text in ("", "[]", "{", "\xff"):
        config.write_text(text, encoding="latin-1")
        assert "config.json" in failure(tmp_path)
    config.write_text(whole)
    edit(tmp_path, **good)
    assert load(tmp_path)[0].config == MODELS[kind]


@needs_pipes
def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    assert "is no file" in failure(tmp_path / "x.pt")


def test_shards_that_are_missing_or_repeat_each_other_are_named(tmp_path):
    """And an index names files of tensors, not itself."""
    save(tmp_path, make(MODELS["mamba"]), "state-spaces")
    weights = torch.load(tmp_path / "pytorch_model.bin")
    names, index = sorted(weights), tmp_path / "pytorch_model.bin.index.json"
    (tmp_path / "pytorch_model.bin").unlink()
    where = dict.fromkeys(names[::2], "a.bin") | dict.fromkeys(names[1::2], "b.bin")
    for file in ("a.bin", "b.bin"):
        torch.save({name: weights[name] for name in names if where[name] == file}, tmp_path / file)
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(logits(load(tmp_path)[0]), logits(make(MODELS["mamba"])))
    for bad in (where | {"x": "a.bin"}, 1, None, dict.fromkeys(names, 7),
                *({names[0]: file} for file in (index.name, "", "a\0.bin", "a.txt", "../a.bin"))):
        index.write_text(json.dumps({"weight_map": bad}))
        assert "Recursion" not in failure(index)
    index.write_text(json.dumps({"weight_map": where}))
    torch.save(weights, tmp_path / "b.bin")
    assert "and b.bin differ in backbone." in failure(tmp_path)
    (tmp_path / "b.bin").unlink()
    assert "names b.bin, which is missing" in failure(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_of_a_checkpoint_runs(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"backbone.embedding.weight": Code(tmp_path / "was run")}, tmp_path / "pytorch_model.bin")
        failure(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_values_that_are_not_plain_tensors_are_refused(tmp_path):
    """A view of one number as a million would fill the memory when it is copied."""
    save(tmp_path / "good.pt", make(MODELS["mamba"]), "mambabyte")
    good = torch.load(tmp_path / "good.pt")
    del good["lm_head.weight"]
    norm, embedding = "mambabyte.final_norm.weight", "mambabyte.token_embedding.weight"
    bad = ((norm, [1]), (norm, torch.ones(1).expand(10**12)), (norm, torch.ones(12).long()),
           (norm, torch.ones(12, device="meta")), ("lm_head.weight", None),
           ("lm_head.weight", torch.ones(17, 12).to_sparse()), (embedding, torch.zeros(17, 0)),
           (embedding, torch.ones(())), ("mambabyte.layers.999999.norm.weight", torch.ones(12)),
           ("mambabyte.layers.0.mixer.A_log", torch.ones(24)))
    for content in (*(good | {name: value} for name, value in bad), {7: torch.ones(1)},
                    {("a",): 1}, {}, {"a": {"b": torch.ones(1)}}):
        torch.save(content, tmp_path / "x.pt")
        failure(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout, file", [
    ("hf", "model.safetensors"), ("hf", "config.json"), ("state-spaces", "pytorch_model.bin"),
    ("state-spaces", "old.bin"), ("own", "own.pt")])
def test_mutations_end_in_one_line_or_in_a_model(layout, file, tmp_path):
    """80 of each file: bytes changed, cut out or repeated."""
    save(tmp_path / ("own.pt" if layout == "own" else ""), make(MODELS["mamba2"]), layout)
    if file == "old.bin":  # the format of torch before 1.6, a bare pickle
        new = tmp_path / "pytorch_model.bin"
        torch.save(torch.load(new), tmp_path / file, _use_new_zipfile_serialization=False)
        new.unlink()
    whole, random = (tmp_path / file).read_bytes(), np.random.default_rng(0)
    head = min(len(whole), 2000)  # where names, types and shapes are
    for i in range(80):
        data, at = bytearray(whole), int(random.integers(head if i % 4 else len(whole)))
        end = at + (int(random.integers(1, 40)) if i % 3 else 4)
        data[at:end] = (random.bytes(4), b"", 2 * data[at:end])[i % 3]
        (tmp_path / file).write_bytes(data)
        try:
            load(tmp_path)
        except UserError as e:
            assert "\n" not in str(e)
