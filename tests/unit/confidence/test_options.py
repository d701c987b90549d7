"""Options scored behind a shared prompt are scored as each by itself, at every temperature, on one rank or on more."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibtrain.calibration.temperature import TEMPERATURE_GRID
from calibtrain.confidence.answer import Answer
from calibtrain.confidence.answered import OptionFeatures, among, answer_table, option_table
from calibtrain.confidence.answering import Answerer, take
from calibtrain.confidence.likelihood import answer_questions
from calibtrain.confidence.source import Asker
from calibtrain.confidence.spread import likelihoods
from calibtrain.config import AnswerScoreConfig, EvaluationConfig
from calibtrain.config_tasks import ChoiceTask, LabelTask
from calibtrain.data.templates import Template
from calibtrain.distributed import World
from calibtrain.errors import UserError
from calibtrain.models.loss_model import LossModel
from calibtrain.models.policy import Policy
from calibtrain.pipeline.lm_eval import read_samples
from calibtrain.records import Message, Record
from calibtrain.tasks.kinds import task_of
from calibtrain.training.answer_stream import AnswerStream
from tests.tiny import CITIES, tiny_model, tiny_tokenizer

OPTIONS = ("Japan", "United States", "Kenya", "The quick brown fox")
ROUNDING = 2e-5
"""Of sums of about -20 in float32, which a processor's vectors add up in an order of their own."""
TASKS = {
    "letters": ChoiceTask(),
    "texts": ChoiceTask(show="texts"),
    "mean": ChoiceTask(show="texts", score="mean"),
    "label": LabelTask(labels=OPTIONS[:3]),
}


@pytest.fixture(scope="module")
def model():
    return LossModel(Policy(tiny_model(initializer_range=0.3, max_position_embeddings=1024))).eval()


def asked(name, kind="plain"):
    """A template of the task and ten questions, of three and of four options where they bring them."""
    template = Template(kind, tiny_tokenizer(), task=task_of(TASKS[name]))
    rows = [
        Record(
            (Message("user", f"In which country is the city of {city}?"),), "Japan", accepted=("Japan",),
            options=OPTIONS[: 3 + i % 2],
        )
        for i, (city, _) in enumerate(CITIES)
    ]  # fmt: skip
    return template, [template.task.asked(row) for row in rows]


@torch.no_grad()
def separate(model, template, record, temperature=1.0):
    """Log-probs of the options, each by a full pass of its own over prompt and reply."""
    task, prompt, scores = template.task, template.prompt_ids(record), []
    for option in task.options(record):
        ids = template.completion_ids(option)
        ids = ids if task.option_ends else ids[:-1]
        logits = model.policy.causal_model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        own = (logits.double() / temperature).log_softmax(-1)[torch.arange(len(ids)), ids]
        scores.append(own.mean() if task.option_score == "mean" else own.sum())
    return torch.stack(scores).log_softmax(0).numpy()


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("name", TASKS)
def test_shared_prompts_score_as_separate_passes(model, name, kind):
    template, records = asked(name, kind)
    shared = answer_questions(model, template, records, EvaluationConfig(batch_size=9)).answers
    alone = answer_questions(model, template, records, EvaluationConfig(batch_size=1), share_prefix=False).answers
    for record, one, other in zip(records, shared, alone, strict=True):
        assert one.option_logprobs == pytest.approx(other.option_logprobs, rel=1e-6, abs=ROUNDING)
        expected = separate(model, template, record)
        assert one.option_logprobs == pytest.approx(expected, rel=1e-6, abs=ROUNDING)
        assert one.text == one.options[int(expected.argmax())]
        assert one.confidence == pytest.approx(np.exp(expected.max()), rel=2e-5)
        assert one.correct == (one.text in record.accepted)
        assert one.finished
        assert one.choice == int(expected.argmax())


