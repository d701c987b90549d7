"""Ways to tell right answers from wrong ones, solved on the same graded answers: each gives a function of a head's inputs.

A candidate is called with inputs and grades of N answers and a seed, and gives a function from inputs to log-odds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibtrain.calibration.scores import sigmoid
from calibtrain.confidence.features import Fingerprint
from calibtrain.confidence.head import HeadInputs, fit_head
from calibtrain.models.confidence_head import log_odds, normalized

Array = NDArray[Any]
Told = Callable[[HeadInputs], Array]
Candidate = Callable[[HeadInputs, Array, int], Told]
NOBODY = Fingerprint("", "")
MEMBERS, FOLDS = 5, 5


def of_layers(inputs: HeadInputs, layers: Sequence[int], positions: Sequence[int] = (0, 1, 2)) -> HeadInputs:
    """With the states of some of the stored layers and positions alone; the others are zeros, which say nothing."""
    states = inputs.states[:, list(layers)].astype(np.float32)
    for position in {0, 1, 2} - set(positions):
        states[:, :, position] = 0
    return HeadInputs(inputs.logprob, inputs.readings, states)


def linear(layers: Sequence[int], positions: Sequence[int] = (0, 1, 2)) -> Candidate:
    """The product's head on these of the stored layers, without its step back on foreign questions."""

    def solve(inputs: HeadInputs, correct: Array, seed: int) -> Told:
        head, _ = fit_head(of_layers(inputs, layers, positions), correct, range(len(layers)), NOBODY, seed=seed)
        alone = replace(head, outside=None)
        return lambda other: alone.logit(of_layers(other, layers, positions))

    return solve


def readings_alone(inputs: HeadInputs, correct: Array, seed: int) -> Told:
    """The product's head without any state: what a server could give, but for the entropies."""
    return linear((0,), ())(inputs, correct, seed)


