"""CompreSSMConfig: what to cut, and how.

How to choose. `hf-compressm analyze MODEL --frontier` shows the fewest states for five budgets, layer by layer; `hf-compressm
compress MODEL --dry-run` one cut and its perplexity.

- `max_divergence` after training: 0.003 can hardly be measured in perplexity, 0.01 is about 1%, 0.03 about 3%; in Mamba-2, recall
  loses three to four times that. `report.plot()` shows what any other number of states would have cost.
- `tolerance` in training, the paper's rule: it is given up anew at each of the `num_reductions` attempts; start with 0.02 to 0.05.
- `realization="project_heads"` for a Mamba-2 that decodes many sequences at once, or needs the smallest state: it loses least by
  far. It is not the default, since it adds parameters, and at the same state prefill takes 1.5 times as long as with a projection
  of the layer, training 1.3.
- `engine="llama.cpp"` and the like, or `uniform=True`, for what wants one size for all layers. It costs much.
- `heal` if a smaller state is worth a minute of training: a few million tokens.
- `refit=3, start=0.7, end=0.85` while a Mamba-2 language model trains: cut late, and with a fit at the cut.
- Calibrate and heal on text like that of the model's use, 64 x 512 tokens or more.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

TARGETS = ("max_divergence", "tolerance", "state_size", "ratio")
"""The fields of which one at most is given."""
MAX_DIVERGENCE, TOLERANCE = 0.01, 0.05
"""Default targets: after training, and in training."""
REFIT, REFIT_IN_TRAINING = 3, 0
"""Default rounds of fits: after training, and in training."""
REALIZATIONS = ["auto", "select", "project", "project_heads"]
"""What `realization` may be; `layers.register_realization` adds to it."""
ENGINES: dict[str, Any] = {}
"""What `engine` may be, by name; `layers.register_engine` adds to it."""
Estimator = Literal["ltv", "mean_lti"]
Weights = Literal["auto", "fisher", "gate"]
HealParameters = Literal["cut", "all"]
Selection = Literal["auto", "greedy", "ghost", "lti_modal", "magnitude", "random"]


@dataclass(frozen=True)
class CompreSSMConfig:
    """How small the state of each layer becomes, and how the smaller state is made.

    Args:
        max_divergence: the most that the slim model's predictions may diverge from the full one's, as mean Kullback-Leibler
            divergence in nats per token; 0.01 raises the perplexity by about 1%. The smallest state that keeps it on tokens
            that neither statistics nor fits have seen. Of a model without a head, the relative error of its last hidden
            states. The default target after training, at 0.01, when no other is given.
        tolerance: share of each layer's Hankel energy that may be given up (the paper's tau), in [0, 1); 0 means no
            cut. The default target in training, at 0.05.
        state_size: the size itself, for all layers or as {layer: size}. Honoured exactly.
        ratio: share of all states to keep, in (0, 1], allocated over the layers by what each cut costs.
        realization: "select" keeps r of the N states; "project" (Mamba-2) scans an r-dimensional projection of the
            state; "project_heads" (Mamba-2) another one in each head, of a size of its own, where a layer's size is the
            heads' mean; "balance" truncates time-invariant layers. "auto" is that for them, selects for Mamba-1, and for
            Mamba-2 projects unless `uniform` asks for a stock checkpoint.
        selection: which states `select` keeps. "auto" is this library's own: least-squares read-out for Mamba-1, greedy
            elimination for Mamba-2. The others are baselines, without a read-out fit: "greedy", "ghost" (P times C^2,
            arXiv 2602.11408), "lti_modal" (AIRE-style), "magnitude" of the weights, "random".
        refit: rounds, with "auto", in which a selected layer is fitted to the full layer's output on the calibration data; 0
            fits only the read-out C of Mamba-1. In Mamba-1 it is A, B, C and D, by least squares. In Mamba-2 it is the kept
            rows of B and C in `in_proj` and their channels of `conv1d`, by a hundred steps of L-BFGS a round, or fewer if
            what one of eight sequences loses, which are not fitted to, no longer falls. By default 3 after training; while
            training none, which fits everything itself, unless it is given: a fit at each cut helps Mamba-2's late ones.
        weights: what a layer's channels and tokens count in statistics and fits. "fisher": as much as the loss depends on
            them, by its gradient for labels sampled from the model's own predictions, so that what a cut costs is known in
            nats, over all layers alike. "gate": as much of them as reaches the residual stream. "auto" is "fisher" for a
            max_divergence or a ratio, where the model has a head and its backward pass is quick, and else "gate".
        estimator: Gramians of the time-varying system by scan ("ltv") or of its time mean ("mean_lti", the paper's).
        uniform: one size for all layers, the largest that any of them needs.
        engine: what shall run the slim model: "llama.cpp", "llama.cpp-cuda", "mlx", "vllm", "sglang", "tensorrt-llm" or
            "transformers". The sizes are those that it runs fast, `uniform` is set where it reads stock checkpoints alone,
            and what it can't run is refused.
        multiple_of: sizes that the library chooses are rounded up to a multiple of it. By default any size for Mamba-1, and
            for Mamba-2 multiples of 8, or any mean over heads. "tuned", the default in training, takes few sizes, for which
            kernels need not be tuned again and again: for Mamba-2 powers of two from 16 up.
        min_state_size: no layer becomes smaller than this.
        heal: tokens to learn from after the cut, by distillation from the full model; 0 is off. A few millions take
            away half of what a hard cut of Mamba-2 costs, and a quarter of Mamba's. The text is `calibration_data`, or what stands in for it,
            a part of which is held out: the weights that diverge least there are kept, those of the cut if none is better. A
            `max_divergence` is kept by the cut already, and healing gains what it gains on top. Only of `compress_` and
            `compress_pretrained`; a Mamba on a GPU wants its kernels (the `cuda` extra).
        heal_parameters: what is trained: in mixers that were "cut", the parameters that A, B, C, D and the steps come from, or
            "all" of the model, which takes a second copy of it.
        seed: of the "random" selection, of the order in which healing reads its text, and of the labels that "fisher" samples: the
            statistics of the default cut depend on it a little.
        start, end: in training, the window of the cuts: shares of the steps if below 1, else steps. The paper cuts in
            the warm-up. The last cut comes at `end`.
        num_reductions: attempts to cut, equidistant between `start` and `end`. A tolerance is given up at each of them;
            a state_size or ratio is reached in equal steps.
        min_reduction: with a tolerance, an attempt that would remove a smaller share of all states is skipped.
        calibration_batches: training batches that the statistics are taken on, the last ones before the attempt.
        calibration_seconds: measuring takes no further calibration batch after so many seconds, and a warning says how many
            tokens it got to: for a model after training. None: for the package's own text 10 on a GPU and 60 on a CPU for
            each 130M parameters, and no bound for data that is given.
        rollback: undo a cut that makes the metric of the evaluation set worse by more than this, and stop cutting. None
            keeps all cuts.

    Raises:
        ValueError: if a value is not what its field takes or out of range, or contradicts another; or if two targets are
            given.
    """

    max_divergence: float | None = None
    tolerance: float | None = None
    state_size: int | Mapping[int, int] | None = None
    ratio: float | None = None
    realization: str = "auto"
    selection: Selection = "auto"
    refit: int | None = None
    weights: Weights = "auto"
    estimator: Estimator = "ltv"
    uniform: bool = False
    engine: str | None = None
    multiple_of: int | Literal["tuned"] | None = None
    min_state_size: int = 1
    heal: int = 0
    heal_parameters: HealParameters = "cut"
    seed: int = 0
    start: float = 0
    end: float = 0.1
    num_reductions: int = 4
    min_reduction: float = 0.05
    calibration_batches: int = 4
    calibration_seconds: float | None = None
    rollback: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            value = value.item() if getattr(value, "ndim", None) == 0 else value  # of torch or numpy
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _FIELDS[field.name](field.name, value))
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise ValueError(f"Give one target, not {' and '.join(targets)}: drop all but one of them.")
        why = "uniform=True"
        if self.engine is not None and ENGINES[self.engine].uniform:
            object.__setattr__(self, "uniform", True)
            why = f"engine={self.engine!r}"
        if isinstance(self.state_size, Mapping) and self.uniform:
            raise ValueError(f"{why} takes one state_size for all layers, not one for each: give an int.")
        sizes = self.state_size.values() if isinstance(self.state_size, Mapping) else [self.state_size]
        if any(size is not None and size < self.min_state_size for size in sizes):
            raise ValueError(
                f"state_size={self.state_size} is below min_state_size={self.min_state_size}: drop min_state_size, which "
                "is for sizes that the library chooses, or lower it."
            )
        if self.uniform and self.realization in ("project", "project_heads"):
            raise ValueError(
                f"{why} asks for a stock checkpoint, which realization={self.realization!r} can't be: drop one."
            )
        if (self.start < 1) == (self.end < 1) and self.start >= self.end:
            raise ValueError(f"start must come before end, got {self.start} and {self.end}.")

    @classmethod
    def of(cls, config: ConfigLike) -> CompreSSMConfig:
        """A config from itself, from its values as a dictionary, or the default one from None.

        Raises:
            TypeError: if it is none of these, or the dictionary names a field that there is not.
            ValueError: if a value is out of range or two targets are given.
        """
        if config is None or isinstance(config, cls):
            return config or cls()
        if not isinstance(config, Mapping):
            raise TypeError(
                f"A config is a CompreSSMConfig or a dictionary of its values, got {config!r}: write, for example, "
                "CompreSSMConfig(state_size=8)."
            )
        known = [field.name for field in fields(cls)]
        for name in config:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}."
                raise TypeError(f"CompreSSMConfig has no field {name!r}: {hint}")
        return cls(**config)

    @property
    def has_target(self) -> bool:
        """Whether any target was given."""
        return any(getattr(self, name) is not None for name in TARGETS)

    def after_training(self) -> CompreSSMConfig:
        """With the default target of a cut after training, if none was given."""
        return self if self.has_target else replace(self, max_divergence=MAX_DIVERGENCE)

    @property
    def fit_rounds(self) -> int:
        """`refit`, or its default after training."""
        return REFIT if self.refit is None else self.refit

    @property
    def weighs_by_loss(self) -> bool:
        """Whether channels count as much as the loss depends on them, if it can be had."""
        by_loss = self.max_divergence is not None or self.ratio is not None
        return self.weights == "fisher" or (self.weights == "auto" and by_loss)

    @property
    def refits(self) -> bool:
        """Whether cut layers are refitted on what the mixers read."""
        return self.fit_rounds > 0 and self.selection == "auto" and self.tolerance != 0

    def to_dict(self) -> dict[str, Any]:
        """The values as a dictionary that JSON can hold; `CompreSSMConfig(**d)` gives the config back."""
        values = asdict(self)
        if isinstance(self.state_size, Mapping):
            values["state_size"] = {str(i): r for i, r in self.state_size.items()}
        return values


ConfigLike: TypeAlias = CompreSSMConfig | Mapping[str, Any] | None
"""A config, its values as a dictionary, or None for the default."""


def _is_number(value: Any) -> bool:
    """Of Python or numpy, finite; True and False are none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and (isinstance(value, Integral) or math.isfinite(value))


def _number(interval: str, lies_in: Callable[[float], bool], what: str = "") -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not lies_in(value):
            raise ValueError(f"{name} must be a number {interval}, got {value!r}{what and f': it is {what}'}.")
        return int(value) if isinstance(value, Integral) else float(value)

    return check


def _whole(least: int) -> Callable[[str, Any], int]:
    """From `least` up, also as a float (8.0) or a numpy integer."""

    def check(name: str, value: Any) -> int:
        if not _is_number(value) or value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
        if not least <= value < _MOST:
            raise ValueError(
                f"{name} must be at least {least}{f' and below {_MOST}' if value > least else ''}, got {value!r}."
            )
        return int(value)

    return check


def _one_of(values: Sequence[str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}.")
        return str.__str__(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _sizes(name: str, value: Any) -> int | dict[int, int]:
    """One size, or {layer: size}, whose layers are strings once they were in JSON."""
    if not isinstance(value, Mapping):
        if isinstance(value, Sequence) and not isinstance(value, str):
            raise ValueError(f"{name} of each layer is given as {{layer: size}}, got {value!r}.")
        return _whole(1)(name, value)
    sizes: dict[int, int] = {}
    for key, size in value.items():
        layer = _whole(0)(f"The layer in {name}", int(key) if isinstance(key, str) and key.isdecimal() else key)
        if layer in sizes:
            raise ValueError(f"{name} names layer {layer} twice, got {value!r}.")
        sizes[layer] = _whole(1)(f"{name} of layer {layer}", size)
    if not sizes:
        raise ValueError(f"{name}={{}} names no layer: give {{layer: size}}, or one size for all layers.")
    return sizes


_MOST = 2**32

# What each field takes. None is taken where it is the default.
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "max_divergence": _number("above 0", lambda x: x > 0, "a divergence in nats per token; tolerance=0 cuts nothing"),
    "tolerance": _number("in [0, 1)", lambda x: 0 <= x < 1, "a share of the Hankel energy"),
    "state_size": _sizes,
    "ratio": _number("in (0, 1]", lambda x: 0 < x <= 1, "the share of the states to keep"),
    "realization": lambda name, value: _one_of(REALIZATIONS)(name, value),  # which may be added to
    "selection": _one_of(get_args(Selection)),
    "refit": _whole(0),
    "weights": _one_of(get_args(Weights)),
    "estimator": _one_of(get_args(Estimator)),
    "uniform": _flag,
    "engine": lambda name, value: _one_of(list(ENGINES))(name, value),  # the same
    "multiple_of": lambda name, value: value if value == "tuned" else _whole(1)(name, value),
    "min_state_size": _whole(1),
    "heal": _whole(0),
    "heal_parameters": _one_of(get_args(HealParameters)),
    "seed": _whole(0),
    "start": _number("from 0 up", lambda x: x >= 0),
    "end": _number("above 0", lambda x: x > 0),
    "num_reductions": _whole(1),
    "min_reduction": _number("in [0, 1)", lambda x: 0 <= x < 1, "a share of the states"),
    "calibration_batches": _whole(1),
    "calibration_seconds": _number("from 0 up", lambda x: x >= 0, "seconds"),
    "rollback": _number("from 0 up", lambda x: x >= 0, "a change of the metric"),
}
