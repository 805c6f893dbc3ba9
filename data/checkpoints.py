"""Published weights: the names, tensors and settings of a checkpoint -> ours, and back. Knows no model.

A layout is a table: how each beginning of a name reads here, and how each setting in config.json is called. read and
write go through the same tables in opposite directions. Sizes come from config.json; whether the tensors have them is
for the model to find.
"""
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from data.files import require, whole_file
from data.tensors import FORMAT, read_file, some, write_safetensors

UNUSED = "unused."  # the beginning of our name for a tensor that no model of ours has

# ---------------------------------------------------------------------------------------------------------------------
# 1. Layouts


class Layout(NamedTuple):
    file: str       # of the tensors, in a folder with config.json; "" is a file without one
    names: tuple    # (theirs, ours): how names begin; {i} is the number of a layer
    settings: dict  # {kind of the layers: {key in config.json: our setting, or all known values}}
    needs: dict     # settings of ours that the layout takes for granted


# state-spaces/mamba-*, mamba2-*, JunxiongWang/MambaByte_*; then the .pt files of the MambaByte repository
STATE_SPACES_NAMES = (
    ("backbone.embedding.", "embedding."), ("backbone.layers.{i}.", "layers.{i}."),
    ("backbone.norm_f.", "norm_f."), ("lm_head.", "lm_head."))
MAMBABYTE_NAMES = (
    ("mambabyte.token_embedding.", "embedding."), ("mambabyte.layers.{i}.", "layers.{i}."),
    ("mambabyte.final_norm.", "norm_f."), ("lm_head.", "lm_head."))
NO_LIMIT = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])  # of dt; None: not written
STATE_SPACES = {
    "d_model": "d_model", "n_layer": "n_layer", "vocab_size": "vocab", "tie_embeddings": "tie",
    "pad_vocab_size_multiple": tuple(range(1, 4097)), "rms_norm": "rms",
    "ssm_cfg.d_state": "d_state", "ssm_cfg.d_conv": "d_conv", "ssm_cfg.expand": "expand",
    "ssm_cfg.bias": "bias", "ssm_cfg.conv_bias": "conv_bias"}
STATE_SPACES_2 = STATE_SPACES | {
    "ssm_cfg.layer": ("Mamba2",), "ssm_cfg.norm_before_gate": (False,),
    "ssm_cfg.activation": (None, "swish", "silu"), "ssm_cfg.dt_limit": NO_LIMIT,
    "ssm_cfg.headdim": "head_dim", "ssm_cfg.ngroups": "n_group"}

# transformers: MambaForCausalLM, Mamba2ForCausalLM
HF_NAMES = (("backbone.embeddings.", "embedding."), *STATE_SPACES_NAMES[1:])
HF = {
    "hidden_act": ("silu", "swish"), "vocab_size": "vocab", "hidden_size": "d_model",
    "num_hidden_layers": "n_layer", "tie_word_embeddings": "tie"}
HF_MAMBA = HF | {
    "model_type": ("mamba",), "state_size": "d_state", "conv_kernel": "d_conv", "expand": "expand",
    "use_bias": "bias", "use_conv_bias": "conv_bias", "layer_norm_epsilon": "norm_eps"}
HF_MAMBA_2 = HF_MAMBA | {
    "model_type": ("mamba2",), "num_heads": "heads", "head_dim": "head_dim", "n_groups": "n_group",
    "time_step_limit": NO_LIMIT}

