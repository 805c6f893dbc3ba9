"""Published weights: files -> names, tensors and settings in our words. Knows no model.

    safetensors        8 bytes of length, a JSON header {name: dtype, shape, offsets}, the tensors' bytes
    torch (.bin, .pt)  unpickled with weights_only: no code of a file ever runs
    *.index.json       {name: file}, where a checkpoint is cut into several files
    config.json        what the shapes do not tell

A layout is a table: how each beginning of a name reads here, and how each setting is called. read and write go through
the same tables in opposite directions. Sizes come from the tensors; config.json may not contradict them.
"""
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from data.files import UserError, whole_file

FORMAT = "bytestate-1"  # what our own files call themselves


# ---- Files -> {name: tensor} -------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
LARGEST_HEADER = 100_000_000  # bytes; a 7B model's has 40,000


def some(names, most=4):
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def unique(pairs):
    """A JSON object whose keys all differ: json itself would keep the last of equal ones."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_json(text, what):
    """An object of JSON in bytes."""
    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} is not JSON ({' '.join(str(e).split())[:100]})") from e
    if not isinstance(found, dict):
        raise UserError(f"{what} holds {type(found).__name__}, expected an object")
    return found


def read_safetensors(path):
    """{name: tensor}, each read straight into its own memory; nothing is allocated that the file does not fill."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size - 8
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= min(size, LARGEST_HEADER):
            raise UserError(f"{path} announces a header of {length:,} bytes, but {max(size, 0):,} follow")
        header = read_json(f.read(length), f"the header of {path}")
        header.pop("__metadata__", None)
        try:
            spans = sorted((*e["data_offsets"], name, DTYPES[e["dtype"]], e["shape"]) for name, e in header.items())
            whole = all(type(i) is int and i >= 0 for begin, end, _, _, shape in spans for i in (begin, end, *shape))
        except (TypeError, KeyError, ValueError) as e:
            raise UserError(f"{path}: an entry of the header lacks dtype (one of {', '.join(DTYPES)}), shape or "
                                  f"data_offsets ({e})") from e
        position, tensors = 0, {}
        for begin, end, name, dtype, shape in spans:
            fits = whole and end - begin == math.prod(shape) * dtype.itemsize and begin == position
            if not fits or end > size - length:
                raise UserError(f"{path}: {name}, {dtype} {shape}, cannot fill bytes {begin} to {end} of "
                                      f"{size - length:,}, which begin after {position:,}")
            tensors[name], position = torch.empty(shape, dtype=dtype), end
            f.readinto(tensors[name].flatten().view(torch.uint8).numpy())
    if position != size - length:
        raise UserError(f"{path}: {size - length - position:,} bytes after the last tensor")
    return tensors


def read_torch(path):
    """Whatever torch.save wrote, with weights_only: tensors and plain containers."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler meets foreign bytes with any error there is
        raise UserError(f"{path} is not a checkpoint, or is cut short "
                              f"({type(e).__name__}, {os.path.getsize(path):,} bytes)") from e


def named_tensors(path, content):
    """content, if it is {name: tensor}, each a plain one whose memory is as large as its shape says."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected {FORMAT} or named tensors")
    for name, t in content.items():
        plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
        if not (isinstance(name, str) and plain and t.numel() * t.itemsize <= t.untyped_storage().nbytes()):
            raise UserError(f"{path}: {str(name)[:80]} is {type(t).__name__}, expected {FORMAT} or named tensors")
    return content


def read_shards(index, content):
    """{name: tensor} of all the files that an index names."""
    where = content.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
        raise UserError(f"{index} has no weight_map of names to files beside it")
    tensors = {}
    for name in sorted(set(where.values())):
        shard = named_tensors(index.with_name(name), read_file(index.with_name(name)))
        if twice := shard.keys() & tensors.keys():
            raise UserError(f"{index.with_name(name)} repeats an earlier file's {some(twice)}")
        tensors |= shard
    if tensors.keys() != where.keys():
        raise UserError(f"{index} and its files differ in {some(map(str, tensors.keys() ^ where.keys()))}")
    return tensors


def read_file(path):
    """The content of one file, by its ending."""
    try:
        if path.suffix == ".json":
            found = read_json(path.read_bytes(), path)
            return read_shards(path, found) if path.name.endswith(".index.json") else found
        with open(path, "rb") as f:
            if f.read(11) == b"version htt":
                raise UserError(f"{path} is only a pointer to the file; fetch it: git lfs pull")
        return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e


FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")


