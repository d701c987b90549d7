"""Evaluation, export, skipped steps and full disks on two ranks, for each ZeRO stage."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import write_job
from tests.distributed.ranks import forked, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STAGES = (0, 1, 2, 3)
POISONED = ("poison0", "poison1", "poison2bf16", "poison3", "poison0always", "poison2bf16always")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    for stage in STAGES:
        model = {"source": str(folder / "untied")} if stage % 2 else {}
        if stage >= 2:
            model["lora"] = {"r": 2}
        sizes = {"train": 40, "validation": 5, "calibration": 8, "temperature": 8, "certification": 8, "test": 8}
        write_job(folder, f"stage{stage}", model=model, data={"splits": sizes}, training={"zero_stage": stage})
    for name in POISONED:
        training = {"zero_stage": int(name[6]), "max_skipped_steps": 3, "max_steps": 4, "checkpoint_every": None}
        write_job(folder, name, model={"dtype": "bf16" if "bf16" in name else "fp32"}, training=training)
    for name, behind in (("disk", False), ("disk_behind", True)):
        training = {"zero_stage": 2, "keep_checkpoints": 1, "max_steps": 8, "checkpoint_in_background": behind}
        write_job(folder, name, training=training)
    write_job(folder, "homes", objective={"name": "orpo"}, penalties=[])
    script = str(__file__).replace("test_engine", "engine_cases")
    for ranks in (1, 2):
        ended = run(forked(ranks, script, str(folder)), folder)
        assert ended.code == 0, ended.output[-6000:]
    load = {(n, k): torch.load(folder / f"results-{n}-{k}.pt", weights_only=True) for n, k in ((1, 0), (2, 0), (2, 1))}
    return folder, load


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("questions", ["uneven", "fewer than ranks", "none"])
def test_two_ranks_give_the_answers_of_one_process(results, stage, questions):
    whole = results[1][1, 0][f"stage{stage}"][questions]
    assert len(whole["answers"]) == {"uneven": 5, "fewer than ranks": 1, "none": 0}[questions]
    for rank in (0, 1):
        found = results[1][2, rank][f"stage{stage}"][questions]
        for one, other in zip(found["answers"], whole["answers"], strict=True):
            assert (one[0], one[1], one[3]) == (other[0], other[1], other[3])
            assert one[2] == pytest.approx(other[2], abs=1e-4)
        assert torch.equal(found["sequence_ids"], whole["sequence_ids"])
        torch.testing.assert_close(found["hidden"], whole["hidden"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_solve_for_the_scale_of_one_process(results, stage):
    scales = [results[1][key][f"stage{stage}"]["scale"] for key in ((1, 0), (2, 0), (2, 1))]
    assert scales[1] == scales[2]
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_on_held_out_records_is_that_of_one_process(results, stage):
    one, *two = [results[1][key][f"stage{stage}"]["loss"] for key in ((1, 0), (2, 0), (2, 1))]
    assert two[0] == two[1]
    assert {"eval/loss", "eval/loss/nll"} <= set(one)
    assert two[0] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_export_loads_plainly_and_gives_the_engines_logprobs(results, stage, ranks):
    from transformers import AutoModelForCausalLM

    folder, found = results
    model, info = AutoModelForCausalLM.from_pretrained(folder / f"stage{stage}-{ranks}", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name for name, _ in model.named_parameters())
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        table = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    expected = table.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(found[ranks, 0][f"stage{stage}"]["logprobs"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in POISONED if not name.endswith("always")])
def test_a_step_with_a_poisoned_record_is_skipped_on_all_ranks_and_the_record_is_named(results, name):
    for rank in (0, 1):
        found = results[1][2, rank][name]
        assert found["skipped"] == [False, True, False, False]
        assert found["message"] == ""
        assert found["finite"]
        assert found["changed"]
    (victim,) = results[1][2, 0][name]["victims"]
    (warning,) = [line for line in results[1][2, 0][name]["warnings"] if "skipped" in line]
    assert "step 2 skipped" in warning
    assert victim in warning


@pytest.mark.parametrize("name", [name for name in POISONED if name.endswith("always")])
def test_training_that_no_longer_learns_ends_with_the_records(results, name):
    for rank in (0, 1):
        found = results[1][2, rank][name]
        assert found["skipped"] in ([True, True], [True, True, True])
        assert "3 steps in a row" in found["message"]
        assert any(victim in found["message"] for victim in found["victims"])
        assert found["finite"]
        assert not found["changed"]


@pytest.mark.parametrize("name", ["disk", "disk_behind"])
def test_a_full_disk_on_one_rank_keeps_the_last_good_checkpoint_and_training_goes_on(results, name):
    for rank in (0, 1):
        found = results[1][2, rank][name]
        assert found["step"] == 8
        kept = dict(found["kept"])
        assert kept[5] == ["step-0000002"]
        assert found["left"] == ["step-0000006"]
    assert any("No space left on device" in line for line in results[1][2, 1][name]["warnings"])
    told = [line for line in results[1][2, 0][name]["warnings"] if "last good one stays" in line]
    assert len(told) == 2
    assert "step 8" in told[1]
    assert "Read-only file system" in told[1]


def test_a_checkpoint_written_in_the_background_is_of_its_own_step(results):
    """It is written after the step that follows; what it holds is what was copied before that."""
    folder, found = results
    kept = dict(found[2, 0]["disk_behind"]["kept"])
    assert kept[3] == []
    assert kept[7] == ["step-0000002"]  # that of step 6 is not whole yet
    files = sorted((folder / "disk" / "checkpoints" / "step-0000006").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        expected = load_file(file)
        tensors = load_file(folder / "disk_behind" / file.relative_to(folder / "disk"))
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[name], one) for name, one in expected.items())


def test_rank_0_alone_looks_into_the_cache_of_sampled_answers(results):
    """Each rank has a home of its own: one that found its answers there would leave the others alone in a collective."""
    both = [results[1][2, rank]["homes"] for rank in (0, 1)]
    first, *others = both[0]["rejected"]
    assert len(first) == 40
    assert all(first)
    assert both[0]["rejected"] == both[1]["rejected"]
    assert others == [first, first]
    assert [found["sampled"] for found in both] == [2, 2]  # the third time rank 0 has them
    assert both[0]["kept"] == ["home0", "home2"]


def test_records_are_encoded_once_for_all_that_share_a_cache_and_a_failure_is_told_on_all(results):
    first, second = (results[1][2, rank]["homes"]["tokens"] for rank in (0, 1))
    assert first["same"] == second["same"] == [True] * 3
    assert first["made"] == ["together", "apart0", "failing"]
    assert second["made"] == ["apart1"]
    refused, apart, together, unwritable = first["told"]
    assert [one.replace("out1", "out0") for one in second["told"]] == first["told"]
    assert refused == "the template refuses it"
    assert "rank(s) 1 do not see the file that rank 0 wrote there" in apart
    assert together == ""
    assert unwritable.startswith("rank 0 cannot write to /proc/0")
    assert first["left"] == ["out"]  # nothing stays in what was no output_dir


def test_what_one_rank_sees_otherwise_is_told_on_all(results):
    for rank in (0, 1):
        no, data, unseen = results[1][2, rank]["homes"]["messages"]
        assert no == "rank 0 says no"
        assert data.startswith("rank 1 has another data set than rank 0")
        assert f"seen-by-{rank} is not seen whole by every process" in unseen


@pytest.mark.parametrize("stage", STAGES)
def test_export_of_two_ranks_is_bit_for_bit_that_of_one_process(results, stage):
    from safetensors.torch import load_file

    one, two = (load_file(results[0] / f"stage{stage}-{ranks}" / "model.safetensors") for ranks in (1, 2))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
