import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.data.collate import collate, pack_rows, row_tokens
from calibtrain.data.encode import Encoded
from calibtrain.data.turns import IGNORED
from calibtrain.errors import UserError
from calibtrain.losses.terms import ANSWER, CHOSEN, REJECTED

PAD = 0
# Ids include the pad's: padding must be told by lengths.
TOKENS = st.integers(0, 9)


@st.composite
def sequences(draw):
    """Some pairs, lone chosen sequences and own answers, with random lengths and ids."""
    made = []
    for index in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["pair", "chosen", "answer"]))
        prompt = draw(st.lists(TOKENS, min_size=1, max_size=9))
        for role in {"pair": (CHOSEN, REJECTED), "chosen": (CHOSEN,), "answer": (ANSWER,)}[kind]:
            completion = draw(st.lists(TOKENS, min_size=1, max_size=6))
            labels = ()
            if kind == "chosen" and draw(
                st.booleans()
            ):  # a conversation; its first answer begins it, the last one ends it
                between = draw(st.lists(st.sampled_from([IGNORED, 3, 7]), max_size=4))
                labels = (*completion[:1], *between, 4)
                completion = [*completion[:1], *draw(st.lists(TOKENS, min_size=len(between), max_size=len(between))), 4]
            made.append(
                Encoded(
                    (*prompt, *completion),
                    len(prompt),
                    role,
                    record_id=index,
                    pair_id=index if kind == "pair" else -1,
                    correct=float(draw(st.booleans())) if kind == "answer" else math.nan,
                    labels=labels,
                )
            )
    return made


def expected_targets(encoded, scope):
    """(sequence, id that predicts, its position in the sequence, target, is completion), by the definition."""
    found = []
    for s, one in enumerate(encoded):
        labels = [IGNORED] * one.completion_start + list(one.labels or one.ids[one.completion_start :])
        for t in range(1, len(one.ids)):
            learned = labels[t] != IGNORED
            if learned or (scope == "full" and one.role == CHOSEN):
                found.append((s, one.ids[t - 1], t - 1, labels[t] if learned else one.ids[t], learned))
    return found


