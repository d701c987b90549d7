"""Weights & Biases: one run per job, continued on resume, that can neither stop nor slow training."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from calibtrain.config import TrackingConfig
from calibtrain.hooks.base import Hook
from calibtrain.hooks.records import EndRecord, EvaluationRecord, LogRecord, RunRecord, SpectraRecord
from calibtrain.hooks.wandb_charts import evaluation_charts

logger = logging.getLogger(__name__)

QUEUE_SIZE = 1000  # entries waiting for a slow or starting W&B; more are dropped, metrics.jsonl has them all
INIT_SECONDS = 30.0  # for the server to answer before the run goes offline
FINISH_SECONDS = 60.0  # for the last uploads after training

Task = Callable[[Any], None]


class WandbHook(Hook):
    """Logs to the W&B SDK from a thread of its own; belongs to global rank 0 alone (others do not construct it).

    `wandb.init` waits for the server, so it and every later call run beside the training. If the server does not
    answer, the run is written offline under the same id and the `wandb sync` command is printed at the end.
    """

    name = "wandb"

    def __init__(self, tracking: TrackingConfig, run_name: str) -> None:
        self._tracking, self._run_name = tracking, run_name
        self._run_id = secrets.token_hex(4)
        self._tasks: queue.Queue[Task | None] = queue.Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._offline_dir: Path | None = None
        self._failed = False

    def on_start(self, record: RunRecord) -> None:
        """Start the thread that starts the run."""
        if record.rank != 0:
            return
        arguments = {
            "project": self._tracking.project,
            "entity": self._tracking.entity,
            "group": self._tracking.group,
            "tags": list(self._tracking.tags),
            "name": self._run_name,
            "id": self._run_id,
            "dir": str(record.output_dir),
            "config": {**record.config, "world_size": record.world_size},
        }
        if self._tracking.log_answers and resolve_mode(self._tracking.mode) != "disabled":
            print("W&B gets questions, answers and grades as well as numbers (tracking.log_answers: true)", flush=True)
        record.output_dir.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._work, args=(arguments,), name="wandb", daemon=True)
        self._thread.start()

    def on_log(self, record: LogRecord) -> None:
        """Queue the merged numbers."""
        entry = {**record.metrics, "train/step": record.step}
        self._submit(lambda run: run.log(entry))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Queue the numbers, the charts and, where the config says so, the answers."""
        entry = {**record.metrics, "train/step": record.step}
        answers, split, texts = record.answers, record.split, self._tracking.log_answers
        self._submit(lambda run: run.log({**entry, **(evaluation_charts(split, answers, texts) if answers else {})}))

    def on_spectra(self, record: SpectraRecord) -> None:
        """Queue the readings of matrices."""
        entry = {**record.metrics(), "train/step": record.step}
        self._submit(lambda run: run.log(entry))

    def on_end(self, record: EndRecord) -> None:
        """Attach summary and artefacts, finish, and say how to upload an offline run."""
        if self._thread is None:
            return
        paths = [path for path in record.artifacts if path.is_file()]
        summary, exit_code = dict(record.summary), 1 if record.error else 0
        run_id, preempted = self._run_id, record.preempted

        def finish(run: Any) -> None:
            if preempted:  # W&B then shows neither a success nor a crash
                run.mark_preempting()
            run.summary.update(summary)
            if paths:
                run.log_artifact(_artifact(f"calibtrain-{run_id}", paths))
            run.finish(exit_code=exit_code)

        self._submit(finish)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The run id."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of the checkpoint."""
        self._run_id = str(state["run_id"])

    def _submit(self, task: Task) -> None:
        if self._thread is None:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("W&B is slower than the training: some points go to metrics.jsonl only")

    def _close(self) -> None:
        assert self._thread is not None
        deadline = time.monotonic() + INIT_SECONDS + FINISH_SECONDS
        try:
            self._tasks.put(None, timeout=FINISH_SECONDS)
        except queue.Full:
            logger.warning("W&B did not take the last points in time")
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("W&B did not finish in time and is left behind; metrics.jsonl has every number")
        if self._dropped:
            logger.warning("%d W&B entries were dropped; metrics.jsonl has every number", self._dropped)
        if self._offline_dir is not None:
            parts = sorted(str(path) for path in self._offline_dir.parent.glob(f"offline-run-*-{self._run_id}"))
            print(f"W&B ran offline. To upload it: wandb sync {' '.join(parts)}", flush=True)

    def _work(self, arguments: Mapping[str, Any]) -> None:
        """The thread: start the run, then do the tasks in order until None."""
        try:
            run = self._start_run(arguments)
        except Exception as error:
            self._give_up("could not start", error)
            return
        while (task := self._tasks.get()) is not None:
            try:
                task(run)
            except Exception as error:
                self._give_up("failed", error)

    def _start_run(self, arguments: Mapping[str, Any]) -> Any:
        import wandb

        settings: dict[str, Any] = {"init_timeout": INIT_SECONDS, "console": "off", "silent": True}
        # By itself the SDK also sends the working tree's diff, which may hold data, and code.
        settings |= {"disable_git": True, "disable_code": True, "save_code": False}
        if "finish_timeout" in wandb.Settings.model_fields:  # since 0.24; before, only our own deadline holds
            settings["finish_timeout"] = FINISH_SECONDS
        online = resolve_mode(self._tracking.mode) == "online"
        run = None
        if online:
            try:
                run = wandb.init(**arguments, mode="online", resume="allow", settings=wandb.Settings(**settings))
            except Exception as error:
                logger.warning("W&B is not reachable, the run goes on offline: %s", _first_line(error))
                wandb.teardown()  # frees the run id, which the failed start still holds
        if run is None:
            run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(**settings))
            self._offline_dir = Path(run.settings.sync_dir)
        # One clock for everything: evaluations come at other times than logs, and W&B drops steps that go back.
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        if run.url:
            print(f"W&B: {run.url}", flush=True)
        return run

    def _give_up(self, what: str, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("W&B %s, training goes on without it: %s", what, _first_line(error))


def attach(
    output_dir: Path, config: Mapping[str, Any], tracking: TrackingConfig, paths: list[Path], summary: Mapping[str, Any]
) -> None:
    """Add what came after training to the W&B run of `output_dir`: files as a new artefact version, numbers as summary.

    Does nothing where training logged no run. `config` is the resolved one of the run.
    """
    latest = output_dir / "wandb" / "latest-run"
    if not tracking.wandb or resolve_mode(tracking.mode) == "disabled" or not latest.exists():
        return
    hook = WandbHook(tracking, str(config["name"]))
    hook.load_state_dict({"run_id": latest.resolve().name.rsplit("-", 1)[-1]})
    hook.on_start(RunRecord(config, output_dir, 0, 0, rank=0, world_size=int(config["world_size"])))
    hook.on_end(EndRecord(0, None, summary, paths))


def resolve_mode(mode: str) -> str:
    """`online` or `offline` for `auto`: WANDB_MODE if it is set, online with credentials, else offline.

    Credentials are what W&B itself looks for: WANDB_API_KEY, WANDB_IDENTITY_TOKEN_FILE or an entry in the netrc file.
    """
    if mode != "auto":
        return mode
    if environment := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(environment, environment)
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host) is not None:
                return "online"
        except (OSError, netrc.NetrcParseError):
            continue
    return "offline"


def _artifact(name: str, paths: list[Path]) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type="calibration")
    for path in paths:
        artifact.add_file(str(path))
    return artifact


def _first_line(error: Exception) -> str:
    # Later lines hold what the server or the SDK quoted, which may be a header with a key.
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
