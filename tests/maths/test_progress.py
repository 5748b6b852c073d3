"""The progress bar of builds."""

from __future__ import annotations

import sys

import pytest

from fibkv.progress import silent, terminal_progress


def test_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress("building") as progress:
        progress(1, 2, "note")
        assert progress is silent
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal_progress("building a book") as progress:
        progress(1, 4, "restart 1")
        progress(4, 4, "refining the best")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "building a book" in shown.err
    assert "refining the best" in shown.err
