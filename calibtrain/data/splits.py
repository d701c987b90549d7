"""Train, validation, calibration, temperature, certification and test, which never share a question."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from calibtrain.config_data import MixtureSource, SplitSizes
from calibtrain.data.calibration_set import choose_calibration_set
from calibtrain.data.drops import DropReport
from calibtrain.data.mixtures import drawn, interleaved, mixture_lines
from calibtrain.errors import UserError
from calibtrain.records import Record, unit_hash
from calibtrain.tasks.short_answer import SHORT_ANSWER

SHARES = {"train": 0.5, "calibration": 0.1, "temperature": 0.1, "certification": 0.15, "test": 0.15}
"""Fixed, so that asking for other sizes never moves a question from one split to another."""

VALIDATION_SHARE = 0.1
"""Of the training split's questions; they train where no validation split is asked for."""

TOO_FEW_EXAMPLES = "data.few_shot: {} asked for, but only {} records of train are one question with an answer"

EVALUATION_SPLITS = ("calibration", "temperature", "certification", "test")


def split_of(question_id: str, seed: int, names: Sequence[str] = tuple(SHARES)) -> str:
    """Split that a question belongs to: a pure function of its id, the seed and the shares of `names`."""
    position = unit_hash("split", seed, question_id) * sum(SHARES[name] for name in names)
    for name in names[:-1]:
        if position < SHARES[name]:
            return name
        position -= SHARES[name]
    return names[-1]


def is_validation(question_id: str, seed: int) -> bool:
    """Whether a question of the training split is held out to measure the loss by, where that is asked for."""
    return unit_hash("validation", seed, question_id) < VALIDATION_SHARE


def split_records(
    records: Sequence[Record],
    sizes: SplitSizes,
    seed: int,
    questions: Sequence[Record] | None = None,
    drops: DropReport | None = None,
    *,
    undesirable: bool = False,
    gradable: Callable[[Record], bool] = SHORT_ANSWER.gradable,
    mixture: MixtureSource | None = None,
    asked_mixture: MixtureSource | None = None,
    examples: int = 0,
    once: bool = False,
    bare: bool = False,
    spare: bool = False,
) -> dict[str, list[Record]]:
    """Records of each split, in draw order, exactly as many as `sizes` asks for (train: all, where it asks for null).

    With `questions` (their own source) all of `records` may train and the other splits are made of `questions`; records
    whose question belongs to a split that is asked for are then left out of training. Train needs an answer to learn,
    and keeps every row of a question that says something else; the other splits need questions that are `gradable` (have
    accepted answers to grade by), and ask each once. With `undesirable`, an answer to avoid is one to learn from as well.
    What is dropped or not used is counted in `drops`. Raises UserError that says how many there are when a split cannot
    be filled.

    A validation split is cut out of the training split. `mixture` and `asked_mixture`: what `records` and `questions` are
    drawn from, if from several sources. `examples`: so many answered questions are taken out of train and have a split
    of their own, by that name. `once`: train asks each question once. `bare`: it needs no answers. `spare`: `drops` gets
    the questions that are left to be graded.
    """
    drops = DropReport() if drops is None else drops
    evaluates = any(getattr(sizes, name) for name in EVALUATION_SPLITS)
    # Nothing is held out of a run that asks for no evaluation split.
    names = (tuple(SHARES) if evaluates else ("train",)) if questions is None else EVALUATION_SPLITS
    pools: dict[str, list[Record]] = {name: [] for name in (*SHARES, "validation")}
    for record in records if questions is None else questions:
        pools[split_of(record.key, seed, names)].append(record)
    # An earlier turn of a conversation may be a question of another split.
    train = pools["train"] if questions is None else records
    pools["train"] = _not_held_out(train, pools, sizes, drops)
    pools["train"] = _learnable(pools["train"], drops, undesirable, bare)
    if once:
        pools["train"] = unique_records(pools["train"], drops)
    if mixture is not None:
        pools["train"] = interleaved(pools["train"], mixture, seed)
    shown = _cut_examples(pools, examples)
    if sizes.validation:
        held = [is_validation(record.key, seed) for record in pools["train"]]
        pools["validation"] = [record for record, out in zip(pools["train"], held, strict=True) if out]
        pools["train"] = [record for record, out in zip(pools["train"], held, strict=True) if not out]
        asked = {record.key for record in pools["validation"]}
        pools["train"] = _kept(
            pools["train"], lambda record: asked.isdisjoint(record.taught), "question held out for validation", drops
        )
    for name in EVALUATION_SPLITS:
        if evaluates and not getattr(sizes, name) and questions is None:
            _kept(pools[name], lambda record: False, f"of the {name} split, which is not asked for", drops)
        pools[name] = _gradable(pools[name], gradable, drops if getattr(sizes, name) else DropReport())
        if (mixed := mixture if questions is None else asked_mixture) is not None:
            pools[name] = interleaved(pools[name], mixed, seed)
    if mixture is not None and pools["train"]:
        pool = pools["train"]
        pools["train"] = drawn(pool, mixture, seed, sizes.train)
        drops.notes += mixture_lines(pool, pools["train"], mixture)
    wanted = {name: len(pools[name]) if size is None else size for name, size in sizes.model_dump().items()}
    for name, size in wanted.items():
        if len(pools[name]) < size:
            raise UserError(cannot_fill(name, size, len(pools[name]), questions is not None or not evaluates, drops))
        drops.unused[name] = len(pools[name]) - size
    splits = {name: pools[name][:size] for name, size in wanted.items()}
    asking = unique_records(records if questions is None else questions, DropReport(), by=lambda record: record.key)
    splits["calibration"] = _stratified(pools["calibration"], wanted["calibration"], list(filter(gradable, asking)))
    if spare:
        drops.spare = _spare(pools, splits, gradable)
    return {**splits, "examples": shown} if examples else splits


