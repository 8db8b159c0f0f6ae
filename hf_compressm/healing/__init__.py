"""After a cut, a short distillation from the full model, by transformers' `Trainer`, which leaves nothing else behind."""

from .heal import check_can_heal, cut_and_heal_

__all__ = ["check_can_heal", "cut_and_heal_"]