# transformers: LlamaForCausalLM, its rotary settings under an older and a newer key; the first is written
LLAMA_NAMES = (
    ("model.embed_tokens.", "embedding."), ("model.norm.", "norm_f."), ("lm_head.", "lm_head."),
    ("model.layers.{i}.self_attn.rotary_emb.inv_freq", UNUSED),
    ("model.layers.{i}.self_attn.o_proj.", "layers.{i}.mixer.out_proj."),
    ("model.layers.{i}.self_attn.", "layers.{i}.mixer."),
    ("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    ("model.layers.{i}.input_layernorm.", "layers.{i}.norm."),
    ("model.layers.{i}.post_attention_layernorm.", "layers.{i}.mlp_norm."))
LLAMA = HF | {
    "model_type": ("llama",), "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
    "head_dim": "head_size", "intermediate_size": "d_mlp", "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base", "rope_parameters.rope_theta": "rope_base",
    "rope_scaling": "rope_scaling", "rope_parameters": "rope_scaling",
    "attention_bias": (None, False), "mlp_bias": (None, False)}
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# JunxiongWang/BiGS_*, the PyTorch files
BIGS_NAMES = (
    ("bigs.embeddings.word_embeddings.", "embedding."),
    ("bigs.embeddings.position_embeddings.", "position_table."),
    ("bigs.embeddings.token_type_embeddings.", "type_table."),
    ("bigs.embeddings.LayerNorm.", "norm."),
    ("bigs.encoder.layer.{i}.LayerNorm.", "layers.{i}.norm."),
    ("bigs.encoder.layer.{i}.du", "layers.{i}.mixer.du"),
    ("bigs.encoder.layer.{i}.d", "layers.{i}.d"),
    *((f"bigs.encoder.layer.{{i}}.{ssm}.{theirs}", f"layers.{{i}}.mixer.{ssm}.{ours}")
      for ssm in ("fs4", "bs4") for theirs, ours in (
          ("kernel.A_re", "A_real"), ("kernel.A_im", "A_imag"), ("kernel.log_step", "log_dt"),
          ("kernel.C", "C"), ("D", "D"))),
    ("cls.predictions.transform.dense.", "head."),
    ("cls.predictions.transform.LayerNorm.", "head_norm."),
    ("cls.predictions.bias", "lm_head.bias"),
    ("cls.predictions.decoder.weight", "lm_head.weight"),
    ("cls.predictions.decoder.bias", UNUSED), ("bigs.embeddings.position_ids", UNUSED),
    ("bigs.pooler.", UNUSED))
BIGS = {
    "model_type": ("BiGS",), "hidden_act": ("gelu",), "pre_norm": (True,), "type_vocab_size": (2,),
    "vocab_size": "vocab", "hidden_size": "d_model", "intermediate_size": "d_inner",
    "num_hidden_layers": "n_layer", "num_ssm": "d_state",
    "max_position_embeddings": "n_position", "layer_norm_eps": "norm_eps"}

LAYOUTS = {
    "state-spaces": Layout("pytorch_model.bin", STATE_SPACES_NAMES,
                           {"mamba": STATE_SPACES, "mamba2": STATE_SPACES_2}, {"norm_eps": 1e-5}),
    "mambabyte": Layout("", MAMBABYTE_NAMES, {"mamba": {}}, {"norm_eps": 1e-5}),
    "hf": Layout("model.safetensors", HF_NAMES,
                 {"mamba": HF_MAMBA, "mamba2": HF_MAMBA_2}, {"norm": "rms"}),
    "llama": Layout("model.safetensors", LLAMA_NAMES,
                    {"attention+mlp": LLAMA}, {"norm": "rms", "window": 0}),
    "bigs": Layout("pytorch_model.bin", BIGS_NAMES,
                   {"s4d": BIGS}, {"norm": "layer", "block": "gated", "gelu": "tanh"}),
}
MISSING = {"mamba2": {"d_state": 128}, "attention+mlp": {"norm_eps": 1e-6},
           "s4d": {"norm_eps": 1e-12}}  # what config.json leaves out, if it is not Config's default

# ---------------------------------------------------------------------------------------------------------------------
# 2. Names


def rename(name, rows):
    """name with the beginning that a row knows exchanged, None where no row knows it."""
    for old, new in rows:
        found = re.match(re.escape(old).replace(r"\{i\}", r"(\d{1,4})"), name)
        if found:
            return found.expand(new.replace("{i}", r"\1")) + name[found.end():]
    return None


def recognise(names):
    """(layout, {their name: our name}): the layout that knows the most names; it must know all."""
    found = {layout: {name: rename(str(name).removeprefix("module."), table.names)
                      for name in names} for layout, table in LAYOUTS.items()}
    best = min(found, key=lambda layout: list(found[layout].values()).count(None))
    strangers = [name for name, ours in found[best].items() if ours is None]
    require(not strangers, f"it holds {some(strangers)}, expected {FORMAT} "
                           f"or one of the layouts {', '.join(LAYOUTS)}")
    return best, found[best]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Settings


def read_rope(value):
    """Llama 3.1's four numbers, () for no scaling of the rotary positions, a name alone for any other."""
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "llama3":
        return tuple(value.get(key) for key in ROPE)
    return () if kind == "default" else (kind,)


def read_settings(config, rows):
    """{our setting: its value in config.json}; UserError where that asks for what is not computed here."""
    told = {}
    for key, ours in rows.items():
        outer, _, inner = key.rpartition(".")
        place = (config.get(outer) or {}) if outer else config
        value = place.get(inner)
        if value in (None, {}):
            continue
        if isinstance(ours, tuple):
            require(value in ours,
                    f"config.json has {key} {json.dumps(value)[:80]}, not computed here")
        else:
            told[ours] = read_rope(value) if ours == "rope_scaling" else value
    return told


def write_settings(c, rows):
    """config.json's content: read_settings' rows, from right to left."""
    config = {}
    done = set()
    for key, ours in rows.items():
        value = ours[0] if isinstance(ours, tuple) else c[ours]
        if value in (None, ()) or ours in done:
            continue
        done.add(ours)
        if ours == "rope_scaling":
            value = {"rope_type": "llama3", **dict(zip(ROPE, value))}
        outer, _, inner = key.rpartition(".")
        place = config.setdefault(outer, {}) if outer else config
        place[inner] = value
    return config


def derived(c):
    """Sizes that follow from our settings, and that other programs' settings name too."""
    d_inner = c.get("expand", 2) * c["d_model"]
    return {"n_layer": len(c["layers"]), "head_size": c["d_model"] // (c.get("n_head") or 1),
            "d_inner": d_inner, "heads": d_inner // (c.get("head_dim") or 1),
            "rms": c["norm"] == "rms"}


def mamba_sizes(tensors):
    """What the shapes of a Mamba layer tell, which is all where there is no config.json."""
    d, n = tensors["layers.0.mixer.A_log"].shape
    return {"expand": d // tensors["embedding.weight"].shape[1], "d_state": n,
            "d_conv": tensors["layers.0.mixer.conv1d.weight"].shape[-1],
            "bias": "layers.0.mixer.in_proj.bias" in tensors,
            "conv_bias": "layers.0.mixer.conv1d.bias" in tensors}


def complete(layout, tensors, config):
    """All settings of ours, from config.json, or for a Mamba without one from the shapes."""
    table = LAYOUTS[layout]
    kind = "mamba2" if "layers.0.mixer.dt_bias" in tensors else next(iter(table.settings))
    require(config is not None or kind == "mamba", "config.json is missing beside it")
    told = mamba_sizes(tensors) if config is None else read_settings(config, table.settings[kind])
    told.pop("rms", None)  # the tensors tell; MambaByte's have LayerNorms whatever it says
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    rows, d_model = tensors["embedding.weight"].shape
    c = {"layers": (kind,) * len(layers), "d_model": d_model,
         "norm": "layer" if "layers.0.norm.bias" in tensors else "rms"}
    if kind == "attention+mlp":
        c["n_kv_head"] = told["n_head"]  # of Llama 1, unless config.json tells
    if kind == "s4d":
        c["expand"] = told["d_inner"] // d_model
    c |= table.needs | MISSING.get(kind, {}) | told
    c["vocab"] = max(rows, told.get("vocab", 0))  # state-spaces: 50277 symbols in 50280 rows
    for ours, value in derived(c).items():
        require(c.pop(ours, value) == value,
                f"config.json has {ours} {told.get(ours)}, where {value} follows from the rest")
    return c


# ---------------------------------------------------------------------------------------------------------------------
# 4. Checkpoints: read, and write


def read(path, content):
    """What model.load takes, of what read_file found in path; any error for what does not fit together."""
    require(isinstance(content, dict) and content,
            f"it holds {type(content).__name__}, expected {FORMAT} or named tensors")
    layout, names = recognise(content)
    config = path.with_name("config.json")
    config = read_file(config) if config.is_file() else None
    tensors = {ours: content.pop(name) for name, ours in names.items()
               if not ours.startswith(UNUSED)}
    c = complete(layout, tensors, config)
    if "type_table.weight" in tensors:  # of BiGS; here all of a text is of segment type 0
        types = tensors.pop("type_table.weight")
        tensors["position_table.weight"] = tensors["position_table.weight"] + types[0]
    embedding = tensors["embedding.weight"]
    c["tie"] = torch.equal(tensors.get("lm_head.weight", embedding), embedding)
    if c["tie"]:
        tensors["lm_head.weight"] = embedding
    return {"layout": layout, "config": c, "model": tensors}


def write(path, layout, c, tensors):
    """The model of settings c in another program's layout: a folder with config.json, or one file where it has none."""
    require(layout in LAYOUTS, f"layout {layout} is not one of own, {', '.join(LAYOUTS)}")
    table = LAYOUTS[layout]
    kind = ", ".join(sorted(set(c["layers"])))
    needs = {name: c[name] for name in table.needs}
    require(kind in table.settings and needs == table.needs,
            f"layout {layout} holds layers of {' or '.join(table.settings)} with {table.needs}; "
            f"this model has {kind} with {needs}")
    if c["n_position"]:  # of BiGS, which has two types of segments
        tensors = {**tensors, "type_table.weight": torch.zeros(2, c["d_model"])}
    rows = [(ours, theirs) for theirs, ours in table.names]
    tensors = {rename(name, rows): t for name, t in tensors.items()}
    save = write_safetensors if table.file.endswith(".safetensors") else torch.save
    if save is write_safetensors and c["tie"]:  # no two names for the same memory there
        del tensors["lm_head.weight"]
    with whole_file(Path(path, table.file)) as file:
        save(tensors, file)
    if table.file:
        config = write_settings(c | derived(c), table.settings[kind])
        with whole_file(Path(path, "config.json")) as file:
            file.write(json.dumps(config, indent=1).encode() + b"\n")