def _spare(
    pools: Mapping[str, Sequence[Record]], splits: Mapping[str, Sequence[Record]], gradable: Callable[[Record], bool]
) -> list[Record]:
    """Gradable questions, each once, of train and calibration that neither these nor validation have taken or teach."""
    taken = {key for name in ("train", "validation", "calibration") for record in splits[name] for key in record.taught}
    left = [record for name in ("train", "calibration") for record in pools[name] if record.key not in taken]
    return unique_records(filter(gradable, left), DropReport(), by=lambda record: record.key)


def _cut_examples(pools: dict[str, list[Record]], count: int) -> list[Record]:
    """The first questions of train with an answer, taken out of it with whatever else is said to them."""
    answered = [one for one in pools["train"] if one.chosen is not None and len(one.prompt) == 1] if count else []
    found = unique_records(answered, DropReport())[:count]
    if len(found) < count:
        raise UserError(TOO_FEW_EXAMPLES.format(count, len(found)))
    taken = {record.key for record in found}
    pools["train"] = [record for record in pools["train"] if record.key not in taken]
    return found


def _not_held_out(
    records: Sequence[Record], pools: Mapping[str, Sequence[Record]], sizes: SplitSizes, drops: DropReport
) -> list[Record]:
    # All questions of a split are kept out, not only those within today's size: sizes may grow tomorrow.
    held_out = {record.key for name in EVALUATION_SPLITS if getattr(sizes, name) for record in pools[name]}
    return _kept(records, lambda record: held_out.isdisjoint(record.taught), "question held out for evaluation", drops)


def _learnable(records: Sequence[Record], drops: DropReport, undesirable: bool, bare: bool) -> list[Record]:
    """Rows with an answer to learn, each once: of two that say the same the second is dropped."""

    def answers(record: Record) -> bool:
        return bare or record.chosen is not None or (undesirable and record.rejected is not None)

    weighing = _kept(records, lambda record: record.weight > 0, "weight 0", drops)
    answered = _kept(weighing, answers, "no answer to learn", drops)
    seen: set[Hashable] = set()

    def new(record: Record) -> bool:
        said = saying(record)
        known = len(seen)
        seen.add(said)
        return len(seen) > known

    return _kept(answered, new, "the same row again", drops)


def saying(record: Record) -> Hashable:
    """All that a row is learned by: rows that differ in any of it are several."""
    return (
        *(record.prompt, record.chosen, record.calls, record.rejected, record.accepted, record.tools, record.context),
        *(record.options, repr(sorted(record.fields.items())) if record.fields else "", record.weight, record.learned),
    )


def _gradable(records: Sequence[Record], gradable: Callable[[Record], bool], drops: DropReport) -> list[Record]:
    """Questions that can be graded, each once, whatever stands around it: answers to it are no two independent ones."""
    graded = _kept(records, gradable, "no accepted answers to grade by", drops)
    return unique_records(graded, drops, by=lambda record: record.key)


def _kept(records: Sequence[Record], keeps: Callable[[Record], bool], reason: str, drops: DropReport) -> list[Record]:
    kept = []
    for record in records:
        if keeps(record):
            kept.append(record)
        else:
            drops.drop(reason, record.origin or record.question)
    return kept


def _stratified(pool: Sequence[Record], size: int, drawn: Sequence[Record]) -> list[Record]:
    """Choice from a split's pool with the make-up of all questions, read as deep into the draw as this split goes.

    A weighted draw starts with the head and ends in the tail, so that its make-up depends on how deep one reads.
    """
    depth = round(len(drawn) * size / len(pool)) if pool else 0
    return choose_calibration_set(pool, size, like=drawn[:depth])


def unique_records(
    records: Iterable[Record], drops: DropReport, by: Callable[[Record], str] = lambda record: record.id
) -> list[Record]:
    """The first record of each question, of each prompt unless `by` says more; the others are counted in `drops`."""
    first: dict[str, Record] = {}
    for record in records:
        if first.setdefault(by(record), record) is not record:
            drops.drop("question asked before", record.origin or record.question)
    return list(first.values())


def cannot_fill(name: str, size: int, found: int, separate: bool, drops: DropReport) -> str:
    """What to do about a split that the data cannot fill."""
    learns = name in ("train", "validation")
    kind = "records with an answer to learn" if learns else "questions with accepted answers"
    names = EVALUATION_SPLITS if separate else tuple(SHARES)
    share = 1.0 if separate and learns else SHARES["train" if learns else name] / sum(SHARES[one] for one in names)
    share *= VALIDATION_SHARE if name == "validation" else 1.0
    source = "data.source" if learns or not separate else "data.questions"
    advice = f"set data.splits.{name} to at most {found}"
    if not learns and not found:
        advice = f"give graded questions ({source} with an `answers` column) or set data.splits.{name} to 0"
    left_out = f" (of all rows, {'; '.join(drops.lines())})" if drops.total else ""
    return (
        f"data.splits.{name}: {size} asked for, but only {found} of the {kind} in {source} fall into this split "
        f"(always {share:.0%} of the questions, so that no split ever shares one); {advice}, or bring more data{left_out}"
    )
