"""The error that is shown as one line, and files that appear whole or not at all."""
import os
import uuid
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A flag, a file or a size that cannot be used; the message is one line that says what to do instead."""


def require(holds, message):
    """UserError with the message unless it holds."""
    if not holds:
        raise UserError(message)


def require_type(name, value, kind):
    """UserError unless the value is of the type itself: no bool for an int. An int will do for a float."""
    typed = type(value) is kind or kind is float and type(value) is int
    require(typed, f"{name} {value!r:.80} is not of type {kind.__name__}")


@contextmanager
def whole_file(target: Path):
    """Yields a file to write, which takes the name `target` once it is complete and vanishes on any error.

    Temporary names are unique: two processes that build one file do not meet, and the last to rename wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut could keep the new name and lose the bytes
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
