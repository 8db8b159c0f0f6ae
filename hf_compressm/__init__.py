"""hf_compressm: smaller SSM states for Hugging Face Mamba models, guided by Hankel singular values.

The rooms, from the ground up; each imports only from those above it here:

    compat/        what is private in other libraries, and what hides it
    config.py      every knob
    interrupts/    what was changed for a while is put back, and Ctrl-C waits while a change runs
    kernels/       scans over time: Triton kernels, and their twins in plain torch
    hankel/        control theory: Gramians, singular values, truncation; tensors in, tensors out
    modeling/      the format of slim models: sizes by layer, the projected mixer, the code that is saved with them
    layers/        one family of SSM layers a module: read a system off a mixer, make its state smaller
    backends/      one way to train a module: one process, DDP, FSDP2, ...
    data/          the tokens that models are measured and evaluated on
    reporting/     what was done: report, figure, record, model card
    cutting/       measure, plan, apply
    healing/       after a cut, a distillation from the full model
    hub/           load, save, push, exchange
    compress.py    compress_, compress_pretrained, hankel_singular_values
    training/      the callback, and what it is made of
    cli/           hf-compressm
"""

from .compress import compress_, compress_pretrained, hankel_singular_values
from .config import CompreSSMConfig
from .cutting import Measurement, Plan, measure
from .reporting.record import get_report
from .reporting.report import CompressionReport
from .training.callback import CompreSSMCallback

__all__ = [
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompressionReport",
    "Measurement",
    "Plan",
    "compress_",
    "compress_pretrained",
    "get_report",
    "hankel_singular_values",
    "measure",
]