@pytest.mark.parametrize("name", TASKS)
def test_the_table_is_exact_at_every_temperature(model, name):
    template, records = asked(name)
    answered = answer_questions(model, template, records, EvaluationConfig(batch_size=9))
    table = answer_table(model, answered)
    assert table.dtype == torch.float64
    for k in (0, 12, 17, 24):
        expected = [
            separate(model, template, record, TEMPERATURE_GRID[k])[answer.choice]
            for record, answer in zip(records, answered.answers, strict=True)
        ]
        assert table[:, k].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    every = option_table(model, answered.options, (1.0,))[:, 0]
    flat = [value for answer in answered.answers for value in answer.option_logprobs]
    assert every.tolist() == pytest.approx(flat, rel=1e-6, abs=1e-6)


def test_some_of_the_answers_are_scored_as_among_all(model):
    template, records = asked("texts")
    answered = answer_questions(model, template, records, EvaluationConfig(batch_size=64))
    table = answer_table(model, answered, (0.5, 1.0, 2.0))
    rows = torch.tensor([7, 2, 3])
    assert answer_table(model, answered.select(rows), (0.5, 1.0, 2.0)).equal(table[rows])
    assert answer_table(model, take(answered, 4), (0.5, 1.0, 2.0)).equal(table[:4])
    assert answer_table(model, take(answered, 0), (1.0,)).shape == (0, 1)
    template.task.options = lambda record: OPTIONS if record is records[0] else ()
    with pytest.raises(UserError, match="has no options"):
        answer_questions(model, template, records, EvaluationConfig())


def test_log_softmax_by_owner():
    scores = torch.tensor([[1.0, -800.0], [2.0, -801.0], [0.5, 3.0]], dtype=torch.float64)
    found = among(scores, torch.tensor([0, 0, 1]))
    assert found[:2].equal(scores[:2].log_softmax(0))
    assert found[2].tolist() == [0.0, 0.0]
    assert OptionFeatures(None, torch.zeros(0, dtype=torch.int64)).owner.shape == (0,)


def test_shuffling_moves_letters_and_not_what_texts_score(model):
    plain = asked("texts")
    shuffled = Template("plain", tiny_tokenizer(), task=task_of(ChoiceTask(show="texts", shuffle=True)))
    rows = [replace(record, fields={}) for record in plain[1]]
    turned = [shuffled.task.asked(replace(row, options=row.options[::-1])) for row in rows]
    ordered = answer_questions(model, plain[0], plain[1], EvaluationConfig(batch_size=9)).answers
    moved = answer_questions(model, shuffled, turned, EvaluationConfig(batch_size=9)).answers
    assert any(one.options != other.options for one, other in zip(ordered, moved, strict=True))
    for one, other in zip(ordered, moved, strict=True):
        found = dict(zip(other.options, other.option_logprobs, strict=True))
        assert [found[option] for option in one.options] == pytest.approx(one.option_logprobs, abs=2e-5)
        assert (one.text, one.correct) == (other.text, other.correct)


def test_the_scale_is_solved_for_the_restricted_distribution(model):
    from calibtrain.calibration.temperature import optimal_temperature

    template, records = asked("letters")
    policy = model.policy
    world = World(0, 1, 0, torch.device("cpu"))
    stream = AnswerStream(
        [AnswerScoreConfig(moves="scale", questions_per_refresh=10)],
        Answerer(model, template, EvaluationConfig(batch_size=8), world),
        records,
        seed=0,
        max_length=128,
    )
    try:
        answers = stream.round(4)
        scale = policy.scale
        policy.scale = 1.0
        plain = answer_questions(model, template, records, EvaluationConfig())
        grid = tuple(2.0 ** (step / 3) for step in range(-6, 7))
        correct = [bool(one.correct) for one in plain.answers]
        solved = optimal_temperature(answer_table(model, plain, grid).numpy(), correct, grid, score=stream.scale.score)
        assert scale == pytest.approx(1 / solved, rel=1e-6)
        order = {records[place].id: one for place, one in zip(stream.asked, answers, strict=True)}
        policy.scale = scale
        again = answer_questions(model, template, records, EvaluationConfig()).answers  # answered at the solved scale
        for one in again:
            if one.text == order[one.question_id].text:
                assert order[one.question_id].confidence == pytest.approx(one.confidence, rel=1e-4)
    finally:
        policy.scale = 1.0


