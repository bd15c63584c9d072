"""Chromium, for tests that look at pages in a real browser."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str:
    """Path of the browser, or empty."""
    return next((found for name in NAMES if (found := shutil.which(name))), "")


def missing() -> str:
    """What to install, or empty when there is a browser."""
    return "" if program() else "needs Chromium (Debian: chromium)"
