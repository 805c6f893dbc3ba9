"""Exercises, cut from the source and graded by its tests.

    python -m tests.exercise                       lists them
    python -m tests.exercise _associative > my.py  prints a function without its body
    pytest --mine=my.py                            runs the functions of my.py in the place of ours, in their tests

The source is the solution, and the text is cut from it anew each time, so neither can grow old. tests/test_exercise.py
sees every test named here fail on the empty body and pass on ours.
"""
import ast
import importlib
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

from data.files import UserError, require
from train import script


class Exercise(NamedTuple):
    module: str
    tests_in: str  # the file of its tests
    minutes: int
    learns: str
    tests: tuple  # what they are called, or how they begin; the plainest first
    read: tuple = ()  # functions whose docstrings belong to it
    read_module: bool = False  # and whether the file's does


EXERCISES = {
    "discretize": Exercise("scan", "test_scan", 30, "from h' = A h + B x to a step, by five rules", (
        "test_zoh_and_bilinear_of_a_scalar",
        "test_all_rules_agree_as_dt_goes_to_zero",
        "test_gated_rnn_is_the_one_dimensional_case_under_zoh",
        "test_but_not_under_the_rule_the_mamba_code_uses",
        "test_zoh_holds_at_a_pole_of_zero_with_its_gradient",
        "test_zoh_is_exact_near_zero",
        "test_a_trapezoid_is_second_order")),
    "legs_basis": Exercise("tests.dense", "test_s4", 20, "a state is a polynomial of the past", (
        "test_the_first_modes_of_legs_by_hand",
        "test_the_modes_of_legs_are_legendre_polynomials",
        "test_legs_rebuilds_a_signal_from_its_state")),
    "fft_conv": Exercise("scan", "test_s4", 15, "a convolution by FFT must not wrap around", (
        "test_convolution_in_numbers",
        "test_fft_convolution_is_the_sum_it_stands_for",
        "test_convolution_is_recurrence_is_scan",
        "test_fft_convolution_of_bfloat16_is_done_in_float32",
        "test_fft_convolution_takes_l_log_l_operations"), ("_widen", "_add_skip", "_no_autocast")),
    "_associative": Exercise("scan", "test_scan", 40, "a scan as a tree: log l steps, odd lengths", (
        "test_all_scans_agree_for_every_length[parallel",
        "test_decay_broadcasts_to_the_input[parallel",
        "test_a_tree_has_the_depth_and_the_work_of_its_table"), ("scan", "_scan_parallel")),
    "_selective_naive": Exercise("scan", "test_scan", 20, "selection: the definition of Mamba", (
        "test_three_steps_by_hand[naive",
        "test_a_step_of_length_zero_changes_nothing[naive",
        "test_the_future_cannot_be_seen[naive",
        "test_any_split_of_a_sequence_gives_the_whole_sequence[naive",
        "test_all_selective_scans_agree_for_every_length[parallel"), ("selective_scan",)),
    "ChunkedSelectiveScan.backward": Exercise("scan", "test_scan", 60, "the gradient: a scan backwards", (
        "test_all_selective_scans_agree_for_every_length[chunked",
        "test_float32_stays_within_2e6_of_float64[chunked"), ("_chunk_slices", "_chunk_states")),
    "_attend": Exercise("scan", "test_ssd", 30, "the scan is attention, masked by decays", (
        "test_without_decay_it_is_causal_linear_attention[quadratic",
        "test_ssd_is_the_selective_scan_with_one_decay_a_head[quadratic",
        "test_the_initial_state_enters_linearly[quadratic",
        "test_all_forms_agree_for_every_length"),
        ("ssd", "_ssd_naive", "_heads_first", "_decays", "per_head")),
    "_ssd_chunked": Exercise("scan", "test_ssd", 35, "chunks, then carries: a state enters linearly", (
        "test_any_split_of_a_sequence_gives_the_whole_sequence[50-chunked",
        "test_the_state_after_the_first_steps_has_not_read_the_others[69-chunked",
        "test_float32_stays_within_1e5_of_the_float64_recurrence[chunked",
        "test_no_tensor_of_all_states_is_ever_made",
        "test_memory_grows_linearly_with_length"),
        ("ssd", "_heads_first", "_attend", "_last_state", "scan")),
    "causal_conv": Exercise("model", "test_model", 25, "a convolution has a state; short inputs", (
        "test_causal_conv_is_conv1d_with_padding_on_the_left",
        "test_the_tail_of_a_convolution_does_not_keep_its_inputs_in_memory",
        "test_one_byte_at_a_time_equals_the_scan[mamba2",
        "test_the_state_after_a_prefix_has_not_read_the_rest[mamba2")),
    "Mamba.forward": Exercise("model", "test_model", 30, "the block around the selective scan", (
        "test_a_mamba_block_spelt_out",
        "test_any_split_of_a_sequence_gives_the_whole_sequence[mamba-",
        "test_the_state_after_a_prefix_has_not_read_the_rest[mamba-"),
        ("MambaState", "causal_conv", "selective_scan")),
    "Mamba3.recur": Exercise("model", "test_mamba3", 45, "both ends of a step; a state that turns", (
        "test_the_recurrence_in_numbers",
        "test_an_initial_state_in_numbers",
        "test_the_block_spelt_out",
        "test_the_gradients_in_numbers"), ("Mamba3State", "outer", "per_head", "turn", "ssd_scan")),
    "exact": Exercise("sample", "test_speculate", 30, "speculation leaves the distribution alone", (
        "test_a_perfect_drafter_is_always_believed",
        "test_the_text_has_the_targets_distribution_exactly",
        "test_drawing_from_another_distribution_than_the_one_tested_is_caught",
        "test_the_expected_length_of_a_round_is_the_geometric_sum")),
    "copy_attention": Exercise("distill", "test_distill", 25, "queries are C, keys B, values x", (
        "test_new_parts_begin_out_of_the_way",
        "test_all_but_the_new_parts_equals_the_teacher",
        "test_a_mapped_layer_without_its_new_parts_is_the_attention_layer_without_softmax"),
        ("input_rows",), read_module=True),
}


