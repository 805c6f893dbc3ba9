"""The figures of assets/: python -m tests.figures [--run out/mamba2]. Needs matplotlib.

Each is drawn from a JSON file of assets/, whose `command` says how it was measured. Those of train.svg and selects.svg
are written by --run from a trained run, so these figures too can be drawn again without it.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from data.corpus import compressed_bpb, load_corpus
from data.files import UserError
from model import load
from train import flag, parse, script

ASSETS = Path(__file__).parent.parent / "assets"
BEFORE = "import os\n\n\nclass Store:\n    "  # read, but not shown
LINE = "def load(self, path):  # opens a file\n"  # shown in selects.svg

matplotlib.use("svg")
plt.rcParams.update({"svg.hashsalt": "bytestate", "svg.fonttype": "none"})


@dataclass
class Flags:
    run: str = flag("", "a run of train.py whose curve and step sizes are drawn")
    layer: int = flag(1, "with --run: the layer of selects.svg, from 0", low=0)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Numbers: from the JSON files, and from a run


def measured(name, **wanted):
    """The rows of a measurement that have these values."""
    content = json.loads((ASSETS / f"{name}.json").read_text())
    print(f"{name}.json: {content['command']}")
    return [row for row in content["rows"] if wanted.items() <= row.items()]


def write(name, argv, rows):
    """rows as assets/NAME.json."""
    content = {"command": " ".join(["python -m tests.figures", *argv]), "rows": rows}
    (ASSETS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def training_rows(folder, points=200):
    """A run's curve: the mean training loss of up to `points` parts, every validation; and compressors' bits."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["train_bpb"] is not None]
    size = math.ceil(len(steps) / points)
    found = []
    for i in range(0, len(steps), size):
        part = steps[i:i + size]
        mean = sum(line["train_bpb"] for line in part) / len(part)
        found.append(("training", part[-1]["seconds"], mean))
    for line in lines:
        if line["val_bpb_carried"] is not None:
            found.append(("carried", line["seconds"], line["val_bpb_carried"]))
    val = load_corpus(load(folder)[1]["flags"]["data"]).val
    found += [(tool, None, bpb) for tool, bpb in compressed_bpb(val).items()]
    return [{"table": table, "seconds": seconds, "bpb": round(bpb, 4)}
            for table, seconds, bpb in found]


@torch.inference_mode()
def step_sizes(model, layer, text):
    """dt (nh, l) of a layer of Mamba-2 that reads text: softplus(the last rows of in_proj + dt_bias)."""
    mixer = model.layers[layer].mixer
    seen = []
    hook = mixer.in_proj.register_forward_hook(lambda _, args, out: seen.append(out))
    model(torch.tensor([list(text)]))
    hook.remove()
    dt = seen[0][0, :, -len(mixer.dt_bias):] + mixer.dt_bias  # (l, nh)
    return F.softplus(dt).T


def selection_rows(folder, layer):
    """dt of each byte of LINE, one row per head, the heads that write most first."""
    model, _ = load(folder)
    if model.config.kinds != {"mamba2"} or layer >= len(model.layers):
        raise UserError(f"--run {folder}: selects.svg shows a mamba2 of more than {layer} layers")
    dt = step_sizes(model, layer, (BEFORE + LINE).encode())[:, len(BEFORE):]
    rows = []
    for head in dt.mean(1).argsort(descending=True).tolist():
        sizes = [round(size, 4) for size in dt[head].tolist()]
        rows.append({"text": LINE, "layer": layer, "head": head, "dt": sizes})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 2. Drawing


def axes_of(width=6.4, height=4.0):
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, name):
    """The same bytes for the same rows."""
    figure.savefig(ASSETS / name, metadata={"Date": None})
    plt.close(figure)
    print(f"  wrote {ASSETS / name}")


def draw(name, rows, x, y, xlabel, ylabel, yscale="linear", xscale="log"):
    """One curve for every path and kind of memory; huge pages dashed, kept memory dotted."""
    figure, axes = axes_of()
    curves = {}
    for row in rows:
        key = row["path"], row.get("memory", "default")
        curves.setdefault(key, []).append((row[x], row[y]))
    paths = list(dict.fromkeys(path for path, _ in curves))
    for (path, memory), points in curves.items():
        style = {"default": "o-", "huge pages": "o--", "kept": "o:"}[memory]
        axes.plot(*zip(*points), style if xscale == "log" else "-", markersize=4,
                  color=f"C{paths.index(path)}", label=path if memory == "default" else None)
    axes.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    if xscale == "log":
        ticks = sorted({row[x] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0 if yscale == "linear" else None)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, name)


def speed():
    rows = measured("bench_scan", table="selective scan", mode="forward+backward")
    rows = [{**row, "ms": 1e3 * row["seconds"]} for row in rows]
    draw("scan_time.svg", rows, "l", "ms", "length",
         "forward and backward, ms\n(dashed: huge pages, dotted: memory kept)", "log")
    rows = measured("bench_decode", table="decoding after a context", mode="writing")
    draw("decode_context.svg", rows, "context", "ms_per_byte", "bytes read before",
         "ms per byte written")