def found_targets(batch):
    at = batch.target_positions
    return list(
        zip(
            batch.sequence_ids.tolist(),
            batch.input_ids.flatten()[at].tolist(),
            batch.position_ids.flatten()[at].tolist(),
            batch.targets.tolist(),
            batch.is_completion.tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("scope", ["completion", "full"])
@pytest.mark.parametrize("packing", [None, 15, 40])
@given(encoded=sequences())
def test_targets_are_those_of_the_definition(scope, packing, encoded):
    batch = collate(encoded, PAD, scope, packing)
    assert found_targets(batch) == expected_targets(encoded, scope)


@pytest.mark.parametrize("scope", ["completion", "full"])
@given(encoded=sequences(), packing=st.integers(15, 60))
def test_what_a_loss_reads_is_the_same_packed_and_padded(scope, encoded, packing):
    padded, packed = collate(encoded, PAD, scope), collate(encoded, PAD, scope, packing)
    for name in ("targets", "sequence_ids", "is_completion", "roles", "pair_ids", "correct", "record_ids"):
        assert torch.equal(getattr(padded, name).nan_to_num(-1), getattr(packed, name).nan_to_num(-1)), name
    assert packed.input_ids.shape[0] <= padded.input_ids.shape[0]


@given(encoded=sequences(), packing=st.one_of(st.none(), st.integers(15, 60)))
def test_every_token_of_every_sequence_is_there_once(encoded, packing):
    batch = collate(encoded, PAD, "completion", packing)
    runs = []
    for ids, positions, segments in zip(batch.input_ids, batch.position_ids, batch.segment_ids, strict=True):
        for k in range(1, int(segments.max()) + 1):
            here = segments == k
            assert torch.equal(positions[here], torch.arange(int(here.sum())))
            assert here.nonzero().diff(dim=0).eq(1).all()  # contiguous
            runs.append(tuple(ids[here].tolist()))
        padding = segments == 0
        assert (ids[padding] == PAD).all()
        assert not padding[:-1].logical_and(~padding[1:]).any()  # only on the right
    assert sorted(runs) == sorted(one.ids for one in encoded)
    if packing is not None:
        assert all(int((row > 0).sum()) <= packing for row in batch.segment_ids)


@given(encoded=sequences(), multiple=st.sampled_from([1, 8, 16]))
def test_shapes_and_dtypes_are_the_same_for_any_number_of_sequences(encoded, multiple):
    for batch in (collate(encoded, PAD, pad_to_multiple=multiple), collate([], PAD, pad_to_multiple=multiple)):
        rows, width = batch.input_ids.shape
        assert rows >= 1
        assert width % multiple == 0
        assert width >= 1
        for name in ("input_ids", "position_ids", "target_positions", "targets", "sequence_ids", "roles", "pair_ids"):
            assert getattr(batch, name).dtype == torch.int64, name
        assert batch.segment_ids.dtype == torch.int32
        assert batch.is_completion.dtype == torch.bool
        assert batch.correct.dtype == torch.float32
        assert batch.record_ids.dtype == torch.int64


@pytest.mark.parametrize("packing", [None, 32])
def test_no_sequences_give_one_row_of_padding(packing):
    batch = collate([], 7, "full", packing)
    assert batch.input_ids.tolist() == [[7] * 8]
    assert batch.segment_ids.tolist() == [[0] * 8]
    assert batch.targets.shape == batch.roles.shape == (0,)
    assert not batch.packed


def test_a_record_twice_in_a_batch_makes_two_pairs():
    pair = [Encoded((1, 2), 1, role, record_id=4, pair_id=4) for role in (CHOSEN, REJECTED)]
    other = [Encoded((1, 3), 1, role, record_id=2, pair_id=2) for role in (CHOSEN, REJECTED)]
    own = Encoded((1, 2), 1, ANSWER, record_id=4, correct=1.0)
    batch = collate([*pair, own, *other, *pair], PAD)
    assert batch.pair_ids.tolist() == [0, 0, -1, 1, 1, 2, 2]
    assert batch.record_ids.tolist() == [4, 4, 4, 2, 2, 4, 4]
    assert batch.correct.nan_to_num(-1).tolist() == [-1, -1, 1, -1, -1, -1, -1]


@given(st.lists(st.integers(1, 20), max_size=20))
def test_packing_needs_as_few_rows_as_first_fit_decreasing(lengths):
    encoded = [Encoded((1,) * length, 1, CHOSEN, 0) for length in lengths]
    rows = pack_rows(encoded, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    room = []
    for length in sorted(lengths, reverse=True):
        fits = next((r for r, free in enumerate(room) if free >= length), None)
        if fits is None:
            room.append(20 - length)
        else:
            room[fits] -= length
    assert len(rows) == len(room)


def test_rows_are_filled_evenly():
    encoded = [Encoded((1,) * length, 1, CHOSEN, 0) for length in (10, 10, 5, 5)]
    assert collate(encoded, PAD, packing_tokens=20, pad_to_multiple=1).input_ids.shape == (2, 15)


def test_a_sequence_longer_than_a_row():
    with pytest.raises(UserError, match=r"record 3: its sequence of 9 tokens .*packing_tokens 8"):
        collate([Encoded((1,) * 9, 2, CHOSEN, 3)], PAD, packing_tokens=8)


def test_a_causal_model_gives_packed_and_padded_the_same_logprobs():
    from tests.tiny import tiny_model

    model = tiny_model(vocab_size=32, attn_implementation="eager").double()
    lengths = ((5, 3), (5, 4), (2, 6), (9, 1), (1, 2))
    generator = torch.Generator().manual_seed(0)
    encoded = [
        Encoded(tuple(torch.randint(0, 32, (p + c,), generator=generator).tolist()), p, CHOSEN, i)
        for i, (p, c) in enumerate(lengths)
    ]

    def logprobs(batch):
        segments = batch.segment_ids
        same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(segments.shape[1:] * 2).tril().bool()
        mask = torch.zeros(same.shape, dtype=torch.float64).masked_fill(~same, torch.finfo(torch.float64).min)[:, None]
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
        at_targets = logits.flatten(0, 1)[batch.target_positions].log_softmax(-1)
        return at_targets.gather(1, batch.targets[:, None])[:, 0]

    # Llama's norms and softmax compute in float32 whatever the model's dtype.
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    packed = collate(encoded, PAD, "full", packing_tokens=16)
    assert packed.packed
    torch.testing.assert_close(logprobs(packed), logprobs(collate(encoded, PAD, "full")), **tolerance)
    alone = torch.cat([logprobs(collate([one], PAD, "full")) for one in encoded])
    torch.testing.assert_close(logprobs(packed), alone, **tolerance)


@given(encoded=sequences(), packing=st.one_of(st.none(), st.integers(60, 120)), shared=st.booleans())
def test_rows_that_hold_several_sequences_say_so(encoded, packing, shared):
    batch = collate(encoded, PAD, packing_tokens=packing, shared_prefix=shared)
    assert batch.packed == (len(encoded) > batch.input_ids.shape[0])


@given(encoded=sequences(), shared=st.booleans())
def test_row_tokens_are_those_of_the_batch(encoded, shared):
    padded = collate(encoded, PAD, shared_prefix=shared, pad_to_multiple=1)
    assert row_tokens(encoded, None, shared) == int((padded.segment_ids > 0).sum(1).max())
    packed = collate(encoded, PAD, packing_tokens=60, shared_prefix=shared)
    assert row_tokens(encoded, 60, shared) == int((packed.segment_ids > 0).sum())


@pytest.mark.parametrize("scope", ["completion", "full"])
def test_a_conversation_beside_an_answer_with_a_span_says_of_each_target_whether_it_is_an_answer(scope):
    turns = Encoded((1, 2, 3, 4, 5, 6, 7, 8), 2, CHOSEN, 0, labels=(3, IGNORED, IGNORED, 6, 7, 8))
    reasoned = Encoded((1, 2, 3, 4, 5), 2, ANSWER, 1, correct=1.0, answer_span=(1, 3))
    batch = collate([turns, reasoned], 0, scope)
    assert batch.is_answer.shape == batch.targets.shape
    of_turns = batch.is_answer[batch.sequence_ids == 0]
    assert of_turns.tolist() == batch.is_completion[batch.sequence_ids == 0].tolist()
    assert of_turns.sum() == 4
    assert batch.is_answer[batch.sequence_ids == 1].tolist() == [False, True, True]