class _Coordinates:
    """Answers as numbers: log-odds of the likelihood, readings, and `rank` main directions of all states."""

    def __init__(self, inputs: HeadInputs, layers: Sequence[int], rank: int) -> None:
        from calibtrain.confidence.head import _main_directions

        self.layers = list(layers)
        offset, readings, states = self._raw(inputs)
        self.center = [(one.mean(0), one.std(0) + 1e-9) for one in (offset, readings)]
        self.mean = states.mean(0)
        self.directions = _main_directions(states - self.mean, rank)
        self.scale = ((states - self.mean) @ self.directions.T).std(0) + 1e-9

    def __call__(self, inputs: HeadInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds (N,), and all coordinates (N, 1 + readings + rank), each of variance 1."""
        offset, readings, states = self._raw(inputs)
        plain = [(one - m) / s for one, (m, s) in zip((offset, readings), self.center, strict=True)]
        z = (states - self.mean) @ self.directions.T / self.scale
        found = torch.from_numpy(np.concatenate([*plain, z], axis=1).astype(np.float32))
        return torch.from_numpy(offset[:, 0].astype(np.float32)), found

    def _raw(self, inputs: HeadInputs) -> tuple[Array, Array, Array]:
        states = torch.from_numpy(inputs.states[:, self.layers].astype(np.float32))
        offset = log_odds(torch.from_numpy(np.asarray(inputs.logprob, dtype=np.float64))).numpy()
        return offset[:, None], np.asarray(inputs.readings, dtype=np.float64), normalized(states).flatten(1).numpy()


def network(
    layers: Sequence[int], rank: int = 128, hidden: int = 128, decay: float = 1.0, epochs: int = 15
) -> Candidate:
    """MEMBERS networks of one hidden layer by the log score, averaged; likelihood as offset, so that they start as it."""

    def solve(inputs: HeadInputs, correct: Array, seed: int) -> Told:
        where = _Coordinates(inputs, layers, rank)
        offset, x = where(inputs)
        y = torch.from_numpy(correct.astype(np.float32))
        nets = [_trained(offset, x, y, hidden, decay, epochs, seed * MEMBERS + k) for k in range(MEMBERS)]

        def tell(other: HeadInputs) -> Array:
            given, z = where(other)
            with torch.no_grad():
                return torch.stack([net(z)[:, 0] + given for net in nets]).mean(0).double().numpy()

        return tell

    return solve


def _trained(
    offset: torch.Tensor, x: torch.Tensor, y: torch.Tensor, hidden: int, decay: float, epochs: int, seed: int
) -> torch.nn.Module:
    torch.manual_seed(seed)
    last = torch.nn.Linear(hidden, 1)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], hidden), torch.nn.GELU(), torch.nn.Dropout(0.1), last)
    with torch.no_grad():
        net[0].weight *= 0.5
    steps = epochs * -(-len(y) // 128)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(128):
            told = net(x[rows])[:, 0] + offset[rows]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(told, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def mixture(layers: Sequence[int]) -> Candidate:
    """One direction for each position, shared by the layers, whose states are mixed by weights that are learnt too."""

    def solve(inputs: HeadInputs, correct: Array, seed: int) -> Told:
        places = list(layers)
        offset, readings, states = _layered(inputs, places)
        y = torch.from_numpy(correct.astype(np.float32))
        best, chosen = np.inf, 0.0
        halves = np.random.default_rng(seed).permutation(len(y))
        rows, others = (torch.from_numpy(half) for half in np.split(halves, [len(halves) * 4 // 5]))
        for strength in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
            told = _mixed(offset[rows], readings[rows], states[rows], y[rows], strength)(
                offset[others], readings[others], states[others]
            )
            loss = float(torch.nn.functional.binary_cross_entropy_with_logits(told, y[others]))
            best, chosen = min((best, chosen), (loss, strength))
        final = _mixed(offset, readings, states, y, chosen)
        return lambda other: final(*_layered(other, places)).double().numpy()

    return solve


def _layered(inputs: HeadInputs, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = torch.from_numpy(inputs.states[:, list(layers)].astype(np.float32))
    offset = log_odds(torch.from_numpy(np.asarray(inputs.logprob, dtype=np.float64))).float()
    return offset, torch.from_numpy(np.asarray(inputs.readings, dtype=np.float32)), normalized(states)


def _mixed(
    offset: torch.Tensor, readings: torch.Tensor, states: torch.Tensor, y: torch.Tensor, strength: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Solved by L-BFGS from equal weights; `strength` holds the directions towards 0."""
    mean, deviation = readings.mean(0), readings.std(0) + 1e-6
    centre = states.mean(0)
    size = (states - centre).square().sum((1, 2, 3)).mean().sqrt()
    shares = torch.zeros(states.shape[1], requires_grad=True)
    direction = torch.zeros(states.shape[2], states.shape[3], requires_grad=True)
    plain = torch.zeros(2 + readings.shape[1])
    plain[0] = 1.0
    plain.requires_grad_()
    parameters = [shares, direction, plain]

    def tell(o: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("l,nlph->nph", shares.softmax(0) * len(shares) ** 0.5, (s - centre) / size)
        return plain[0] * o + plain[1] + ((r - mean) / deviation) @ plain[2:] + (mixed * direction).sum((1, 2))

    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(tell(offset, readings, states), y)
        loss = loss + 0.5 * strength * (direction.square().sum() + plain[2:].square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)

    def told(o: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tell(o, r, s)

    return told


def mean_of(*members: Candidate) -> Candidate:
    """The mean of their log-odds."""

    def solve(inputs: HeadInputs, correct: Array, seed: int) -> Told:
        told = [member(inputs, correct, seed) for member in members]
        return lambda other: np.mean([one(other) for one in told], axis=0)

    return solve


def held_out_choice(*members: Candidate) -> Candidate:
    """Whichever has the least log loss on a fifth of the answers, solved anew on all of them."""

    def solve(inputs: HeadInputs, correct: Array, seed: int) -> Told:
        rows = np.random.default_rng(seed).permutation(len(correct))
        held, fit = rows[: len(rows) // 5], rows[len(rows) // 5 :]
        part, rest = (HeadInputs(inputs.logprob[w], inputs.readings[w], inputs.states[w]) for w in (held, fit))
        losses = []
        for member in members:
            told = np.clip(sigmoid(member(rest, correct[fit], seed)(part)), 1e-6, 1 - 1e-6)
            losses.append(-np.where(correct[held], np.log(told), np.log1p(-told)).mean())
        return members[int(np.argmin(losses))](inputs, correct, seed)

    return solve


EVERY, SPREAD, MIDDLE = range(8), (1, 3, 5, 7), (2, 3, 4, 5)
"""Places of the stored layers: all eight, the four that the product reads, and four in the middle."""
CANDIDATES: dict[str, Candidate] = {
    "readings alone": readings_alone,
    "linear, 4 layers (the product)": linear(SPREAD),
    "linear, question's end alone": linear(SPREAD, (0,)),
    "linear, answer's tokens alone": linear(SPREAD, (1,)),
    "linear, answer's end alone": linear(SPREAD, (2,)),
    "linear, 4 middle layers": linear(MIDDLE),
    "linear, 8 layers": linear(EVERY),
    "mixture of 8 layers": mixture(EVERY),
    "networks on 128 directions": network(SPREAD),
    "linear + networks": mean_of(linear(SPREAD), network(SPREAD)),
    "held-out choice": held_out_choice(linear(SPREAD), network(SPREAD), linear(MIDDLE)),
}