def find(folder):
    """The file of a published checkpoint in a folder: a well-known name, or the only one with a fitting ending."""
    known = [folder / name for name in FILES if (folder / name).exists()]
    others = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    return known[0] if known else others[0] if len(others) == 1 else None


# ---- Layouts -----------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    file: str       # of the tensors, in a folder with config.json; "" is a single file without one
    names: tuple    # (theirs, ours): how names begin, {i} a layer's number; ours None: we have no use for it
    settings: dict  # {kind of the layers: {key in config.json: our setting, or all values that we compute, as a tuple}}
    needs: dict     # settings of ours that the layout takes for granted


SILU = ("silu", "swish")
LAYERS_AND_HEAD = (("backbone.layers.{i}.", "layers.{i}."), ("backbone.norm_f.", "norm_f."), ("lm_head.", "lm_head."))
STATE_SPACES = {"d_model": "d_model", "n_layer": "n_layer", "vocab_size": "vocab", "tie_embeddings": "tie",
                "pad_vocab_size_multiple": (1, 8, 16, 32, 64), "ssm_cfg.d_state": "d_state", "ssm_cfg.d_conv": "d_conv",
                "ssm_cfg.expand": "expand", "ssm_cfg.bias": "bias", "ssm_cfg.conv_bias": "conv_bias"}
HF = {"hidden_act": SILU, "vocab_size": "vocab", "hidden_size": "d_model", "num_hidden_layers": "n_layer",
      "tie_word_embeddings": "tie"}
HF_MAMBA = {**HF, "state_size": "d_state", "conv_kernel": "d_conv", "expand": "expand", "use_bias": "bias",
            "use_conv_bias": "conv_bias", "layer_norm_epsilon": "norm_eps"}
LAYOUTS = {
    # state-spaces/mamba-*, mamba2-*, JunxiongWang/MambaByte_*; the last have LayerNorms whatever their rms_norm says
    "state-spaces": Layout("pytorch_model.bin", (("backbone.embedding.", "embedding."), *LAYERS_AND_HEAD), {
        "mamba": STATE_SPACES,
        "mamba2": {**STATE_SPACES, "ssm_cfg.layer": ("Mamba2",), "ssm_cfg.norm_before_gate": (False,),
                   "ssm_cfg.headdim": "head_dim", "ssm_cfg.ngroups": "n_group"}},
        {"norm_eps": 1e-5}),
    # the .pt files of the MambaByte repository
    "mambabyte": Layout("", (
        ("mambabyte.token_embedding.", "embedding."), ("mambabyte.layers.{i}.", "layers.{i}."),
        ("mambabyte.final_norm.", "norm_f."), ("lm_head.", "lm_head.")), {"mamba": {}}, {"norm_eps": 1e-5}),
    # transformers: MambaForCausalLM, Mamba2ForCausalLM
    "hf": Layout("model.safetensors", (("backbone.embeddings.", "embedding."), *LAYERS_AND_HEAD), {
        "mamba": {"model_type": ("mamba",), **HF_MAMBA},
        "mamba2": {"model_type": ("mamba2",), **HF_MAMBA, "num_heads": "heads", "head_dim": "head_dim",
                   "n_groups": "n_group",
                   "time_step_limit": (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])}},
        {"norm": "rms"}),
    # transformers: LlamaForCausalLM
    "llama": Layout("model.safetensors", (
        ("model.embed_tokens.", "embedding."), ("model.layers.{i}.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.{i}.self_attn.", "layers.{i}.mixer."), ("model.layers.{i}.mlp.", "layers.{i}.mlp."),
        ("model.layers.{i}.input_layernorm.", "layers.{i}.norm."),
        ("model.layers.{i}.post_attention_layernorm.", "layers.{i}.mlp_norm."), ("model.norm.", "norm_f."),
        ("lm_head.", "lm_head.")), {
        "attention+mlp": {
            "model_type": ("llama",), **HF, "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
            "head_dim": "head_size", "intermediate_size": "d_mlp", "rms_norm_eps": "norm_eps",
            "rope_theta": "rope_base", "rope_scaling": "rope_scaling",  # of one thing, the first name is what we write
            "rope_parameters.rope_theta": "rope_base", "rope_parameters": "rope_scaling"}},
        {"norm": "rms", "window": 0}),
    # JunxiongWang/BiGS_*, the PyTorch files
    "bigs": Layout("pytorch_model.bin", (
        ("bigs.embeddings.word_embeddings.", "embedding."), ("bigs.embeddings.position_embeddings.", "position_table."),
        ("bigs.embeddings.token_type_embeddings.", "type_table."), ("bigs.embeddings.LayerNorm.", "norm."),
        ("bigs.encoder.layer.{i}.LayerNorm.", "layers.{i}.norm."),
        *((f"bigs.encoder.layer.{{i}}.{ssm}.{theirs}", f"layers.{{i}}.mixer.{ssm}.{ours}") for ssm in ("fs4", "bs4")
          for theirs, ours in (("D", "D"), ("kernel.C", "C"), ("kernel.A_re", "A_real"), ("kernel.A_im", "A_imag"),
                               ("kernel.log_step", "log_dt"))),
        *((f"bigs.encoder.layer.{{i}}.{name}", f"layers.{{i}}.mixer.{name}") for name in ("du_", "duc_")),
        *((f"bigs.encoder.layer.{{i}}.{name}", f"layers.{{i}}.{name}") for name in ("dv.", "dol.", "do.")),
        ("cls.predictions.transform.dense.", "head."), ("cls.predictions.transform.LayerNorm.", "head_norm."),
        ("cls.predictions.bias", "lm_head.bias"), ("cls.predictions.decoder.weight", "lm_head.weight"),
        ("cls.predictions.decoder.bias", None), ("bigs.embeddings.position_ids", None), ("bigs.pooler.", None)), {
        "s4d": {
            "model_type": ("BiGS",), "hidden_act": ("gelu",), "pre_norm": (True,), "vocab_size": "vocab",
            "hidden_size": "d_model", "intermediate_size": "m", "num_hidden_layers": "n_layer", "num_ssm": "d_state",
            "max_position_embeddings": "n_position", "type_vocab_size": "n_type", "layer_norm_eps": "norm_eps"}},
        {"norm": "layer", "block": "gated"}),
}


