"""Millrace's Python client: `Client` for programs, `millrace` for the command line, and the single-machine runner."""

from millrace_kit.errors import MillraceError

from millrace.client import Client
from millrace.endpoints import Endpoints

__all__ = ["Client", "Endpoints", "MillraceError"]
