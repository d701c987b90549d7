"""A vLLM server draws the answers: it gets the policy's weights before each round, and proves that it has them.

Rank 0 hands weights over as safetensors in a directory that the server reads, and compares log-probs; each rank asks for its
own share. Whatever fails is told to all ranks before any of them goes on: a server that is lost is waited for, or launched
again, and given the weights anew; after `rollouts.engine.wait` seconds every rank raises the same EngineFailure.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from calibtrain.confidence.answering import Answerer
from calibtrain.config import RunConfig
from calibtrain.distributed import all_agree, gather_lists, on_main, wait_for_main
from calibtrain.engines import Completion, Draws, LaunchedServer, VLLMServer
from calibtrain.engines.address import shown
from calibtrain.errors import EngineFailure, Unreachable, UserError
from calibtrain.models.arithmetic import settled
from calibtrain.training.handed_weights import write_weights
from calibtrain.training.preemption import stop_was_asked
from calibtrain.training.weight_proof import Told, WeightProof

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SECONDS = 10.0
LOOK_SECONDS = 1.0
"""Between two looks for a server that is away."""
START = "start"
"""A link to the newest weights: what a launched server is started on, and again."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why something did not come about. `lost`: the server is away, and may come back."""

    text: str
    lost: bool


class ServedSampling:
    """A SamplingEngine behind an address, or launched by rank 0. Raises UserError where there is no vLLM to launch."""

    def __init__(
        self,
        config: RunConfig,
        answerer: Answerer,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.config, self.settings, self.answerer = config, config.rollouts.engine, answerer
        self.world, self.template = answerer.world, answerer.template
        dtype = settled(config).model.dtype
        exact = dtype == "fp32" or (config.model.lora is None and config.model.adapter is None)
        tolerance = self.settings.tolerance_in(dtype)
        self.proof = WeightProof(answerer, texts, prompts, dtype=dtype, tolerance=tolerance, exact=exact)
        self.directory = (self.settings.directory or config.output_dir / "engine").absolute()
        self.launched: LaunchedServer | None = None  # on rank 0
        # A name of its own: of two runs at one server each notices the other's weights.
        self.name, url = on_main(lambda: (secrets.token_hex(4), self.settings.address or self._launch(dtype)))
        self.server = VLLMServer(url)
        self.version: int | None = None  # of the weights that the server has, where it is known
        self.metrics: dict[str, float] = {}
        self._ahead: _Ahead | None = None
        self._has_answered = False  # since it was started; on rank 0

    def push(self, version: int) -> None:
        """Hand the policy's present weights over and verify that the server answers by them. Collective."""
        if self.version == version:
            return
        began, lost = time.monotonic(), None
        self.answerer.module.settle()
        self._write(version)
        while True:
            told, problem = self._on_main(lambda: self._hand_over(version))
            if told is not None:
                problem = self._unproven(told)
            if problem is None:
                break
            lost = lost or time.monotonic()
            self._await(problem, lost)
        self.server.model, self.server.max_model_len = on_main(lambda: (self.server.model, self.server.max_model_len))
        self.version = version
        self.metrics["push_seconds"] = time.monotonic() - began

    def sample(self, draws: Draws, version: int) -> list[list[Completion]]:
        """The completions of each prompt; what `start` began is returned as it was drawn. Collective."""
        lost = None
        while True:
            ahead, self._ahead = self._ahead, None
            if not all_agree(ahead is not None and ahead.draws == draws, self.world.device):
                ahead = None
                self.push(version)
            began, drawn_by = time.monotonic(), version if ahead is None else ahead.version
            groups, problem = self._drawn(draws, drawn_by) if ahead is None else self._outcome(ahead)
            problem = self._agreed(problem)
            if problem is None:
                self.metrics["sampling_seconds"] = time.monotonic() - began
                self.metrics["staleness"] = float(version - drawn_by)
                return groups
            self.version = None  # whoever answers there next has other weights
            lost = lost or time.monotonic()
            self._await(problem, lost)

    def start(self, draws: Draws) -> None:
        """Begin to draw by the weights that were pushed last, in threads of this process. Local."""
        assert self.version is not None
        self._ahead = _Ahead(draws, self.version)
        self._ahead.begin(self.server, self._salt(self.version))

    def started(self) -> tuple[int, list[list[Completion]]] | None:
        """The version and the completions of what was started, once they are there; None without any. Local.

        Who was asked to stop waits for them STOP_SECONDS alone: a checkpoint in time is worth more.
        """
        if self._ahead is None or not self._ahead.there(STOP_SECONDS if stop_was_asked() else None):
            return None
        groups, problem = self._outcome(self._ahead)
        return None if problem is not None else (self._ahead.version, groups)

    def restore(self, draws: Draws, version: int, groups: list[list[Completion]]) -> None:
        """Take what `started` gave for the outcome of a `start` of the same draws. Local."""
        self._ahead = _Ahead(draws, version, outcome=(groups, None))

    def close(self) -> None:
        """End the server that was launched, and clear away what was handed over. Local."""
        self._ahead = None
        if self.launched is not None:
            self.launched.end()
            self.launched = None
        if self.world.is_main:
            self._clear()

    def _launch(self, dtype: str) -> str:
        """Get a server ready to be started, and return its address."""
        settings = self.settings
        self.launched = LaunchedServer(
            self.directory / START,
            self.config.output_dir / "engine" / "server.log",
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
            python=settings.python,
            arguments=("--max-model-len", str(self.config.data.max_length), *settings.arguments),
            environment=settings.environment,
            host=settings.host,
        )
        return self.launched.url

    def _salt(self, version: int) -> str:
        """What the server calls the weights of a version, and what keeps its cache for them."""
        return f"calibtrain-{self.name}-{version}"

    def _target(self, version: int) -> Path:
        return self.directory / f"weights-{self.name}-{version:07d}"

    def _hand_over(self, version: int) -> Told:
        """Let the server load the weights, and ask it what proves that. On rank 0."""
        self._connect()
        salt = self._salt(version)
        self.server.load(self._target(version), salt)
        told = self.proof.ask(self.server, salt, sorted(self.template.stop_ids))
        self._check_version(salt)
        return told

    def _unproven(self, told: Told) -> Problem | None:
        """Why the server does not answer by the weights here, if so. Collective."""
        ours = self.proof.ours(told)
        text, found = on_main(lambda: (self.proof.problem(told, ours), self.proof.found))
        self.metrics |= found
        return None if text is None else Problem(f"{self.server.url}: {text}", lost=False)

    def _write(self, version: int) -> None:
        """A directory that vLLM loads, whole or not at all; that of the version before goes. Collective."""
        target = self._target(version)
        partial = target.with_name(target.name + ".partial")

        def begin() -> None:
            self._clear()
            partial.mkdir(parents=True)

        def finish() -> None:
            partial.rename(target)
            link = self.directory / f"{START}.partial"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            link.replace(self.directory / START)

        try:
            wait_for_main(begin)
            write_weights(self.answerer.module.policy, self.config.model, self.template, partial)
            wait_for_main(finish)
        except OSError as error:
            text = f"rollouts.engine.directory: {self.directory} cannot be written ({error})"
            raise EngineFailure(on_main(lambda: text)) from None  # the same on every rank, which keep what was learnt

    def _clear(self) -> None:
        """Delete the weights of earlier versions, and of a run that was killed before this one."""
        (self.directory / START).unlink(missing_ok=True)
        for old in self.directory.glob("weights-*"):
            shutil.rmtree(old, ignore_errors=True)

    def _connect(self) -> None:
        """Find the server there, or start it. Raises Unreachable where it does not answer yet. On rank 0."""
        if self.launched is not None and not self.launched.alive:
            if self.launched.process is not None and not self._has_answered:
                raise UserError(
                    f"vLLM ended before it answered: ... {self.launched.last_words()} ({self.launched.log})"
                )
            self._has_answered = False
            self.launched.start()
        self.server.connect()
        self._has_answered = True

    def _check_version(self, salt: str) -> None:
        if (found := self.server.version()) != salt:
            raise Unreachable(
                f"{self.server.url}: the server has other weights than it was given ({shown(found, 80)}, not {salt}): it "
                "was started anew, or another run uses it"
            )

    def _drawn(self, draws: Draws, version: int) -> tuple[list[list[Completion]], Problem | None]:
        """The completions of this rank's prompts by the weights of a version, or the problem. Local."""
        salt = self._salt(version)
        return self._whole(draws, version, lambda: self.server.sample(draws, salt))

    def _outcome(self, ahead: _Ahead) -> tuple[list[list[Completion]], Problem | None]:
        if ahead.outcome is None:
            ahead.outcome = self._whole(ahead.draws, ahead.version, ahead.wait)
        return ahead.outcome

    def _whole(
        self, draws: Draws, version: int, first: Callable[[], list[list[Completion]]]
    ) -> tuple[list[list[Completion]], Problem | None]:
        salt = self._salt(version)
        try:
            groups = self.server.go_on(draws, first(), salt)
            self._check_version(salt)
        except UserError as error:
            return [], _problem(error)
        return [[replace(one, version=version) for one in group] for group in groups], None

    def _await(self, problem: Problem, lost: float) -> None:
        """Wait for a server that was lost at this time.

        Raises EngineFailure, on every rank, for any other problem, or when it was too long.
        """

        def wait() -> None:
            if self.launched is None or self._has_answered:  # else it is only starting
                logger.warning("rollouts: %s; waiting for the server", problem.text)
            while True:
                time.sleep(LOOK_SECONDS)
                if stop_was_asked():
                    raise UserError(f"{problem.text}; asked to stop (SIGTERM) while waiting for it")
                if time.monotonic() - lost > self.settings.wait:
                    raise UserError(f"{problem.text}; waited {self.settings.wait:g} s (rollouts.engine.wait)")
                try:
                    return self._connect()
                except Unreachable:
                    continue

        if problem.lost:
            problem = self._on_main(wait)[1] or problem
        if not problem.lost:
            raise EngineFailure(problem.text)

    def _on_main(self, call: Callable[[], T]) -> tuple[T | None, Problem | None]:
        """What rank 0's call returns, or the problem that it meets, on every rank, however long it takes. Collective."""
        found: list[Any] = [None, None]

        def guarded() -> None:
            try:
                found[0] = call()
            except UserError as error:
                found[1] = _problem(error)

        wait_for_main(guarded)
        return on_main(lambda: (found[0], found[1]))

    def _agreed(self, problem: Problem | None) -> Problem | None:
        """A problem of any rank, one that waiting does not mend first, on every rank. Collective."""
        return min(gather_lists([] if problem is None else [problem]), key=lambda one: one.lost, default=None)


class _Ahead:
    """Draws under way in the background, or their outcome."""

    def __init__(
        self, draws: Draws, version: int, outcome: tuple[list[list[Completion]], Problem | None] | None = None
    ) -> None:
        self.draws, self.version, self.outcome = draws, version, outcome
        self._found: list[list[list[Completion]]] = []
        self._error: list[BaseException] = []

    def begin(self, server: VLLMServer, salt: str) -> None:
        """Start to draw; the process may end all the same."""

        def draw() -> None:
            try:
                self._found.append(server.sample(self.draws, salt))
            except BaseException as error:
                self._error.append(error)

        self._thread = Thread(target=draw, name="rollouts-ahead", daemon=True)
        self._thread.start()

    def there(self, seconds: float | None) -> bool:
        """Whether the draws are there, or have failed, after at most so many seconds; None: however long it takes."""
        if self.outcome is None:
            self._thread.join(seconds)
        return self.outcome is not None or not self._thread.is_alive()

    def wait(self) -> list[list[Completion]]:
        """What was drawn; raises what it met."""
        self._thread.join()
        if self._error:
            raise self._error[0]
        return self._found[0]


def _problem(error: UserError) -> Problem:
    return Problem(str(error), isinstance(error, Unreachable))
