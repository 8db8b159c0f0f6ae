"""What a cut needs of the processes that train a model, behind one interface: one module for each way to train."""

from .backend import Backend
from .find import find_backend, register
from .one_process import OneProcess

__all__ = ["Backend", "OneProcess", "find_backend", "register"]
