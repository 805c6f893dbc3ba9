"""tests/exercise.py: what is printed fails the tests that grade it, and our text passes."""
import inspect
from itertools import product

import pytest
from _pytest.runner import runtestprotocol

from data.files import UserError
from exercise import EXERCISES, grading, main, ours, take, text_of


class Rounds:
    """A plugin that collects once and runs each exercise's tests on an empty body and on ours."""

    def __init__(self, folder):
        self.file = folder / "mine.py"
        self.outcomes = []  # (exercise, blank, test, what the failure says)

    def pytest_runtestloop(self, session):
        for name, blank in product(EXERCISES, (True, False)):
            self.file.write_text(text_of(name, blank))
            taken, undo = take(self.file)
            assert taken == [name]
            items = grading(name, session.items)
            if not blank:  # one case each, the last: the suite has run the others
                items = {item.originalname: item for item in items}.values()
            for item in items:
                reports = runtestprotocol(item, log=False, nextitem=None)
                failure = "".join(str(report.longrepr) for report in reports if report.failed)
                self.outcomes.append((name, blank, item, failure))
            undo()
        return True


def test_every_test_named_fails_without_a_body_and_passes_with_ours(tmp_path):
    """All of its cases, for the reason that the body is empty; and it has a claim to print."""
    rounds = Rounds(tmp_path)
    files = sorted({f"tests/{e.tests_in}.py" for e in EXERCISES.values()})
    assert pytest.main([*files, "-p", "no:cacheprovider", "--tb=native"], plugins=[rounds]) == 0
    wanted = {(name, blank, test.split("[")[0]) for blank in (True, False)
              for name, e in EXERCISES.items() for test in e.tests}
    assert {(name, blank, item.originalname) for name, blank, item, _ in rounds.outcomes} == wanted
    for name, blank, item, failure in rounds.outcomes:
        assert inspect.getdoc(item.obj), item.name
        right = f"{name} is yours to write" in failure if blank else failure == ""
        assert right, (name, item.name, failure)


def grade(text, folder, capsys):
    """What pytest --mine prints about a file of that text, and its exit status."""
    (folder / "mine.py").write_text(text)
    codes = [ours(name).__code__ for name in EXERCISES]
    status = pytest.main([f"--mine={folder / 'mine.py'}", "-p", "no:cacheprovider"])
    assert codes == [ours(name).__code__ for name in EXERCISES]
    return capsys.readouterr().out, status


def test_a_wrong_answer_ends_at_the_first_claim_with_two_numbers(tmp_path, capsys):
    """The smallest case that fails: a tree that joins two steps in the wrong order is right for one step."""
    wrong = text_of("_associative", blank=False).replace("a[:, right] * b[:, left] + b[:, right]",
                                                         "a[:, left] * b[:, right] + b[:, left]")
    out, status = grade(wrong, tmp_path, capsys)
    assert status == 1 and "1 failed, 4 passed" in out and len(out) < 2000
    assert "test_all_scans_agree_for_every_length[parallel-2-dtype0-False]" in out
    assert "AssertionError: h[1, 1, 2] is " in out and ", expected " in out
    assert "Every path computes what the loop computes" in out


def test_a_loop_is_no_tree(tmp_path, capsys):
    """It is right, and has the depth of a loop."""
    text = "import scan\ndef _associative(a, b):\n    return scan.scan(a, b, impl='naive')\n"
    out, status = grade(text, tmp_path, capsys)
    assert status == 1 and "l = 256: 514 products and sums, one after the other" in out


@pytest.mark.parametrize("text, message", [
    ("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"),
    ("def scam(): pass", "defines none of discretize, "), (None, "FileNotFoundError")])
def test_a_file_that_cannot_be_graded_is_one_line(text, message, tmp_path):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        take(tmp_path / "mine.py")
    assert "\n" not in str(error.value)


def test_the_script_lists_and_prints_exercises(capsys):
    """What is printed is the docstring, the imports and an empty body, and Python reads it."""
    assert main([]) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == [*EXERCISES]
    assert all((ours(name).__doc__ or "") in text_of(name) for name in EXERCISES)
    assert main(["ChunkedSelectiveScan.backward"]) == 0
    out = capsys.readouterr().out
    compile(out, "mine.py", "exec")
    assert "from scan import _chunk_slices, _chunk_states, _differentiable_once\n" in out and "a_{t+1} g_{t+1}" in out
    assert "ctx.save_for_backward(x, dt, A, B, C, starts)" in out and "carry" not in out
    assert main(["scan"]) == 2
    assert capsys.readouterr().err.startswith('error: "scan" is not one of discretize, ')
