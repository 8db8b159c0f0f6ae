"""What was changed for a while is put back, whatever ends it; and Ctrl-C waits while a change runs."""

from .deferred import uninterrupted
from .random_numbers import same_random_numbers
from .restoring import restoring

__all__ = ["restoring", "same_random_numbers", "uninterrupted"]