def rename(name, rows):
    """name with the beginning that a row knows exchanged, None where a row drops it; KeyError where none fits."""
    for old, new in rows:
        found = re.fullmatch(re.escape(old).replace(r"\{i\}", r"(\d{1,4})") + "(?P<rest>.*)", name, re.DOTALL)
        if found:
            return None if new is None else new.replace("{i}", found[1]) + found["rest"]
    raise KeyError(name)


def translate(names, rows):
    """{name: its translation} without the dropped ones, and a list of those that no row covers."""
    known, strangers = {}, []
    for name in names:
        try:
            known[name] = rename(name, rows)
        except KeyError:
            strangers.append(name)
    return {name: new for name, new in known.items() if new}, strangers


def recognise(path, names):
    """(layout, {their name: our name}): the layout that covers the most names; it must cover all."""
    found = {layout: translate(names, LAYOUTS[layout].names) for layout in LAYOUTS}
    best = min(found, key=lambda layout: len(found[layout][1]))
    ours, strangers = found[best]
    if not ours:
        raise UserError(f"{path} holds {some(names) or 'nothing'}, expected {FORMAT} or one of the layouts "
                              f"{', '.join(LAYOUTS)}")
    if strangers or len(set(ours.values())) < len(ours):
        raise UserError(f"{path} is a {best} checkpoint with tensors that have no place in one: "
                              f"{some(strangers) or 'one thing under two names'}")
    return best, ours


# ---- Sizes and settings --------------------------------------------------------------------------------------

KINDS = {  # kind: {tensor: names of its axes}; the first tensor tells the kind
    "mamba": {"mixer.x_proj.weight": ("rank + 2n", "d_inner"), "mixer.A_log": ("d_inner", "d_state"),
              "mixer.conv1d.weight": ("d_inner", "1", "d_conv")},
    "mamba2": {"mixer.dt_bias": ("heads",), "mixer.out_proj.weight": ("d_model", "d_inner"),
               "mixer.conv1d.weight": ("d_inner + 2gn", "1", "d_conv")},
    "s4d": {"mixer.fs4.A_real": ("d_state",), "dv.weight": ("m", "d_model")},
    "attention": {"mixer.q_proj.weight": ("d_q", "d_model"), "mixer.k_proj.weight": ("d_kv", "d_model")},
    "mlp": {"mlp.gate_proj.weight": ("d_mlp", "d_model")},
}
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of Llama 3.1


def kinds_of(shapes):
    """("attention+mlp", ...): the kinds of tensors that each layer has."""
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    if not numbers or max(numbers) + 1 != len(numbers):
        raise UserError(f"there are {len(numbers)} layers, the last is number {max(numbers, default=-1)}")
    kinds = ["+".join(kind for kind, axes in KINDS.items() if f"layers.{i}.{next(iter(axes))}" in shapes)
             for i in range(len(numbers))]
    if len(set(kinds)) > 1 or not kinds[0]:
        raise UserError("the layers are of several kinds or of none: " + ", ".join(sorted(set(kinds))))
    return tuple(kinds)


