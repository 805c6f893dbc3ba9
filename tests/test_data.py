"""data/corpus.py: files, folders, the standard library, downloads, windows."""
import hashlib
import io
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from conftest import needs_pipes
from data import corpus
from data.corpus import compressed_bpb, load_corpus, windows
from data.files import UserError, whole_file

PAYLOAD = bytes(np.random.default_rng(0).integers(0, 256, 200_003, dtype=np.uint8))
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def failure(name, cache):
    """The message of the UserError that `name` must raise: one line."""
    with pytest.raises(UserError) as error:
        load_corpus(str(name), cache)
    assert "\n" not in str(error.value)
    return str(error.value)


def both(found):
    return found.train.tobytes() + found.val.tobytes()


def test_any_file_is_a_corpus_and_its_last_tenth_validates(tmp_path):
    """The smallest has two bytes, one to train on and one to validate on."""
    data = bytes(range(256)) * 4 + b"end"
    found = load_corpus(str(write(tmp_path / "any.bin", data)), tmp_path / "cache")
    assert both(found) == data and len(found.val) == 103
    assert found.train.dtype == found.val.dtype == np.uint8
    assert not (tmp_path / "cache").exists()  # mapped where it lies
    assert load_corpus(str(write(tmp_path / "two", b"ab")), tmp_path).val.tobytes() == b"b"
    for data in (b"", b"a"):
        assert f"has {len(data)} bytes" in failure(write(tmp_path / "small", data), tmp_path)


def test_what_is_neither_a_file_nor_a_folder_is_answered_with_the_known_names(tmp_path):
    """An empty name is not the current folder; a pipe is not waited for."""
    if hasattr(os, "mkfifo"):  # on Windows it is one more name that does not exist
        os.mkfifo(tmp_path / "pipe")
    told = "no such file or folder, and the known names are python, shakespeare, enwik8"
    for name in ("shakespear", "", tmp_path / "pipe"):
        assert told in failure(name, tmp_path)


def test_an_unreadable_file_is_a_one_line_error(tmp_path):
    (tmp_path / "enwik8").mkdir()  # in the place of a file; chmod would not stop root
    assert str(tmp_path / "enwik8") in failure("enwik8", tmp_path)


def test_a_known_name_wins_over_a_path_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "load_python", lambda: "the standard library")
    write(tmp_path / "python" / "a.txt", b"0123456789")
    assert load_corpus("python") == "the standard library"
    assert both(load_corpus("./python")) == b"0123456789"


def test_a_folder_is_its_text_files_in_sorted_order(tmp_path):
    """What is binary or hidden is skipped and counted."""
    late = b"x" * 8192 + b"\0"  # a NUL after the first 8 KB is no sign
    for name, data in {"b/1.txt": b"<1>", "a.txt": b"<a>", "b/0.txt": b"<0>", "c.md": late,
                       "b/image.png": b"\x89PNG\0\0", ".hidden": b"no", ".git/a": b"no"}.items():
        write(tmp_path / "texts" / name, data)
    found = load_corpus(str(tmp_path / "texts"))
    assert both(found) == b"<a><0><1>" + late and found.note.startswith("4 files (3 skipped)")
    write(tmp_path / "bin" / "a.out", b"\x7fELF\0")
    assert "has no text files (1 skipped)" in failure(tmp_path / "bin", tmp_path)


