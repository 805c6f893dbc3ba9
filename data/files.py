"""The error that is shown as one line, dataclasses that know their bounds, files that appear whole or not at all."""
import os
import uuid
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path


class UserError(ValueError):
    """A flag, a file or a size that cannot be used; the message is one line that says what to do instead."""


def require(holds, message):
    """UserError with the message unless it holds."""
    if not holds:
        raise UserError(message)


def bounded(default, low=0, high=2**62, one_of=None, **more):
    """A field of a dataclass for check_fields: low and high, both included, bound a number, one_of lists the values of
    a word. What more there is to say stands in its metadata too."""
    return field(default=default, metadata={"low": low, "high": high, "one_of": one_of, **more})


def check_fields(c, prefix=""):
    """UserError unless every field of the dataclass c is of its type (no bool for an int; an int will do for a float)
    and within its bounds, which no nan is. A number without bounds must not be negative."""
    for f in fields(c):
        value = getattr(c, f.name)
        name = f"{prefix}{f.name}"
        typed = type(value) is f.type or f.type is float and type(value) is int
        require(typed, f"{name} {value!r:.80} is not of type {f.type.__name__}")
        if f.type in (int, float):
            low = f.metadata.get("low", 0)
            high = f.metadata.get("high", 2**62)
            require(low <= value <= high, f"{name} {value} is not from {low} to {high}")
        known = f.metadata.get("one_of")
        if known:
            require_one_of(name, value, known)


def require_one_of(name, value, known):
    """UserError unless the word is among those known."""
    require(value in known, f"{name} {value or '(nothing)'} is not one of "
            f"{', '.join(filter(None, known))}")


@contextmanager
def whole_file(target: Path):
    """Yields a file to write, which takes the name `target` once it is complete and vanishes on any error; UserError if
    it cannot be written.

    Temporary names are unique: two processes that build one file do not meet, and the last to rename wins.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut could keep the new name and lose the bytes
        os.replace(temporary, target)
    except BaseException as e:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(e, (OSError, RuntimeError)):  # torch reports a full disk as the latter
            raise
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"cannot write {target}: {reason}; "
                        "a file there before is untouched") from e
