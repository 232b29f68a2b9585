"""A bench goes on where it was cut off, and measures again what was measured with other settings."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import rows
from rows import CommandError, Entry, Measurement, Store, chosen, code_digest, codes, measure_all


def store_in(directory: Path) -> Store:
    return Store(directory, "toy", lambda entry: (entry["row"], entry["seed"]), lambda store: sorted(f"{key}" for key in store.entries))


def wanted(calls: list[str], settings: str = "one", fails: str = "") -> list[Measurement]:
    def measure(row: str) -> Entry:
        calls.append(row)
        if row == fails:
            raise CommandError(f"{row} failed")
        return {"row": row, "seed": 0, "value": len(calls)}

    return [Measurement(row, 0, (row, 0), settings, lambda row=row: measure(row), str) for row in ("a", "b", "c")]


def options(**given: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"list": False, "table": False, "again": False, **given})


def test_what_is_there_is_not_measured_again_unless_settings_changed_or_it_is_asked_for(tmp_path: Path) -> None:
    calls: list[str] = []
    assert measure_all(wanted(calls), store_in(tmp_path), options()) == 0
    assert measure_all(wanted(calls), store_in(tmp_path), options()) == 0
    assert calls == ["a", "b", "c"]
    measure_all(wanted(calls, settings="other"), store_in(tmp_path), options())
    measure_all(wanted(calls, settings="other"), store_in(tmp_path), options(again=True))
    assert calls == ["a", "b", "c"] * 3
    assert store_in(tmp_path).entries["a", 0]["value"] == 7  # the newest counts


def test_a_command_that_fails_leaves_the_others_to_be_measured_and_is_made_up_for_later(tmp_path: Path) -> None:
    calls: list[str] = []
    assert measure_all(wanted(calls, fails="b"), store_in(tmp_path), options()) == 1
    assert (tmp_path / "toy.md").read_text() == "('a', 0)\n('c', 0)\n"
    assert measure_all(wanted(calls), store_in(tmp_path), options()) == 0
    assert calls == ["a", "b", "c", "b"]


def test_a_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_all(wanted([]), store_in(tmp_path), options())
    with (tmp_path / "toy.jsonl").open("a") as file:
        file.write('{"row": "a", "se')
    store = store_in(tmp_path)
    assert "cut off" in capsys.readouterr().err
    store.append({"row": "d", "seed": 0})
    assert sorted(store_in(tmp_path).entries) == [("a", 0), ("b", 0), ("c", 0), ("d", 0)]


def test_list_and_table_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    measure_all(wanted(calls), store_in(tmp_path), options(list=True))
    assert capsys.readouterr().out.count("to do") == 3
    measure_all(wanted(calls), store_in(tmp_path), options(table=True))
    assert not calls


def test_code_goes_by_another_name_once_a_file_of_it_changes_or_moves(tmp_path: Path) -> None:
    names = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("c.txt", "2")):
        (tmp_path / name).write_text(text)
        names.append(code_digest(tmp_path))
    assert len(set(names)) == 3
    assert names[2] == names[3]


def test_every_measurement_says_of_which_code_it_is_and_the_list_which_are_of_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_all(wanted([])[:2], store_in(tmp_path), options())
    entry = store_in(tmp_path).entries["a", 0]
    assert entry["code"] == code_digest()
    store_in(tmp_path).append({name: value for name, value in entry.items() if name != "code"})  # as it was written before
    monkeypatch.setattr(rows, "code_digest", lambda: "0123abcd")
    capsys.readouterr()
    measure_all(wanted([]), store_in(tmp_path), options(list=True))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "a seed 0: done, of other code (unknown, today 0123abcd)",
        f"b seed 0: done, of other code ({entry['code']}, today 0123abcd)",
        "c seed 0: to do",
    ]
    assert codes([{}, {"code": "a"}, {"code": "b"}, {"code": "a"}]) == "unknown, a, b"


def test_a_pattern_without_a_row_ends_with_code_2() -> None:
    assert chosen(["x/a", "x/b", "y/a"], ["x/*"]) == ["x/a", "x/b"]
    with pytest.raises(SystemExit) as ended:
        chosen(["x/a"], ["z*"])
    assert ended.value.code == 2