@needs_pipes
def test_a_folder_skips_links_and_pipes(tmp_path):
    """Links to folders may form a loop, and a pipe is not waited for."""
    texts = tmp_path / "texts"
    write(texts / "deep" / "kept.txt", b"kept bytes")
    (texts / "gone").symlink_to(tmp_path / "nothing")
    (texts / "itself").symlink_to(texts / "itself")
    (texts / "deep" / "up").symlink_to(texts)
    os.mkfifo(texts / "pipe")
    found = load_corpus(str(texts))
    assert both(found) == b"kept bytes" and found.note.startswith("1 files (4 skipped)")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A crash leaves nothing; two writers of one file do not meet."""
    with pytest.raises(KeyboardInterrupt):
        with whole_file(tmp_path / "cache" / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path / "cache") == []
    target = tmp_path / "cache" / "x"
    with whole_file(target) as one, whole_file(target) as two:
        one.write(b"same")
        two.write(b"same")
    assert os.listdir(tmp_path / "cache") == ["x"] and target.read_bytes() == b"same"


def test_python_validates_on_every_20th_file_in_the_order_of_hashed_paths(tmp_path, monkeypatch):
    names = [f"{folder}m{i}.py" for folder in ("", "email/", "a/b/") for i in range(14)]  # 42 files
    for name in names:
        write(tmp_path / "lib" / name, f"<{name}>".encode())
    for folder in ("site-packages", "dist-packages", "test", "a/tests", "idlelib"):
        write(tmp_path / "lib" / folder / "x.py", b"not wanted")
    write(tmp_path / "lib" / "a.txt", b"not wanted")
    monkeypatch.setattr(corpus.sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.get)
    order = sorted(names, key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    found = load_corpus("python")
    assert found.val.tobytes() == f"<{order[0]}><{order[20]}><{order[40]}>".encode()
    train = order[1:20] + order[21:40] + order[41:]
    assert found.train.tobytes() == "".join(f"<{name}>" for name in train).encode()


def test_python_is_megabytes_of_source_here_too():
    """About 11 MB; source code takes gzip about 2 bits per byte."""
    found = load_corpus("python")
    assert 4e6 < len(found.train) < 3e7 and 0.02 < len(found.val) / len(found.train) < 0.15
    assert 1.5 < compressed_bpb(found.val[:100_000])["gzip -9"] < 2.5


class Handler(BaseHTTPRequestHandler):
    """Serves server.body and breaks off after server.limit bytes; without a body, 404."""
    def do_GET(self):
        self.server.asked += 1
        if self.server.body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[:self.server.limit])

    def log_message(self, *rest):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine in the place of both download sites."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.asked, server.limit = PAYLOAD, 0, None
    for name, item in corpus.DOWNLOADS.items():
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setitem(corpus.DOWNLOADS, name, item._replace(url=url, sha256=SHA256))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def zipped(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", data)
    return out.getvalue()


def test_enwik8_is_downloaded_once_unzipped_and_split_90_5_5(server, tmp_path):
    server.body = zipped(PAYLOAD)
    n = len(PAYLOAD)
    for _ in range(2):
        found = load_corpus("enwik8", tmp_path)
        assert found.train.tobytes() == PAYLOAD[:n * 90 // 100]
        assert found.val.tobytes() == PAYLOAD[n * 90 // 100:n * 95 // 100]
    assert server.asked == 1 and os.listdir(tmp_path) == ["enwik8"]


def test_a_failed_download_is_told_and_leaves_nothing(server, tmp_path):
    """It breaks off, the page is gone, there is no network: the error says where to put a file."""
    server.limit = 70_001
    assert "broke off 130,002 bytes before the end" in failure("shakespeare", tmp_path)
    server.limit = server.body = None
    message = failure("shakespeare", tmp_path)
    assert "404" in message and corpus.DOWNLOADS["shakespeare"].url in message
    assert os.listdir(tmp_path) == []
    server.body = PAYLOAD
    assert "cannot write" in failure("shakespeare", write(tmp_path / "file", b"no folder"))
    assert both(load_corpus("shakespeare", tmp_path)) == PAYLOAD
    server.shutdown()
    server.server_close()
    places = f"{tmp_path / 'enwik8'} or {tmp_path / 'enwik8.zip'}"
    assert f"by hand at {places}" in failure("enwik8", tmp_path)


def test_wrong_bytes_are_refused_with_both_digests_and_not_kept(server, tmp_path):
    server.body = zipped(b"other bytes")
    message = failure("enwik8", tmp_path)
    assert SHA256 in message and hashlib.sha256(b"other bytes").hexdigest() in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form, data, right", [
    ("enwik8", PAYLOAD, True), ("enwik8.zip", zipped(PAYLOAD), True),
    ("enwik8", PAYLOAD[:-1], False), ("enwik8.zip", zipped(PAYLOAD)[:99_999], False),
    ("enwik8.zip", zipped(PAYLOAD)[:36] + b"\7" + zipped(PAYLOAD)[37:], False),
], ids=["file", "zip", "short", "cut", "damaged"])
def test_a_file_put_there_by_hand_is_checked_and_kept_and_needs_no_network(server, tmp_path, form, data, right):
    write(tmp_path / form, data)
    if right:
        assert both(load_corpus("enwik8", tmp_path)) == PAYLOAD[:len(PAYLOAD) * 95 // 100]
    else:
        assert SHA256 in (message := failure("enwik8", tmp_path)) and "replace that file" in message
        assert os.listdir(tmp_path) == [form]
    assert server.asked == 0 and (tmp_path / form).read_bytes() == data


def test_windows_are_consecutive_bytes_and_a_pure_function_of_seed_and_place(tmp_path):
    """And ordinary writable arrays, where the data is a mapped file."""
    data = load_corpus(str(write(tmp_path / "f", bytes(range(256)))), tmp_path).train
    first = windows(data, 7, 5, seed=3, first=55)
    assert first.shape == (5, 7) and first.dtype == np.int64 and (np.diff(first) == 1).all()
    for seed, place in ((3, 60), (4, 55), (5, 55)):
        assert (windows(data, 7, 5, seed, place) != first).any()
    assert (windows(data, 7, 5, 3, 55) == first).all()  # no epoch of this seed is held any more
    assert type(first) is np.ndarray and first.flags.writeable and not data.flags.writeable


def test_an_epoch_of_windows_makes_no_byte_a_target_twice():
    data = np.arange(251, dtype=np.uint8)  # 41 windows of 6 targets fit, 40 are read, so that the offset has room
    for epoch in range(3):
        targets = np.concatenate([windows(data, 7, 5, 3, 5 * step)[:, 1:].ravel()
                                  for step in range(8 * epoch, 8 * epoch + 8)])
        assert len(set(targets.tolist())) == len(targets) == 240 and targets.max() - targets.min() == 239
    first = [windows(data, 7, 40, 3, 40 * step)[:, 0] for step in range(3)]
    assert len({tuple(f) for f in first}) == 3 and all((f != np.sort(f)).any() for f in first)


def test_windows_reach_the_first_and_the_last_byte():
    data = np.arange(11, dtype=np.uint8)
    starts = {int(start) for step in range(20) for start in windows(data, 7, 5, 0, 5 * step)[:, 0]}
    assert starts == {0, 1, 2, 3, 4}
    assert (windows(data, 11, 2, seed=0, first=0) == data).all()
    with pytest.raises(UserError, match="has 11 bytes, but one window needs 12; lower --seq_len"):
        windows(data, 12, 1, seed=0, first=0)


def test_compressors_find_eight_bits_in_noise_and_almost_none_in_zeros(monkeypatch):
    """A Python built without xz has the other figures."""
    noise = compressed_bpb(np.frombuffer(PAYLOAD[:50_000], np.uint8))
    assert list(noise) == ["gzip -9", "bz2 -9", "xz -9"]
    assert all(8 <= bpb < 8.1 for bpb in noise.values())
    assert all(0 < bpb < 0.02 for bpb in compressed_bpb(np.zeros(100_003, np.uint8)).values())
    monkeypatch.setitem(corpus.importlib.sys.modules, "lzma", None)
    assert list(compressed_bpb(np.zeros(100, np.uint8))) == ["gzip -9", "bz2 -9"]
