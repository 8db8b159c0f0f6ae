"""The command hf-compressm, which Ctrl-C stops with exit code 130 from its first moment on.

A module beside the package, since importing any part of the package imports torch and transformers first: seconds in which
Ctrl-C would end in a traceback.
"""

import os
import signal


def main() -> None:
    """Run the command line."""
    # Where it is ignored, as by nohup, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from hf_compressm.cli import app

    app()


def _stop(*_: object) -> None:
    """At once: outside of a command there is nothing to tidy up."""
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