def axes_of(shapes, kinds):
    """{name of an axis: its size}, from the first layer."""
    table = {"embedding.weight": ("vocab", "d_model")}
    for kind in kinds[0].split("+"):
        table |= {f"layers.0.{name}": axes for name, axes in KINDS[kind].items()}
    sizes = {}
    for name, axes in table.items():
        found = shapes.get(name, ())
        if len(found) != len(axes) or 0 in found or any(sizes.setdefault(a, i) != i for a, i in zip(axes, found)):
            raise UserError(f"{name} has shape {list(found)}, expected ({', '.join(axes)})"
                                  + "".join(f", {a} {sizes[a]}" for a in axes if a in sizes))
    return sizes


def ratio(sizes, whole, part):
    """sizes[whole] / sizes[part], which must be whole."""
    if not isinstance(sizes.get(part), int) or sizes[part] < 1 or sizes[whole] % sizes[part]:
        raise UserError(f"{whole} {sizes[whole]} is not a multiple of {part} "
                              f"{sizes.get(part, '(not in config.json)')}")
    return sizes[whole] // sizes[part]


def infer(shapes, given):
    """Our settings, from the shapes, and from those given where no shape tells: heads, groups."""
    kinds = kinds_of(shapes)
    s = {**given, **axes_of(shapes, kinds)}
    c = {"layers": kinds, "vocab": s["vocab"], "d_model": s["d_model"],
         "norm": "layer" if "layers.0.norm.bias" in shapes else "rms"}
    if "mamba" in kinds[0]:
        c |= {"expand": ratio(s, "d_inner", "d_model"), "d_conv": s["d_conv"],
              "bias": "layers.0.mixer.in_proj.bias" in shapes, "conv_bias": "layers.0.mixer.conv1d.bias" in shapes}
    if kinds[0] == "s4d":
        tables = {f"n_{name}": shapes.get(f"{name}_table.weight", (0,))[0] for name in ("position", "type")}
        c |= {"block": "gated", "expand": ratio(s, "m", "d_model"), **tables}
    if kinds[0] in ("mamba", "s4d"):
        c["d_state"] = s["d_state"]
    if kinds[0] == "mamba2":
        s |= {"gn": (s["d_inner + 2gn"] - s["d_inner"]) // 2, "n_group": s.get("n_group", 1)}
        c |= {"head_dim": ratio(s, "d_inner", "heads"), "n_group": s["n_group"], "d_state": ratio(s, "gn", "n_group")}
    if "mlp" in kinds[0]:
        c["d_mlp"] = s["d_mlp"]
    if "attention" in kinds[0]:
        s["head_size"] = ratio(s, "d_q", "n_head")
        c |= {"n_head": s["n_head"], "n_kv_head": ratio(s, "d_kv", "head_size")}
    return c


def derived(c):
    """What other programs' settings name besides."""
    return {"n_layer": len(c["layers"]), "head_size": c["d_model"] // c.get("n_head", 1),
            "m": c.get("expand", 1) * c["d_model"], "heads": c.get("expand", 1) * c["d_model"] // c.get("head_dim", 1)}


def is_number(value):
    return isinstance(value, (bool, int, float)) and 0 <= value < math.inf


def lookup(settings, key):
    """settings["a"]["b"] for the key "a.b", or None."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def read_rope(key, value):
    """Llama 3.1's four numbers, or () for no scaling of the rotary positions."""
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
    numbers = tuple(value.get(k) for k in ROPE) if kind == "llama3" else ()
    if kind not in ("default", "llama3") or not all(is_number(i) and i > 0 for i in numbers):
        raise UserError(f"{key} is {json.dumps(value)[:80]}, but only llama3's scaling is computed here")
    return numbers


def read_settings(settings, rows):
    """{our setting: its value in config.json}; UserError where that asks for what we do not compute."""
    given = {}
    for key, ours in rows.items():
        value = lookup(settings, key)
        if value is None:
            continue
        if isinstance(ours, tuple):
            if value not in ours:
                raise UserError(f"{key} is {json.dumps(value)[:80]}, "
                                      f"but only {json.dumps(ours[-1])} is known here")
        elif ours == "rope_scaling":
            given[ours] = read_rope(key, value)
        elif is_number(value):
            given[ours] = value
        else:
            raise UserError(f"{key} is {json.dumps(value)[:80]}, expected a number")
    return given


def complete(shapes, layout, settings):
    """All of our settings, from the shapes and from config.json, which may not contradict each other."""
    kind = kinds_of(shapes)[0]
    if kind not in layout.settings:
        raise UserError(f"layers of {kind}, expected {' or '.join(layout.settings)}")
    given = read_settings(settings, layout.settings[kind])
    c = infer(shapes, given)
    for ours, value in {**derived(c), **c}.items():
        said = given.pop(ours, value)
        if said != value and not (ours == "vocab" and said < value):  # state-spaces: 50277 symbols in 50280 rows
            raise UserError(f"{ours} is {said} in config.json, but {value} in the tensors")
    c |= given
    for ours, value in layout.needs.items():
        if c.get(ours, value) != value:
            raise UserError(f"{ours} is {c[ours]}, which this layout does not know")
    return c


def read(path, content):
    """(layout, settings of ours, {our name: tensor}) of what read_file found in path.

    Half precision becomes float32, which training kept its residual stream in. UserError for what is not whole.
    """
    content = named_tensors(path, content)
    if content and all(name.startswith("module.") for name in content):  # saved from a DistributedDataParallel
        content = {name.removeprefix("module."): t for name, t in content.items()}
    layout, ours = recognise(path, content)
    tensors = {}
    for name, new in ours.items():
        tensors[new] = content.pop(name)
        if not tensors[new].is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[new].dtype}, not floats")
    settings = path.with_name("config.json")
    settings = read_file(settings) if settings.is_file() else {}
    try:
        c = complete({name: tuple(t.shape) for name, t in tensors.items()}, LAYOUTS[layout], settings)
    except UserError as e:
        raise UserError(f"{path}, a {layout} checkpoint: {e}") from e
    dtype = torch.promote_types(tensors["embedding.weight"].dtype, torch.float32)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype).contiguous()
    head = tensors.get("lm_head.weight")
    c["tie"] = bool(c.get("tie", True)) if head is None else torch.equal(head, tensors["embedding.weight"])
    if c["tie"]:
        tensors["lm_head.weight"] = tensors["embedding.weight"]
    return layout, c, tensors


