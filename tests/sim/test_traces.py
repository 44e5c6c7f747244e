"""The four trace formats, their defaults, and what is refused with a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.core.types import PriorityClass
from serve_app.sim.traces import TraceDefaults, TraceError, read_trace


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_the_projects_own_format_with_all_columns(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "arrival_s,tenant,class,prompt_tokens,output_tokens,prefix_hashes\n"
        "0.5,acme,critical,100,20,1;2;3\n"
        "1.0,acme,sheddable,64,5,\n",
    )
    first, second = read_trace(file, TraceDefaults())
    assert (first.arrival_s, first.tenant, first.priority_class) == (
        0.5,
        "acme",
        PriorityClass.CRITICAL,
    )
    assert (first.prompt_tokens, first.output_tokens, first.prefix_hashes) == (100, 20, (1, 2, 3))
    assert (second.priority_class, second.prefix_hashes) == (PriorityClass.SHEDDABLE, ())


def test_hashes_past_the_prompt_are_dropped(tmp_path: Path) -> None:
    file = write(tmp_path, "arrival_s,prompt_tokens,prefix_hashes\n0,40,1 2 3 4\n")
    (only,) = read_trace(file, TraceDefaults(segment_tokens=16))
    assert only.prefix_hashes == (1, 2)


def test_missing_columns_get_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "arrival_s\n" + "".join(f"{second}\n" for second in range(300)))
    defaults = TraceDefaults(
        tenants=("a", "b", "c"),
        classes={PriorityClass.CRITICAL: 1, PriorityClass.STANDARD: 1},
        time_scale=0.5,
    )
    drawn = list(read_trace(file, defaults))
    assert [each.tenant for each in drawn[:4]] == ["a", "b", "c", "a"]
    assert drawn[-1].arrival_s == pytest.approx(149.5)
    classes = {each.priority_class for each in drawn}
    assert classes == {PriorityClass.CRITICAL, PriorityClass.STANDARD}
    assert drawn == list(read_trace(file, defaults))


def test_an_azure_trace_starts_at_zero(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n",
    )
    first, second = read_trace(file, TraceDefaults())
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_a_trace_of_lengths(tmp_path: Path) -> None:
    file = write(tmp_path, "timestamp_ms,prompt_tokens,output_tokens\n6011,178,8\n")
    (only,) = read_trace(file, TraceDefaults())
    assert (only.arrival_s, only.prompt_tokens, only.output_tokens) == (6.011, 178, 8)


def test_a_mooncake_trace_names_512_token_segments(tmp_path: Path) -> None:
    line = '{"timestamp": 3000, "input_length": 1500, "output_length": 7, "hash_ids": [4, 5, 6]}\n'
    (only,) = read_trace(write(tmp_path, line, "trace.jsonl"), TraceDefaults())
    assert (only.arrival_s, only.prefix_hashes) == (3.0, (4, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no known trace"),
        ("a,b\n1,2\n", "no known trace"),
        ("arrival_s\nsoon\n", "row 1"),
        ("arrival_s\nnan\n", "row 1"),
        ("arrival_s\n-1\n", "row 1"),
        ("arrival_s\n2\n1\n", "row 2: earlier"),
        ("arrival_s,class\n0,gold\n", "'gold' is none of: critical, standard, sheddable"),
        ("arrival_s,prompt_tokens\n0,-4\n", "prompt_tokens is -4"),
        ("arrival_s,prompt_tokens\n0,99999999999\n", "prompt_tokens is 99999999999"),
        ("arrival_s,prompt_tokens,prefix_hashes\n0,64,one\n", "row 1"),
        ('{"timestamp": 1}\n', "row 1: 'input_length' is missing"),
        ("arrival_s,prompt_tokens\n0,many\n", "prompt_tokens is 'many'; it must be a whole"),
        ("timestamp_ms,prompt_tokens,output_tokens\n1,1,-1\n", "output_tokens is -1"),
        ("{broken\n", "not JSON"),
        ("[1]\n", "no known trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "row 1"),
    ],
)
def test_bad_traces_are_refused_with_place_and_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        list(read_trace(write(tmp_path, text), TraceDefaults()))


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent\.csv"):
        list(read_trace(tmp_path / "absent.csv", TraceDefaults()))
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(TraceError, match=r"binary\.csv"):
        list(read_trace(binary, TraceDefaults()))
