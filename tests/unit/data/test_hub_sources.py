"""Data sets of the Hugging Face hub, whole and streamed, and what goes wrong with them."""

import pytest

from calibtrain.config import HubSource
from calibtrain.data.sources import load_records
from calibtrain.errors import UserError


def test_hub_rows_and_limit(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, **options):
        calls.append((name, subset, options))
        return iter({"question": f"q{i}", "answers": ["a"]} for i in range(100))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records(HubSource(kind="hub", name="some/set", subset="main", streaming=True, limit=7))
    assert sorted(record.question for record in records) == [f"q{i}" for i in range(7)]
    assert calls == [("some/set", "main", {"split": "train", "revision": None, "streaming": True})]
    assert {record.origin for record in records} >= {"some/set[train][0]"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'some/set' on the Hub (offline mode)"), "hub cannot be reached"),
        (ValueError('Unknown split "dev". Should be one of'), "no such subset or split"),
        (RuntimeError("boom\nsecond line"), r"cannot be loaded \(RuntimeError: boom\)"),
    ],
)
def test_hub_failures_are_user_errors(monkeypatch, error, message):
    import datasets

    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=message):
        load_records(HubSource(kind="hub", name="some/set"))


def test_hub_set_not_found(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*args, **options):
        raise DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="no such data set"):
        load_records(HubSource(kind="hub", name="some/set"))


def test_a_stream_that_breaks_midway_is_a_user_error(monkeypatch):
    import datasets

    def rows():
        yield {"question": "q", "answers": "a"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    with pytest.raises(UserError, match="connection reset"):
        load_records(HubSource(kind="hub", name="some/set"))
