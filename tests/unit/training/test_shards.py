"""Pieces of parameters that some ranks wrote and others read; answers that some had drawn ahead and others go on with."""

import pytest
import torch
from torch.testing import assert_close

from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.training.rank_state import dealt_anew
from calibtrain.training.shards import Piece, Shards, Whole, write_shard

WHOLE = torch.arange(10.0).view(2, 5)


def write(folder, cuts, wholes=()):
    """The ten elements, cut so, a rank a piece."""
    folder.mkdir()
    flat = WHOLE.view(-1)
    for rank, (start, stop) in enumerate(cuts):
        tensors = {"weight": flat[start:stop], "exp_avg": -flat[start:stop]}  # views of one tensor
        write_shard(
            folder, rank, len(cuts), [Piece("a.b", (2, 5), start, tensors, {"step": 4.0})], wholes, {"stage": 3}
        )
    return folder


@pytest.mark.parametrize("cuts", [[(0, 10)], [(0, 3), (3, 7), (7, 10)], [(0, 6), (4, 10)]])
def test_any_part_comes_out_of_any_cut(tmp_path, cuts):
    with Shards(write(tmp_path / "engine", cuts)) as shards:
        assert (shards.shapes, shards.scalars, shards.facts) == ({"a.b": (2, 5)}, {"a.b": {"step": 4.0}}, {"stage": 3})
        assert shards.keys == {"a.b": {"weight", "exp_avg"}}
        assert_close(shards.full("a.b", "weight"), WHOLE, rtol=0, atol=0)
        for start in range(10):
            for stop in range(start, 11):
                into = torch.full((stop - start,), 99.0)
                shards.read("a.b", "exp_avg", start, into)
                assert_close(into, -WHOLE.view(-1)[start:stop], rtol=0, atol=0)


def test_what_is_missing_is_told(tmp_path):
    folder = write(tmp_path / "engine", [(0, 4), (6, 10)])
    with Shards(folder) as shards, pytest.raises(UserError, match=r"no elements 4 to 10 of a.b \(weight\)"):
        shards.read("a.b", "weight", 0, torch.zeros(10))
    (folder / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match="holds 1 of 2 files"), Shards(folder):
        pass
    (folder / "rank-00000.safetensors").write_bytes(b"none of ours")
    with pytest.raises(UserError, match="cannot be read"), Shards(folder):
        pass
    with pytest.raises(UserError, match="holds 0 of some files"), Shards(tmp_path / "nothing"):
        pass


def test_what_cannot_be_cut_is_found_by_its_layout_alone(tmp_path):
    shared = torch.arange(3)
    wholes = [
        Whole(f"a.b[{i}:5]@0", ("a.b",), {"codes": shared, "scales": torch.ones(2)}, {"step": 3}) for i in range(2)
    ]
    with Shards(write(tmp_path / "engine", [(0, 10)], wholes)) as shards:
        tensors, scalars = shards.whole("a.b[1:5]@0")
        assert scalars == {"step": 3}
        assert tensors.keys() == {"codes", "scales"}
        assert torch.equal(tensors["codes"], shared)
        assert shards.whole("a.b[0:10]@0") is None
        assert shards.uncut == {"a.b"}


def test_answers_drawn_ahead_are_dealt_to_other_ranks():
    """Five questions of two ranks, the last one asked twice, so that both make as many passes."""
    parts = [
        {
            "asked": [7, 8, 9],
            "streams": ["0.0", "0.1", "0.2"],
            "groups": [["a"], ["b"], ["c"]],
            "step": 4,
            "version": 2,
        },
        {
            "asked": [5, 6, 6],
            "streams": ["0.3", "0.10", "0.10"],
            "groups": [["d"], ["e"], ["e"]],
            "step": 4,
            "version": 2,
        },
    ]
    found = [dealt_anew(parts, World(rank, 4, 0, torch.device("cpu"))) for rank in range(4)]
    assert [one["asked"] for one in found] == [[7, 8], [9, 5], [6, 6], [6, 6]]
    assert [one["streams"] for one in found] == [["0.0", "0.1"], ["0.2", "0.3"], ["0.10", "0.10"], ["0.10", "0.10"]]
    assert [one["groups"] for one in found] == [[["a"], ["b"]], [["c"], ["d"]], [["e"], ["e"]], [["e"], ["e"]]]
    assert all((one["step"], one["version"]) == (4, 2) for one in found)
    alone = dealt_anew(parts, World(0, 1, 0, torch.device("cpu")))
    assert alone["asked"] == [7, 8, 9, 5, 6]