def learning():
    rows = [{**row, "percent": 100 * row["accuracy"]} for row in measured("study_selection")]
    for table, label in (("selective_copy", "selective copying: letters right, %"),
                         ("induction", "induction: right, %")):
        draw(f"{table}.svg", [row for row in rows if row["table"] == table], "length", "percent",
             "length (trained on 256)", label)
    draw("length.svg", measured("study_robust", table="position"), "to", "bpb",
         "up to this position (trained on the first part)", "bits per byte")
    draw("legs.svg", measured("bench_s4", table="legs"), "age", "value", "age", "x(now - age)",
         xscale="linear")


def holding():
    """Accuracy by task and layer, each at its best learning rate; recall by number of pairs."""
    rows = [{**row, "percent": 100 * row["accuracy"]} for row in measured("study_state")]
    best = {}
    for row in rows:
        if row["table"] == "layers":
            heights = best.setdefault(row["path"], {})
            heights[row["task"]] = max(heights.get(row["task"], 0), row["percent"])
    figure, axes = axes_of(8, 3.6)
    for i, (layer, heights) in enumerate(best.items()):
        places = [task + (i - 2.5) / 7 for task in range(len(heights))]
        axes.bar(places, heights.values(), 1 / 7, label=layer)
    axes.set_xticks(range(len(heights)), [task.replace("_", " ") for task in heights])
    axes.set(ylabel="right, %", ylim=(0, 100))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, "state.svg")
    draw("recall.svg", [row for row in rows if row["table"] == "pairs"], "pairs", "percent",
         "pairs of a key and its value", "values recalled, %")


def speculation():
    rows = []
    for row in measured("bench_speculate", table="speculation"):
        if row["temperature"] != 0.5 and not {"rule", "to_boundary"} & set(row):
            rows.append({**row, "path": f"{row['path']}, temperature {row['temperature']:g}"})
    rows.sort(key=lambda row: (row["path"], row["k"]))
    guesses = "guesses: words, or bytes"
    draw("speculate.svg", rows, "k", "speedup", guesses, "times as fast as plain writing")
    draw("speculate_calls.svg", rows, "k", "bytes_per_call", guesses, "bytes per call of the model")


def training():
    """Bits per byte by seconds of training, beside those of compressors for the validation bytes."""
    rows = measured("train")
    figure, axes = axes_of(7, 4.2)
    thin = {"color": "C0", "linewidth": 1, "alpha": 0.7}
    thick = {"color": "C1", "linewidth": 2.5, "marker": "o"}
    for table, label, style in (("training", "training, the windows of a step", thin),
                                ("carried", "validation, state carried along", thick)):
        found = [row for row in rows if row["table"] == table]
        seconds = [row["seconds"] for row in found]
        axes.plot(seconds, [row["bpb"] for row in found], label=label, **style)
    others = sorted((row["bpb"], row["table"]) for row in rows if row["seconds"] is None)
    for i, (bpb, tool) in enumerate(others):
        axes.axhline(bpb, color="0.4", linewidth=1, linestyle="--")
        side = "bottom" if i else "top"  # the lowest label below its line, since two may be close
        axes.text(1.03 * seconds[-1], bpb, f"{tool}: {bpb:.2f}", fontsize=11, va=side)
    axes.set(xlim=(0, 1.22 * seconds[-1]), ylim=(min(row["bpb"] for row in rows) - 0.2, 4))
    axes.set_xlabel("seconds of training", fontsize=12)
    axes.set_ylabel("bits per byte", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.legend(frameon=False, fontsize=12)
    save(figure, "train.svg")


def selects():
    """dt per byte and head: how much of a byte a head writes into its state."""
    rows = measured("selects")
    figure, axes = axes_of(7, 3.4)
    text = rows[0]["text"].replace("\n", "\u21b5").replace(" ", "\u00b7")
    sizes = [row["dt"] for row in rows]
    image = axes.imshow(sizes, cmap="Greys", norm="log", aspect="auto", interpolation="nearest")
    image.set_clim(0.01, 1)
    axes.grid(False)
    axes.set_xticks(range(len(text)), text, fontsize=12, family="monospace")
    axes.set_yticks(range(len(rows)), [row["head"] for row in rows], fontsize=10)
    axes.tick_params(length=0)
    axes.set_ylabel(f"head of layer {rows[0]['layer']}", fontsize=12)
    axes.set_title("dark: the head writes this byte into its state", fontsize=12, loc="left")
    figure.colorbar(image, pad=0.01).set_label("step size dt", fontsize=12)
    save(figure, "selects.svg")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The command line


@script
def main(argv):
    argv = sys.argv[1:] if argv is None else list(argv)
    c, _ = parse(Flags, argv, "Draw the figures of assets/: python -m tests.figures")
    if c.run:
        write("train", argv, training_rows(Path(c.run)))
        write("selects", argv, selection_rows(Path(c.run), c.layer))
    for figure in (training, selects, learning, holding, speed, speculation):
        figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
