"""Functions that the config names."""

import sys

import pytest

from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from calibtrain.tasks.imported import described, load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules of the user's; the path and the loaded modules are put back."""
    (tmp_path / "own_graders.py").write_text(
        "class Of:\n    @staticmethod\n    def it(a):\n        return a\nBOUND = 3\n"
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_needs.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "json.py").write_text("dumps = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    yield tmp_path
    for name in ("own_graders", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


def test_functions_of_the_working_directory_and_of_packages_are_found(here):
    assert load_function("own_graders:Of.it", "task.grader")(5) == 5
    assert load_function("json:dumps", "task.grader")([1]) == "[1]"  # the library's, which a file here does not hide
    assert load_function("os.path:basename", "task.grader")("a/b") == "b"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_graders", "is no package.module:function"),
        ("own_graders:", "is no package.module:function"),
        ("../own_graders:f", "is no package.module:function"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("own_graders.inner:f", "task.grader"),
        ("own_graders:absent", "own_graders.py) has no function 'absent'"),
        ("own_graders:BOUND", "is int, which cannot be called"),
        ("own_broken:f", r"importing own_broken fails (ZeroDivisionError"),
        ("own_needs:f", "importing own_needs fails (ModuleNotFoundError: No module named 'no_such_package_at_all'"),
    ],
)
def test_what_is_no_function_is_told_in_one_line(here, path, words):
    with pytest.raises(UserError) as found:
        load_function(path, "task.grader")
    assert words in str(found.value)
    assert str(found.value).startswith("task.grader: ")
    assert "\n" not in str(found.value)


def test_a_question_is_described_in_plain_values():
    prompt = (Message("system", "Be short."), Message("user", "Where is Osaka?"))
    told = described(Record(prompt, accepted=("Japan",), strata={"topic": "geo"}, fields={"row": {"a": 1}}, name="q7"))
    assert told == {
        "question": "Where is Osaka?",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is Osaka?"}],
        "accepted": ["Japan"],
        "options": [],
        "context": [],
        "fields": {"row": {"a": 1}},
        "strata": {"topic": "geo"},
        "id": "q7",
    }
