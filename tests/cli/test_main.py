"""Exit codes, one-line errors, and verbs that start without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.cli import main as cli
from featherweight.errors import BudgetError, DataError, FeatherweightError, MissingExtraError, UsageError

VERBS = ("fit", "evaluate", "predict", "compile", "list", "show", "systems", "doctor", "new", "reproduce")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FeatherweightError("x"), 1),
        (UsageError("x"), 2),
        (DataError("x"), 3),
        (BudgetError("x"), 4),
        (MissingExtraError("x"), 5),
        (ValueError("two\nlines"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_invoke", fail)
    assert cli.main(["list"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("featherweight: ")


def test_debug_prints_the_traceback_wherever_it_stands(capsys):
    assert cli.main(["show", "nosuch", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["list", "--nosuch"], ["predict"], ["predict", "a", "b", "--top", "x"]]
)
def test_usage_errors_are_one_line_with_the_place_to_look(capsys, words):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--help" in error


def test_version_and_bare_call(capsys):
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("featherweight ") and "reproduce" in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_documented_and_has_json(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--json" in printed


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["show", "simplenet"], ["systems"], ["doctor", "--quick"]]
)
def test_starts_without_torch(words):
    done = run(
        f"import sys; from featherweight.cli.main import main; main({words}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_package_imports_without_torch_and_lists_its_names():
    done = run(
        "import sys, featherweight as f; print(len(dir(f)), f.list_models); sys.exit('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    import featherweight

    for name in featherweight.__all__:
        assert getattr(featherweight, name) is not None
    with pytest.raises(AttributeError):
        featherweight.nosuch  # noqa: B018


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from featherweight.cli.main import main; sys.exit(main(['systems', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0


def test_exit_code_reaches_the_shell():
    done = run(
        "import sys; from featherweight.cli.main import main; sys.exit(main(['predict', 'nowhere', 'a.png']))"
    )
    assert done.returncode == 3 and done.stdout == "" and "nowhere" in done.stderr


def test_list_filters_and_prints_json(capsys):
    assert cli.main(["list", "simplenet", "--max-params", "1M", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["params"] <= 1_000_000 for row in rows)


def test_systems_file_is_up_to_date(capsys):
    root = Path(__file__).resolve().parents[2]
    assert cli.main(["systems", "--markdown"]) == 0
    expected = capsys.readouterr().out
    assert (root / "SYSTEMS.md").read_text(encoding="utf-8") == expected, (
        "Run: featherweight systems --markdown > SYSTEMS.md"
    )
