"""What a finished run of a tiny model leaves, without the training."""

import json

from calibtrain.config_file import load_config
from tests.distributed.jobs import write_job
from tests.tiny import write_tiny_model


def finished_run(folder, splits, max_new_tokens):
    """Output directory with config.yaml and model/, its questions beside it; `splits` are sizes by name."""
    job = write_job(folder, data={"splits": splits}, evaluation={"batch_size": 16, "max_new_tokens": max_new_tokens})
    rows = [{"question": f"What is {i}?", "answers": ["unknown"]} for i in range(900)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = load_config(job).output_dir
    write_tiny_model(output / "model", max_position_embeddings=512)
    (output / "config.yaml").write_text(job.read_text())
    return output
