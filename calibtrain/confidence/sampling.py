"""Confidence from samples: how often the model gives the proposed answer again, and how many meanings it wavers between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibtrain.confidence.answered import Answered
from calibtrain.confidence.generation import generate, keep_none
from calibtrain.confidence.source import Array, Asker, Cost, SourceScores
from calibtrain.data.replies import read_reply
from calibtrain.errors import UserError
from calibtrain.records import Record
from calibtrain.tasks.matching import normalize

Labels = NDArray[np.int64]
Equivalence = Callable[[str, Sequence[str]], Labels]
"""(question, texts) -> one label a text; texts of the same meaning have the same label."""

SAMPLES = 8


def exact(question: str, texts: Sequence[str]) -> Labels:
    """The same characters, but for spaces around."""
    return _labels([text.strip() for text in texts])


def normalized(question: str, texts: Sequence[str]) -> Labels:
    """The same after the grader's normalisation: case, accents, punctuation and a leading "the" do not count."""
    return _labels([normalize(text) for text in texts])


def nli_equivalence(path: str, device: str = "cpu", batch_size: int = 32) -> Equivalence:
    """Texts that entail each other behind their question, by a transformers sequence-classification model.

    Kuhn et al. 2023, arXiv 2302.09664. Meanings are the connected components of mutual entailment, so that they do not
    depend on the order of the texts. Raises UserError when no label of the model is called entailment.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"NLI model {path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    entails = [int(i) for i, name in model.config.id2label.items() if str(name).lower().startswith("entail")]
    if len(entails) != 1:
        raise UserError(
            f"NLI model {path}: labels are {list(model.config.id2label.values())}; one of them must be entailment"
        )

    @torch.no_grad()
    def equivalence(question: str, texts: Sequence[str]) -> Labels:
        same = normalized(question, texts)
        first = np.unique(same, return_index=True)[1]
        shown = [f"{question} {texts[row]}" for row in first]
        pairs = [(a, b) for a in range(len(shown)) for b in range(len(shown)) if a != b]
        entailed = np.zeros((len(shown), len(shown)), dtype=bool)
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            inputs = tokenizer(
                [shown[a] for a, _ in part], [shown[b] for _, b in part], padding=True, return_tensors="pt"
            ).to(device)
            for (a, b), label in zip(part, model(**inputs).logits.argmax(-1).tolist(), strict=True):
                entailed[a, b] = label == entails[0]
        return components(entailed & entailed.T)[same]

    return equivalence


def sampled(
    asker: Asker,
    records: Sequence[Record],
    answered: Answered,
    *,
    samples: int = SAMPLES,
    equivalence: Equivalence | None = None,
) -> dict[str, SourceScores]:
    """Self-consistency and semantic entropy of `samples` answers to each question, drawn at temperature 1.

    `self_consistency` is (m + 1) / (k + 2) for m of k samples that mean the proposed answer (Wang et al. 2022, arXiv
    2203.11171; smoothed, since m / k has granularity 1 / k). `semantic_entropy` and `semantic_entropy_counts` are
    exp(-entropy) of the meanings (Farquhar et al. 2024), weighed by likelihood and by count. They share the samples. Samples
    mean the same by `equivalence`, by default where the task says so; the likelihood is that of the answer's span. A reply
    without an answer means nothing, and so the same as no other.
    """
    prompts = [asker.template.prompt_ids(record, asker.shots) for record in records]
    drawn = generate(
        asker.module,
        prompts,
        **asker.template.ending,
        max_new_tokens=asker.settings.max_new_tokens,
        batch_size=max(1, asker.settings.batch_size // samples),
        samples=samples,
        seed=asker.seed,
        device=asker.device,
        keep=keep_none,
    )
    rows = []
    for record, answer, row in zip(records, answered.answers, drawn, strict=True):
        replies = [read_reply(asker.template, one.tokens, record) for one in row]
        texts = [one.reading.text for one in replies]
        said = [answer.text, *texts]
        if equivalence is None:
            labels = _labels([asker.template.task.key(text, record) for text in said])
        else:
            labels = equivalence(record.question, said)
        labels = _apart(labels, [answer.found, *(one.reading.found for one in replies)])
        same = int((labels[1:] == labels[0]).sum())
        logprobs = [math.fsum(one.logprobs[i] for i in reply.read) for one, reply in zip(row, replies, strict=True)]
        weighed = semantic_entropy(labels[1:], texts, logprobs)
        rows.append(((same + 1) / (samples + 2), math.exp(-weighed), math.exp(-count_entropy(labels[1:]))))
    passes = np.array([sum(len(one.tokens) for one in row) for row in drawn], dtype=np.float64)
    read = passes + samples * (np.array([len(prompt) for prompt in prompts]) - 1.0)
    names = ("self_consistency", "semantic_entropy", "semantic_entropy_counts")
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(names)).clip(0.0, 1.0)
    return {
        name: SourceScores(values[:, i], Cost(passes, read), name == "self_consistency") for i, name in enumerate(names)
    }


def semantic_entropy(labels: ArrayLike, texts: Sequence[str], logprobs: ArrayLike) -> float:
    """Entropy in nats of the meanings of k samples, p(C) proportional to the sum of exp(log-prob) over C's distinct texts.

    A text that was drawn twice has its probability once: counting it twice would weigh it by p squared.
    """
    first = np.unique(np.asarray(texts, dtype=object).astype(str), return_index=True)[1]
    meaning, logprob = np.asarray(labels)[first], np.asarray(logprobs, dtype=np.float64)[first]
    mass = np.exp(logprob - logprob.max())
    return _entropy(np.array([mass[meaning == one].sum() for one in np.unique(meaning)]))


def count_entropy(labels: ArrayLike) -> float:
    """Entropy in nats of the meanings of k samples, by how many samples each has."""
    return _entropy(np.unique(np.asarray(labels), return_counts=True)[1].astype(np.float64))


def components(same: NDArray[np.bool_]) -> Labels:
    """Connected components (n,) of a symmetric relation (n, n)."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    return np.asarray(connected_components(csr_matrix(same), directed=False)[1], dtype=np.int64)


def _entropy(mass: Array) -> float:
    p = mass / mass.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _apart(labels: Labels, found: Sequence[bool]) -> Labels:
    """The labels with one of its own for each text where no answer was found."""
    lost = ~np.array(found, dtype=bool)
    return np.where(lost, labels.max() + 1 + np.arange(len(labels)), labels)


def _labels(keys: Sequence[str]) -> Labels:
    return np.asarray(np.unique(np.array(keys, dtype=str), return_inverse=True)[1], dtype=np.int64)
