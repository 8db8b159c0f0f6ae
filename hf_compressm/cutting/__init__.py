"""A cut in three steps: `measure` a model, `Measurement.plan` the sizes and states, `Plan.apply_` it."""

from .measurement import Measurement
from .measuring import measure
from .plan import Plan

__all__ = ["Measurement", "Plan", "measure"]
