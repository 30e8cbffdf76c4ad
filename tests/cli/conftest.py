"""The command as its users call it, within the test's process."""

import sys

import pytest

from modeling_coca.cli import main


@pytest.fixture
def coca(model_folder, monkeypatch, capsys):
    """`coca("caption", "a.png")` -> exit code, stdout, stderr. The model is in the environment."""
    monkeypatch.setenv("COCA_MODEL", str(model_folder))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["coca", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        code = exit_info.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return run
