"""The figures of assets/: python -m tests.figures [--run out/mamba2]. Needs matplotlib.

Each is drawn from a JSON file of assets/, whose `command` says how it was measured, but for two that follow from the
formulas. Those of a trained run, train.json, selects.json and inside.json, are written by --run, so these figures too
can be drawn again without it.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from data.corpus import compressed_bpb, load_corpus
from data.files import UserError
from model import load
from scan import _decays, s4d_kernel
from tests.dense import s4d_init
from tests.look import look
from train import flag, parse, script

ASSETS = Path(__file__).parent.parent / "assets"
BEFORE = "import os\n\n\nclass Store:\n    "  # read, but not shown
LINE = "def load(self, path):  # opens a file\n"  # shown in selects.svg and surprise.svg
WORDS = "def area(self):\n    return self.width\n"  # shown in masks.svg

matplotlib.use("svg")
plt.rcParams.update({"svg.hashsalt": "bytestate", "svg.fonttype": "none"})
READABLE = {"font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left",
            "figure.titlesize": 12, "figure.labelsize": 12}  # 700 pixels wide


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


def selection_rows(folder, layer):
    """dt of each byte of LINE, one row per head, the heads that write most first."""
    model, _ = load(folder)
    if model.config.kinds != {"mamba2"} or layer >= len(model.layers):
        raise UserError(f"--run {folder}: selects.svg shows a mamba2 of more than {layer} layers")
    dt = look(model, (BEFORE + LINE).encode())[layer].dt[len(BEFORE):].T  # (nh, l)
    rows = []
    for head in dt.mean(1).argsort(descending=True).tolist():
        sizes = [round(size, 4) for size in dt[head].tolist()]
        rows.append({"text": LINE, "layer": layer, "head": head, "dt": sizes})
    return rows


@torch.no_grad()
def inside_rows(folder, wanted=(1, 4, 170)):
    """dt A of WORDS' bytes for the heads whose half-life is nearest to those wanted, and the surprise of LINE's."""
    model, _ = load(folder)
    layers = look(model, (BEFORE + WORDS).encode())
    half = torch.stack([layer.half_life for layer in layers])  # (layers, nh)
    rows = []
    for target in wanted:
        i, head = divmod(int((half / target).log().abs().argmin()), half.shape[1])
        log_a = layers[i].dt[len(BEFORE):, head] * layers[i].A[head]
        rows.append({"table": "mask", "text": WORDS, "layer": i, "head": head,
                     "half_life": round(float(half[i, head]), 2),
                     "log_a": [round(number, 5) for number in log_a.tolist()]})
    read = torch.tensor([list((BEFORE + LINE).encode())])
    log_p = torch.log_softmax(model(read)[0][0, :-1], -1)  # (l - 1, v)
    bits = -log_p.gather(1, read[0, 1:, None])[-len(LINE):, 0] / math.log(2)
    rows.append({"table": "surprise", "text": LINE, "bits": [round(b, 3) for b in bits.tolist()]})
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


def contexts():
    """Loss by position: with states passed on in training and without; attention stretched, beside states."""
    rows = measured("context_carry", table="position")
    for row in rows:
        row["path"] += ", passed on" if row["passed"] else ""
    draw("carry.svg", rows, "to", "bpb", "up to this position (trained on 128)", "bits per byte")
    rows = measured("context_lengths", table="position")
    draw("lengths.svg", [row for row in rows if "not tuned" not in row["path"]], "to", "bpb",
         "up to this position (trained on 256)", "bits per byte")


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


def visible(text):
    return text.replace("\n", "\u21b5").replace(" ", "\u00b7")


def selects():
    """dt per byte and head: how much of a byte a head writes into its state."""
    rows = measured("selects")
    figure, axes = axes_of(7, 3.4)
    text = visible(rows[0]["text"])
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


def masks():
    """L of three heads of Mamba-2: attention's triangle, faded by the decays of all bytes between."""
    rows = measured("inside", table="mask")
    text = rows[0]["text"]
    starts = [i for i in range(len(text)) if text[i] != " " and (i == 0 or text[i - 1] in " .\n(")]
    words = [visible(text[i:j]) for i, j in zip(starts, [*starts[1:], len(text)])]
    figure, panels = plt.subplots(1, 3, figsize=(7, 2.8), sharey=True, layout="constrained")
    for axes, row in zip(panels, rows):
        axes.imshow(_decays(torch.tensor(row["log_a"])), cmap="Greys", interpolation="nearest")
        axes.set_title(f"half-life {row['half_life']:.1f} bytes")
        axes.set_yticks(starts, words, family="monospace")
        axes.set_xticks(starts, [word[0] for word in words], family="monospace")
        axes.tick_params(length=0)
    figure.supxlabel("dark: this earlier byte is still in the state")
    save(figure, "masks.svg")


def surprise():
    """Bits per byte along a line."""
    row, = measured("inside", table="surprise")
    figure, axes = axes_of(7, 2.6)
    axes.grid(False, axis="x")
    places = range(len(row["bits"]))
    axes.bar(places, row["bits"])
    axes.set_xticks(places, visible(row["text"]), family="monospace")
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("bits")
    axes.set_title("surprise of each byte: words begin, the rest follows")
    save(figure, "surprise.svg")


def forgetting():
    """exp(-dt t), the share of a byte that is left after t others where A is -1."""
    figure, axes = axes_of(7, 3)
    t = torch.arange(0, 201)
    for dt in (1, 0.1, 0.01, 0.001):
        left = torch.exp(-dt * t)
        axes.plot(t, left, linewidth=2.5)
        place = {1: 4, 0.1: 14}.get(dt, 200)
        axes.annotate(f"dt {dt:g}", (place, left[place]), (6, 6), textcoords="offset points")
    axes.set_xlim(0, 225)
    axes.set_xlabel("bytes since")
    axes.set_ylabel("left of it")
    axes.set_title("a byte fades with exp(-dt t): small steps remember")
    save(figure, "forgetting.svg")


def kernels(l=300, n=64):
    """A kernel of each of S4D's initializations, with one random C for all and dt 0.01."""
    C = 2 * torch.randn(1, n // 2, dtype=torch.complex128, generator=torch.manual_seed(1))
    figure, panels = plt.subplots(2, 2, figsize=(7, 3.8), sharex=True, layout="constrained")
    for axes, rule in zip(panels.flat, ("legs", "inv", "lin", "real")):
        A, B = s4d_init(rule, n)
        dt = torch.tensor([0.01], dtype=torch.float64)
        axes.plot(s4d_kernel(dt, A[None], B[None], C, l)[0], linewidth=2)
        axes.set_title(rule)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("bytes ago")
    figure.suptitle("kernels of S4D: only the real one, Mamba's, does not swing")
    save(figure, "kernels.svg")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The command line


@script
def main(argv):
    argv = sys.argv[1:] if argv is None else list(argv)
    c, _ = parse(Flags, argv, "Draw the figures of assets/: python -m tests.figures")
    if c.run:
        write("train", argv, training_rows(Path(c.run)))
        write("selects", argv, selection_rows(Path(c.run), c.layer))
        write("inside", argv, inside_rows(Path(c.run)))
    for figure in (training, selects, learning, holding, contexts, speed, speculation):
        figure()
    with plt.rc_context(READABLE):
        for figure in (masks, surprise, forgetting, kernels):
            figure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
