"""What a cut needs of the processes that train a model, behind one interface: one module for each way to train."""

from .agreement import absent, agree, announce, join, launched, processes, together
from .backend import Backend
from .find import find_backend, register
from .loop import Loop
from .one_process import OneProcess

__all__ = [
    "Backend",
    "Loop",
    "OneProcess",
    "absent",
    "agree",
    "announce",
    "find_backend",
    "join",
    "launched",
    "processes",
    "register",
    "together",
]
