import json
import re
import tracemalloc

import pytest

from blockcache.errors import BlockCacheError
from blockcache.pipelines.generate.names import stem_for
from blockcache.pipelines.generate.prompts import BadRow, Prompts
from blockcache.pipelines.generate.settings import Row


@pytest.fixture
def read(tmp_path):
    """`read("a.txt", bytes)`: the rows of a file with these contents."""

    def read(name: str, content: bytes) -> list[Row | BadRow]:
        (tmp_path / name).write_bytes(content)
        return list(Prompts(tmp_path / name).rows())

    return read


def test_text_with_bom_crlf_emoji_and_blank_lines(read):
    long = "wörd " * 2000
    text = f"\ufeffa lighthouse\r\n\r\n   \n🙂 in the rain \u2028 here\n{long}\nno end of line"
    rows = read("p.txt", text.encode())
    assert [row.prompt for row in rows] == [
        "a lighthouse",
        "🙂 in the rain \u2028 here",
        long.strip(),
        "no end of line",
    ]
    assert [row.line for row in rows] == [1, 4, 5, 6]
    assert [row.id for row in rows] == ["000000", "000001", "000002", "000003"]


def test_json_rows_take_settings_under_either_name(read):
    lines = [
        {
            "prompt": "a",
            "id": 7,
            "seed": 5,
            "steps": 9,
            "guidance": 2,
            "height": 64,
            "plan": "fast",
        },
        {"prompt": "b", "num_inference_steps": 3, "guidance_scale": 1.5, "num_frames": 9},
        {"prompt": "c", "negative_prompt": "d", "seed": None},
    ]
    rows = read("p.jsonl", "\n\n".join(map(json.dumps, lines)).encode())
    assert (rows[0].id, rows[0].seed, rows[0].plan) == ("7", 5, "fast")
    assert rows[0].call() == {"num_inference_steps": 9, "guidance_scale": 2.0, "height": 64}
    assert rows[1].call() == {"num_inference_steps": 3, "guidance_scale": 1.5, "num_frames": 9}
    assert rows[2].call() == {"negative_prompt": "d"} and rows[2].seed is None
    assert [row.line for row in rows] == [1, 3, 5]


def test_csv_with_quotes_empty_cells_and_a_prompt_of_two_lines(read):
    text = '\ufeffid,prompt,seed,steps\r\nx,"a, ""b""",3,\r\n,,,\r\ny,"two\nlines",,8\r\n'
    rows = read("p.csv", text.encode())
    assert [(r.id, r.prompt, r.seed, r.steps) for r in rows] == [
        ("x", 'a, "b"', 3, None),
        ("y", "two\nlines", None, 8),
    ]


BAD_LINES = {
    "no json": (b'{"prompt": "a"', "no valid JSON"),
    "a list": (b'["a"]', "expected an object, found list"),
    "a number": (b"7", "expected an object, found int"),
    "no prompt": (b'{"id": "x"}', "prompt is missing"),
    "empty prompt": (b'{"prompt": ""}', "prompt: "),
    "unknown name": (b'{"prompt": "a", "sede": 3}', "unknown name 'sede' .known: seed, steps"),
    "our own name": (b'{"prompt": "a", "line": 3}', "unknown name 'line'"),
    "seed in words": (b'{"prompt": "a", "seed": "x"}', "seed: .*found 'x'"),
    "seed below zero": (b'{"prompt": "a", "seed": -1}', "seed: .*found -1"),
    "zero steps": (b'{"prompt": "a", "steps": 0}', "steps: .*found 0"),
    "size of half a pixel": (b'{"prompt": "a", "width": 0.5}', "width: "),
    "guidance nan": (b'{"prompt": "a", "guidance": NaN}', "guidance: "),
    "a lone surrogate": (b'{"prompt": "\\ud83d"}', "prompt: "),
    "an empty id": (b'{"prompt": "a", "id": ""}', "id: "),
    "no utf-8": (b'{"prompt": "\xff"}', "no UTF-8 text at byte 12"),
    "a megabyte": (b'{"prompt": "' + b"a" * 2**20 + b'"}', "longer than 1 MiB"),
    "a prompt of 70 KiB": (b'{"prompt": "' + b"a" * 70_000 + b'"}', "longer than 64 KiB"),
    "deep": (b"[" * 100_000, "no valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_moves_no_other_row(read, case):
    line, message = BAD_LINES[case]
    good = b'{"prompt": "good"}\n'
    first, bad, last = read("p.jsonl", good + line + b"\n" + good)
    assert (bad.number, bad.line) == (1, 2)
    assert re.search(message, bad.why), bad.why
    assert len(bad.why) < 400
    assert (first.number, last.number, last.id, last.line) == (0, 2, "000002", 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"promt,seed\na,1\n", "line 1: expected columns of .* found 'promt', 'seed'"),
        ("p.csv", b"a lighthouse\n", "line 1: expected columns"),
        ("p.csv", b"", "found nothing"),
        ("p.txt", "a".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("p.json", b"[]", "expected a .txt, .jsonl, .csv file"),
    ],
)
def test_a_file_of_another_kind_is_refused(read, name, content, message):
    with pytest.raises(BlockCacheError, match=message):
        read(name, content)


def test_bad_csv_lines_are_named(read):
    rows = read("p.csv", b'prompt,seed\na,1\nb,2,3\n"c" d,4\ne,x\n')
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, BadRow]
    assert [row.line for row in rows] == [2, 3, 4, 5]
    assert "more than 2 columns" in rows[1].why and "no valid CSV" in rows[2].why


@pytest.mark.parametrize("name", ["none.txt", "."])
def test_no_file_is_refused(tmp_path, name):
    with pytest.raises(
        BlockCacheError, match="cannot read prompts from .*found (nothing|a folder)"
    ):
        Prompts(tmp_path / name)


def test_rows_stream(tmp_path):
    """Rows that were read are gone: twenty thousand of them hold less than 30 bytes each."""
    path = tmp_path / "p.txt"
    path.write_text("a prompt of some length, as they come\n" * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in Prompts(path).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 2**19


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "nul\0byte",
    "new\nline",
    "CON",
    "nul.png",
    "Com1",
    "x" * 300,
    "-rf",
    "ends.",
    "emoji 🙂",
    "~",
    "a~b",
    " ",
    "％2e",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_id_gives_a_harmless_name(name):
    stem = stem_for(name)
    assert stem != name and len(stem) <= 70 and stem.isascii()
    assert not set(stem) & set('/\\\0\n\r\t :*?"<>|%#&') and not stem.startswith((".", "-"))


def test_names_are_the_ids_where_they_can_be_and_never_shared():
    plain = ["000007", "cat", "IMG_20.3", "a-b"]
    assert [stem_for(name) for name in plain] == plain
    close = ["a?b", "a:b", "a b", "a-b", "../a-b", "a/b "]
    assert len({stem_for(name) for name in [*HOSTILE, *close]}) == len(HOSTILE) + len(close)