def file_of(e):
    """The file that holds the function of an exercise."""
    return e.module.replace(".", "/") + ".py"


def imports_of(module, used):
    """The lines that import those of a module's own names."""
    names = vars(module)
    modules = {name: names[name].__name__ for name in used if inspect.ismodule(names[name])}
    lines = sorted(f"import {path}" if path == name else f"import {path} as {name}"
                   for name, path in modules.items())
    others = ", ".join(sorted(used - {*modules}))
    if others:
        lines.append(f"from {module.__name__} import {others}")
    return lines


def text_of(name, blank=True):
    """A file for --mine: docstrings to read first, imports, and our function, inside its class if it has one."""
    e = EXERCISES[name]
    module = importlib.import_module(e.module)
    names = vars(module)
    outer, *inner = name.split(".")
    text = inspect.getsource(names[outer])
    tree = ast.parse(text).body[0]
    function = tree
    for part in inner:
        function = next(node for node in function.body if getattr(node, "name", None) == part)
    lines = text.splitlines()
    if blank:
        begin = function.body[1 if ast.get_docstring(function) else 0]
        empty = f'raise NotImplementedError("{name} is yours to write")'
        lines[begin.lineno - 1:function.end_lineno] = [" " * begin.col_offset + empty]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {*names} - {outer}
    about = [f"{name} of {file_of(e)}, {e.minutes} minutes: {e.learns}.",
             "Write the body, and run: pytest --mine=my.py"]
    for other in e.read:
        if inspect.isclass(names[other]):
            about += ["", inspect.getsource(names[other])]
        else:
            about += ["", f"{other}{inspect.signature(names[other])}", inspect.getdoc(names[other])]
    if e.read_module:
        about += ["", module.__doc__.strip()]
    about = [f"# {line}".rstrip() for line in "\n".join(about).splitlines()]
    return "\n".join([*about, *imports_of(module, used), "", "", *lines]) + "\n"


def plain(names, path):
    """The function of that name, Class.method included, among names, under its decorators; or None."""
    first, *rest = path.split(".")
    found = names.get(first)
    for part in rest:
        found = vars(found).get(part) if inspect.isclass(found) else None
    found = inspect.unwrap(found)
    return found if inspect.isfunction(found) else None


def ours(name):
    """The function of ours that an exercise is about."""
    return plain(vars(importlib.import_module(EXERCISES[name].module)), name)


def stand_in(*args, theirs, **kwargs):
    """What the code of a function of ours is exchanged for."""
    __tracebackhide__ = True
    return theirs(*args, **kwargs)


def take(path):
    """Lets the exercises that a file defines run in the place of ours: their names, and a function that undoes it.

    Ours stay the objects that they are, in tables and in other modules, with their decorators. Their code changes.
    """
    names = {"__name__": "mine"}
    try:
        exec(compile(Path(path).read_bytes(), str(path), "exec"), names)
    except (Exception, SystemExit) as e:
        raise UserError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    taken = {name: plain(names, name) for name in EXERCISES}
    taken = {name: theirs for name, theirs in taken.items() if theirs not in (None, ours(name))}
    require(taken, f"{path} defines none of {', '.join(EXERCISES)}")
    before = {name: (ours(name).__code__, ours(name).__kwdefaults__) for name in taken}
    for name, theirs in taken.items():
        ours(name).__code__ = stand_in.__code__
        ours(name).__kwdefaults__ = {"theirs": theirs}

    def undo():
        for name, (code, defaults) in before.items():
            ours(name).__code__ = code
            ours(name).__kwdefaults__ = defaults

    return list(taken), undo


def grading(name, items):
    """Those of pytest's items that grade an exercise, in the order of its table."""
    e = EXERCISES[name]
    here = [item for item in items if item.path.stem == e.tests_in]
    ends = [test if "[" in test else f"{test}[" for test in e.tests]
    return [item for end in ends for item in here if f"{item.name}[".startswith(end)]


@script
def main(argv):
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        name = " ".join(argv)
        require(name in EXERCISES, f'"{name}" is not one of {", ".join(EXERCISES)}')
        print(text_of(name), end="")
        return 0
    for name, e in EXERCISES.items():
        print(f"{name:30}{file_of(e):16}{e.minutes:3} min  {e.learns}")
    print("\npython -m tests.exercise NAME > my.py      then write the body, and    "
          "pytest --mine=my.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