def misfits(layout, expected, found):
    """What is missing, unknown or misshapen, in the layout's own names; expected and found are {our name: tensor}."""
    rows = [(ours, theirs) for theirs, ours in LAYOUTS[layout].names if ours] if layout else [("", "")]
    wrong = [f"{rename(name, rows)} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{rename(name, rows)} has no place" for name in sorted(found.keys() - expected.keys())]
    wrong += [f"{rename(name, rows)} has shape {list(found[name].shape)}, expected {list(t.shape)}"
              for name, t in expected.items() if found.get(name, t).shape != t.shape]
    return some(wrong)


# ---- And back ------------------------------------------------------------------------------------------------


def write_safetensors(file, tensors):
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.itemsize
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # the tensors' bytes begin at a multiple of 8
    file.write(len(header).to_bytes(8, "little") + header)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def write_settings(c, rows):
    """config.json's content: read_settings' rows, from right to left."""
    settings, done, c = {}, set(), {**c, **derived(c)}
    for key, ours in rows.items():
        value = ours[0] if isinstance(ours, tuple) else c[ours]  # None is not written
        if ours == "rope_scaling":
            value = {"rope_type": "llama3", **dict(zip(ROPE, value))} if value else None
        if value is None or ours in done:  # written already, under its older name
            continue
        *outer, last = key.split(".")
        place = settings
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
        done.add(ours)
    return settings


def write(path, layout, c, tensors):
    """The model of settings c in another program's layout: a folder with config.json, or one file where it has none."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout} is not one of own, {', '.join(LAYOUTS)}")
    table, kinds = LAYOUTS[layout], set(c["layers"])
    if len(kinds) > 1 or not kinds <= table.settings.keys() or any(c[k] != v for k, v in table.needs.items()):
        needs = "".join(f", {k} {v}" for k, v in table.needs.items())
        raise UserError(f"layout {layout} holds layers of {' or '.join(table.settings)}{needs}; this model has "
                              f"{', '.join(sorted(kinds))}" + "".join(f", {k} {c[k]}" for k in table.needs))
    rows = [(ours, theirs) for theirs, ours in table.names if ours]
    tensors = {rename(name, rows): t for name, t in tensors.items()}
    if c["tie"] and table.file.endswith(".safetensors"):  # no two names for the same memory there
        del tensors["lm_head.weight"]
    try:
        with whole_file(Path(path, table.file)) as file:
            write_safetensors(file, tensors) if table.file.endswith(".safetensors") else torch.save(tensors, file)
        if table.file:
            with whole_file(Path(path, "config.json")) as file:
                file.write(json.dumps(write_settings(c, table.settings[c["layers"][0]]), indent=1).encode() + b"\n")
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; a file there before is untouched") from e
