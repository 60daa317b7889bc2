import json

import pytest

from blockcache.errors import BlockCacheError
from blockcache.pipelines.generate import claims, manifest
from blockcache.pipelines.generate.claims import BAD, DONE, FAILED, TODO, Claims

JOB = "0" * 32


def take_and_hold(path, taken, go):
    """A process that claims one row and then waits."""
    book = Claims(path)
    book.enter(JOB, lambda: TODO * 5)
    taken.put(book.take())
    go.get()


@pytest.fixture
def book(tmp_path):
    """Six rows of which one is done and one is bad."""
    book = Claims(tmp_path / "state")
    book.enter(JOB, lambda: TODO + DONE + TODO * 2 + BAD + TODO)
    yield book
    book.close()


def test_rows_are_handed_out_in_order_and_once(book):
    assert [book.take() for _ in range(5)] == [0, 2, 3, 5, None]
    book.settle(2, FAILED)
    book.settle(0, DONE)
    assert book.take() is None
    assert book.count() == {TODO: 2, DONE: 2, FAILED: 1, BAD: 1}


def test_stop_is_for_everybody(book):
    book.stop()
    assert book.take() is None and book.is_stopped()


def test_a_folder_is_used_once_per_process(book):
    with pytest.raises(BlockCacheError, match="this process is already generating into"):
        Claims(book.path)


def test_another_process_gets_other_rows_and_its_death_frees_them(children, tmp_path):
    taken, go = children.Queue(), children.Queue()
    path = tmp_path / "state"
    other = children.Process(target=take_and_hold, args=(path, taken, go))
    other.start()
    assert taken.get(timeout=60) == 0
    book = Claims(path)
    book.enter(JOB, lambda: pytest.fail("we are not the first"))
    assert [book.take() for _ in range(5)] == [1, 2, 3, 4, None]
    with book.leaving() as is_last:
        assert not is_last
    book.close()
    # Whoever brings another job is turned away while the first one is worked on.
    book = Claims(path)
    with pytest.raises(BlockCacheError, match="another run with other prompts or settings"):
        book.enter("1" * 32, lambda: pytest.fail("we are not the first"))
    book.close()
    book = Claims(path)
    book.enter(JOB, lambda: pytest.fail("we are not the first"))
    other.kill()
    other.join()
    assert book.take() == 0
    with book.leaving() as is_last:
        assert is_last
    book.close()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(claims.errno.ENOLCK, "No locks available")

    book = Claims(tmp_path / "state")
    monkeypatch.setattr(claims.fcntl, "lockf", no_locks)
    with pytest.raises(BlockCacheError, match="has no locks .*NFS 4 or a local disk"):
        book.enter(JOB, bytes)
    book.close()


# ---- the manifest -------------------------------------------------------------------------------


def line(name: str, row: int, finished: float, **more: object) -> dict[str, object]:
    known = {"status": "done", "file": f"items/{name}.png", "settings_hash": "h"}
    return {"id": name, "row": row, "finished": finished, **known, **more}


def test_half_a_line_is_left_out_and_what_follows_is_whole(tmp_path):
    """A process killed in mid-write, and a later one of the same number going on in its file."""
    part = manifest.Part(tmp_path, 0)
    part.append(line("a", 0, 1.0))
    part.close()
    (path,) = manifest.files(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"id": "b", "row": 1, "sta')
    part = manifest.Part(tmp_path, 0)
    part.append(line("c", 2, 2.0))
    part.close()
    assert [row["id"] for row in manifest.rows(path)] == ["a", "c"]
    merged = manifest.merge(tmp_path)
    assert [row["id"] for row in manifest.rows(merged)] == ["a", "c"]
    assert manifest.files(tmp_path) == [merged] and b"sta" not in merged.read_bytes()[-30:]


def test_merging_keeps_the_last_line_of_an_id_in_the_order_of_the_rows(tmp_path):
    (tmp_path / "parts").mkdir()
    for rank, lines in enumerate(
        [
            [line("b", 1, 5.0), line("c", 2, 6.0, status="failed", file=None)],
            [line("a", 0, 9.0), line("c", 2, 7.0, note="later ✓")],
        ]
    ):
        part = manifest.Part(tmp_path, rank)
        for row in lines:
            part.append(row)
        part.close()
    manifest.merge(tmp_path)
    rows = list(manifest.rows(manifest.merge(tmp_path)))
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["note"] == "later ✓" and rows[2]["status"] == "done"


def test_done_is_what_has_its_file_and_its_settings(tmp_path):
    (tmp_path / "items").mkdir()
    for name in "ac":
        (tmp_path / "items" / f"{name}.png").touch()
    part = manifest.Part(tmp_path, 0)
    for row in (line("a", 0, 1.0), line("b", 1, 1.0), line("c", 2, 1.0, status="failed")):
        part.append(row)
    part.close()
    assert [row["id"] for row in manifest.done(tmp_path)] == ["a"]
    assert manifest.key_of("a", "h") != manifest.key_of("a", "g")
    assert not list(manifest.done(tmp_path / "none"))


def test_what_is_no_row_is_left_out(tmp_path):
    """A manifest that somebody edited, or that a broken disk gave back."""
    good = line("a", 0, 1.0)
    bad = [{**good, "row": "x"}, {**good, "finished": None}, {**good, "id": 3}, {"id": "a"}, [good]]
    text = "\n".join([*map(json.dumps, bad), "", "[" * 10_000, json.dumps(good)])
    (tmp_path / "manifest.jsonl").write_bytes(text.encode() + b"\n\xff\x00\n")
    assert [json.loads(found) for found in manifest.latest(tmp_path)] == [good]


def test_a_part_is_newer_than_what_is_merged_whatever_the_clocks_say(tmp_path):
    """The machine that rendered it anew may be an hour behind."""
    for name, finished in (("old", 9e9), ("new", 1.0)):
        part = manifest.Part(tmp_path, 0)
        part.append(line("a", 0, finished, note=name))
        part.close()
        manifest.merge(tmp_path)
    assert [row["note"] for row in manifest.rows(tmp_path / "manifest.jsonl")] == ["new"]


def test_hundreds_of_parts_are_merged_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_MOST_OPEN", 2)
    (tmp_path / "parts").mkdir()
    for rank in range(5):
        rows = [line(f"{rank}-{i}", 5 * i + rank, 1.0) for i in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "parts" / f"rank-{rank}.jsonl").write_text(text)
    merged = manifest.merge(tmp_path)
    assert [row["row"] for row in manifest.rows(merged)] == list(range(15))