def test_likelihood_is_the_restricted_one_as_a_source_too(model):
    template, records = asked("letters")
    answered = answer_questions(model, template, records, EvaluationConfig())
    found = likelihoods(Asker(model, template, EvaluationConfig()), records, answered)
    assert found["likelihood"].values.tolist() == [one.confidence for one in answered.answers]
    assert (
        found["likelihood_mean"].values < found["likelihood"].values
    ).all()  # of all tokens, not of the letters alone


def test_answers_go_to_json_and_back(model):
    template, records = asked("texts")
    for one in answer_questions(model, template, records, EvaluationConfig()).answers:
        assert Answer.from_dict(json.loads(json.dumps(one.as_dict()))) == one
        assert one.rescored(-0.5).confidence == pytest.approx(np.exp(-0.5))


def test_the_report_of_lm_evals_samples_reads_the_same_confidence(model, tmp_path):
    template, records = asked("texts")
    answers = answer_questions(model, template, records, EvaluationConfig()).answers
    rows = []
    for i, (record, one) in enumerate(zip(records, answers, strict=True)):
        sums = [str(value - 3.7) for value in one.option_logprobs]  # the harness logs sums, which differ by a constant
        rows.append(
            {
                "doc_id": i,
                "doc": {"question": record.question},
                "target": "0",
                "arguments": {f"gen_args_{k}": {"arg_0": "?", "arg_1": f" {o}"} for k, o in enumerate(one.options)},
                "filtered_resps": [[value, "False"] for value in sums],
                "acc": float(one.correct),
            }
        )
    path = tmp_path / "samples_x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ours, theirs in zip(answers, read_samples(path).answers, strict=True):
        assert theirs.confidence == pytest.approx(ours.confidence, abs=1e-9)
        assert (theirs.text, theirs.correct) == (ours.text, ours.correct)


def test_a_model_is_quantised_by_the_options_that_it_chose(model):
    from calibtrain.pipeline.quantize_full import own_answers

    template, records = asked("texts")
    answered = answer_questions(model, template, records, EvaluationConfig())
    loaded = SimpleNamespace(
        template=template, config=SimpleNamespace(evaluation=None), answer=lambda records, shots: answered
    )
    for record, text, answer in zip(records, own_answers(loaded, records), answered.answers, strict=True):
        assert list(text.prompt) == template.prompt_ids(record)
        assert template.decode_answer(text.answer) == answer.text


def test_a_server_scores_no_options():
    from calibtrain.pipeline.served import Served

    template, records = asked("letters")
    served = object.__new__(Served)
    served.config, served.template = SimpleNamespace(evaluation=EvaluationConfig()), template
    served.server, served._seen = SimpleNamespace(url="http://127.0.0.1:1"), float("inf")
    with pytest.raises(UserError, match="answer_by: generation"):
        served.measure(records)


def test_a_reply_that_is_written_freely_is_read_and_scores_no_options(model):
    template = Template("plain", tiny_tokenizer(), task=task_of(ChoiceTask(answer_by="generation")))
    records = [template.task.asked(replace(one, fields={})) for one in asked("texts")[1]]
    answered = answer_questions(model, template, records, EvaluationConfig(max_new_tokens=3))
    assert answered.options is None
    for record, answer in zip(records, answered.answers, strict=True):
        assert answer.options == template.task.choices(record)
        assert answer.option_logprobs == ()
        assert answer.choice == (answer.options.index(answer.text) if answer.found else None)
        assert answer.confidence == pytest.approx(np.exp(sum(answer.token_logprobs)))
        assert answer.correct == (answer.found and answer.text in record.accepted)
