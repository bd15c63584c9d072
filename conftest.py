"""Every test of the repository may use the real servers of `tools/parts`."""

import signal

pytest_plugins = ["parts.plugin"]


def pytest_configure() -> None:
    """A run in the background of a shell without job control ignores Ctrl-C, and so would every command that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
