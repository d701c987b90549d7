"""Run by vLLM's own Python: python vllm_answers.py JOBS.json. Greedy answers of real vLLM to token ids, with log-probs.

JOBS.json: [{"directory", "dtype", "prompts", "max_tokens", "stop", "output"}]. Each output is a list of {"tokens",
"logprobs"}, or {"error"} where the engine cannot run the model. One process for all: a server starts slowly.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def answered(job):
    from vllm import LLM, SamplingParams

    engine = LLM(job["directory"], dtype=job["dtype"], max_model_len=256, max_num_seqs=32, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=job["max_tokens"], stop_token_ids=job["stop"], logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found = [one.outputs[0] for one in engine.generate(prompts, settings, use_tqdm=False)]
    return [
        {
            "tokens": list(one.token_ids),
            "logprobs": [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)],
        }
        for one in found
    ]


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = answered(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        Path(job["output"]).write_text(json.dumps(result))
        gc.collect()
