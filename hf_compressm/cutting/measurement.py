"""What was measured on a model: the ground that any number of cuts can be planned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..config import CompreSSMConfig, ConfigLike, Weights
from ..hankel.spectra import hankel_spectra
from ..hankel.statistics import Statistics
from ..layers import Layer, MixerInputs, realization_of
from ..reporting.report import CompressionReport
from .plan import Plan, make_plan, make_report
from .scans import quick_scans


@dataclass(frozen=True)
class Measurement:
    """What the states of a model's layers do on calibration data. `plan` as many cuts on it as you like.

    Attributes:
        model: that was measured. It is read when planning, and not changed.
        layers: its SSM layers.
        statistics: of each of them.
        estimator: that they were taken by.
        weights: of channels and tokens in them, "fisher" or "gate".
        inputs: what each mixer read, by layer index, for refits; None if it was not kept.
        sample: a few sequences of the data, for the layers' sensitivities; None where all layers shall count the same.
        held_out: sequences that nothing was measured on, to judge cuts by.
    """

    model: PreTrainedModel
    layers: Sequence[Layer]
    statistics: Sequence[Statistics]
    estimator: str = "ltv"
    weights: Weights = "gate"
    inputs: Mapping[int, MixerInputs] | None = None
    sample: Mapping[str, Tensor] | None = None
    held_out: Sequence[Mapping[str, Tensor]] = ()

    def plan(self, config: ConfigLike = None) -> Plan:
        """Choose the sizes and the states; nothing is changed.

        Args:
            config: what to cut; by default as much as keeps a `max_divergence` of 0.01.

        Raises:
            ValueError: if the target can't be reached, or asks for what was not measured; or if the model was cut since.
        """
        config = CompreSSMConfig.of(config).after_training()
        if config.heal:
            raise ValueError(
                "A plan is a cut, which is not healed: give heal to compress_ or compress_pretrained, or plan with heal=0."
            )
        if config.estimator != self.estimator:
            raise ValueError(
                f"The model was measured with estimator={self.estimator!r}, and the config has {config.estimator!r}: "
                "measure it with this config."
            )
        wanted = "gate" if config.tolerance is not None and config.weights == "auto" else config.weights
        if wanted not in ("auto", self.weights):
            raise ValueError(
                f"The model was measured with weights={self.weights!r}, and a cut by this config wants {wanted!r}: measure "
                "it with this config."
            )
        if any(
            layer.state_size != entry.state_size for layer, entry in zip(self.layers, self.statistics, strict=True)
        ):
            raise ValueError("The model was cut since it was measured: measure it again.")
        name = realization_of(config, self.layers)
        selects = any(layer.realizations[name].reads_contributions for layer in self.layers)
        if selects and not all(entry.contributions for entry in self.statistics):
            raise ValueError(
                f"The measurement was for a projection and left out what realization={name!r} chooses states by: measure with this "
                "config."
            )
        fits = config.refits and any(layer.realizations[name].has_fit for layer in self.layers)
        if fits and self.inputs is None:
            raise ValueError(
                "The measurement kept no inputs to refit the layers on: measure with this config, or plan with refit=0."
            )
        if config.max_divergence is not None and not self.held_out:
            raise ValueError(
                "The measurement held no data back, which a max_divergence is measured on: measure with this config."
            )
        with quick_scans(self.layers):
            return make_plan(
                self.model,
                self.layers,
                self.statistics,
                config,
                weights=self.weights,
                inputs=self.inputs if fits else None,
                sample=self.sample,
                held_out=self.held_out,
            )

    def report(self) -> CompressionReport:
        """The Hankel singular values of every layer, in a report in which every layer keeps its size."""
        return make_report(self.model, self.layers, hankel_spectra(self.statistics), {}, "measured")
