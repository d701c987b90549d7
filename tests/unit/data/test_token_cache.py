"""Sequences on disk are the sequences in memory, whole or not there, and made once."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import pytest

from calibtrain.data.drops import DropReport
from calibtrain.data.encode import AT_ONCE, _example, encode_each, encode_records
from calibtrain.data.templates import Template
from calibtrain.data.token_cache import FILES, make_cache, open_cache
from calibtrain.errors import UserError
from calibtrain.records import Message, Record
from tests.tiny import tiny_tokenizer

LENGTH = 40


def records(count=12):
    """Questions and answers, one too long, one that is not said, one conversation, one text."""
    found = [
        Record(
            (Message("user", f"Which is {i}? é"),),
            chosen=f" {i} \u2028x",
            rejected=f"{-i}",
            weight=1 + i / 3,
            origin=f"f:{i}",
        )
        for i in range(count)
    ]
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Say 1."))
    return [
        *found,
        Record((Message("user", "Why?"),), chosen="x " * 60, rejected="y", origin="f:long"),
        Record((Message("user", "Why?"),), chosen="  ", rejected="y", origin="f:blank"),
        Record(turns, chosen="1.", rejected="2", learned=(-3, -1), origin="f:talk"),
        Record((), chosen="as it stands " * 20, origin="f:text"),
    ]


def encoder(pairs, some=None):
    template = Template("chat", tiny_tokenizer())
    return lambda drops: encode_each(some or records(), template, LENGTH, pairs, drops)


@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_read_is_what_was_encoded(tmp_path, pairs):
    drops, kept = DropReport(), DropReport()
    expected = list(encoder(pairs)(drops))
    make_cache(tmp_path / "a", encoder(pairs), strict=False)
    cache = open_cache(tmp_path / "a")
    found = cache.examples(kept=2)
    assert list(found) == expected
    assert found[-1] == expected[-1]
    kept.add(cache.drops)
    assert kept.lines() == drops.lines() != []
    assert kept.unfit == drops.unfit != []
    if not pairs:
        assert any(one.labels for group in expected for one in group)  # a conversation, and windows of a text
        assert max(map(len, expected)) > 1


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("bos", [False, True])
def test_encoding_many_at_once_is_encoding_one_by_one(kind, bos):
    template = Template(kind, tiny_tokenizer(add_bos=bos, split_words=False))
    some = [one for one in records(AT_ONCE + 3) if not (kind == "plain" and len(one.prompt) > 1)]
    for pairs in (False, True):
        apart, together = DropReport(), DropReport()
        one_by_one = [_example(one, i, template, LENGTH, pairs, apart, False, True) for i, one in enumerate(some)]
        assert encode_records(some, template, LENGTH, pairs, together) == [one for one in one_by_one if one is not None]
        assert apart == together


def test_what_is_not_whole_is_not_read_and_made_anew(tmp_path):
    folder = tmp_path / "a"
    for name in (*FILES, "meta.json"):
        make_cache(folder, encoder(False), strict=False)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        assert open_cache(folder) is None
        make_cache(folder, encoder(False), strict=False)
        assert (folder / name).read_bytes() == whole
    (tmp_path / "a.part-dead").mkdir()  # of a run that was killed
    shutil.rmtree(folder)
    make_cache(folder, encoder(False), strict=False)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "a.lock"]


def test_what_ends_encoding_leaves_nothing(tmp_path):
    def stops(drops):
        yield from encoder(False)(drops)
        raise UserError("the template refuses it")

    with pytest.raises(UserError, match="refuses"):
        make_cache(tmp_path / "a", stops, strict=True)
    with pytest.raises(UserError, match="no training record is left"):
        make_cache(tmp_path / "a", encoder(False, [replace(records()[0], chosen=None)]), strict=False)
    assert [one.name for one in tmp_path.iterdir()] == ["a.lock"]


def make(folder, started, said):
    def groups(drops):
        with open(said, "a") as file:
            file.write("made\n")
        started.wait(20)
        return encoder(False)(drops)

    make_cache(folder, groups, strict=False)
    assert len(open_cache(folder)) == len(list(encoder(False)(DropReport())))


def test_of_two_runs_at_once_one_encodes(tmp_path):
    spawn = multiprocessing.get_context("fork")
    started, said = spawn.Event(), tmp_path / "said"
    runs = [spawn.Process(target=make, args=(tmp_path / "a", started, said)) for _ in range(2)]
    for run in runs:
        run.start()
    while not said.exists():
        os.sched_yield()
    started.set()
    for run in runs:
        run.join(30)
        assert run.exitcode == 0
    assert said.read_text() == "made\n"


def test_its_files_close_with_the_last_use_of_it(tmp_path):
    def held():
        return sum(os.path.realpath(one.path).startswith(str(tmp_path)) for one in os.scandir("/proc/self/fd"))

    make_cache(tmp_path / "a", encoder(False), strict=False)
    make_cache(tmp_path / "a", encoder(False), strict=False)  # finds it there
    assert held() == 0
    examples = open_cache(tmp_path / "a").examples(kept=2)
    assert held() > 0
    assert len(examples[0]) > 0
    del examples
    assert held() == 0


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    make_cache(tmp_path / "a", encoder(False), strict=False)
    cache = open_cache(tmp_path / "a")
    os.truncate(tmp_path / "a" / "ids.bin", 8)
    with pytest.raises(OSError, match="has become shorter"):
        cache.read(len(cache) - 1)


def test_the_report_is_plain_json(tmp_path):
    make_cache(tmp_path / "a", encoder(False), strict=False)
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert set(meta) == {"version", "bytes", "drops"}
