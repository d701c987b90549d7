"""Lines as lm-evaluation-harness 0.4 writes them with --log_samples: numbers and truth values of answers are text."""

HASHES = {"doc_hash": "d9" * 32, "prompt_hash": "16" * 32, "target_hash": "5f" * 32}


def choice_row(doc_id, logprobs, target, **metrics):
    """A multiple-choice question: one request an option."""
    prompt = f"Question: Example?\nAnswer: yes\n\nQuestion: Question {doc_id}?\nAnswer:"
    best = max(range(len(logprobs)), key=lambda i: logprobs[i]) if "acc_mutual_info" not in metrics else target
    right = float(best == target)
    return {
        "doc_id": doc_id,
        "doc": {"id": f"Mercury_{doc_id}", "question": f"Question {doc_id}?", "answerKey": "ABCD"[target]},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": f" option {i}"} for i in range(len(logprobs))},
        "resps": [[[str(value), "False"]] for value in logprobs],
        "filtered_resps": [[str(value), "False"] for value in logprobs],
        "filter": "none",
        "metrics": ["acc", "acc_norm", *metrics],
        **HASHES,
        "acc": right,
        "acc_norm": 1.0 - right,
        **metrics,
    }


def generation_row(doc_id, texts, target, exact_match, name="none"):
    """A generated answer, of as many repeats as texts; the filter has taken the first."""
    settings = {"until": ["\n\n"], "do_sample": len(texts) > 1, "temperature": 0.7}
    return {
        "doc_id": doc_id,
        "doc": {"question": f"Question {doc_id}?", "answer": target},
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": f"Q: Question {doc_id}?\nA:", "arg_1": settings}},
        "resps": [texts],
        "filtered_resps": texts[:1],
        "filter": name,
        "metrics": ["exact_match"],
        **HASHES,
        "exact_match": exact_match,
    }
