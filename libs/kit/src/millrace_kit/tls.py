"""Certificates that change while the process runs: read again when their files change, never half-written ones.

A server asks for them at every handshake; a client's channel is made anew (`reloading`). Connections that stand stay as they are.
"""

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import grpc

from millrace_kit.settings import TlsSettings

log = logging.getLogger(__name__)

# Shortest time between two looks at the files.
RECHECK_S = 1.0


class CertificateError(Exception):
    """The certificate files cannot be used; the message names them."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """One consistent reading of the three files (PEM)."""

    chain: bytes
    """Own certificate chain."""
    key: bytes
    """Own private key."""
    authorities: bytes
    """Certificates of the authorities that peers may be signed by; more than one while an authority is replaced."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client."""
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.chain)

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """For a server."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.authorities)


class CertificateFiles:
    """The newest good certificates of `settings`; usable from any thread.

    Raises:
        CertificateError: at construction, when the files cannot be used.
    """

    def __init__(self, settings: TlsSettings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._paths = [Path(settings.cert_file), Path(settings.key_file), Path(settings.ca_file)]
        self._monotonic = monotonic
        self._lock = Lock()
        self._looked_at = monotonic()
        self._seen = self._stamps()
        self._problem = ""
        self._current = self._read()

    def current(self) -> Certificates:
        """The newest ones; after a change that cannot be used (yet), those before it."""
        if self._monotonic() - self._looked_at < RECHECK_S:
            return self._current
        with self._lock:
            self._looked_at = self._monotonic()
            try:
                stamps = self._stamps()
                if stamps == self._seen:
                    return self._current
                found = self._read()
                # A file that changed in between belongs to another set: the next look reads them all again.
                if self._stamps() == stamps:
                    self._seen, self._current, self._problem = stamps, found, ""
                    log.info("new certificates from %s are in force", self._paths[0])
            except CertificateError as error:
                if str(error) != self._problem:
                    log.warning("certificates changed and cannot be used, the old ones stay: %s", error)
                self._problem = str(error)
            return self._current

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that admits only peers with a certificate of `authorities`, newest files at every handshake."""
        given = [self._current]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            newest = self.current()
            if newest is given[0]:
                return None
            given[0] = newest
            return newest.server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            given[0].server_configuration(), fetch, require_client_authentication=True
        )

    def server_context(self) -> ssl.SSLContext:
        """The same for a server of Python's own: only peers with a certificate of `authorities`, newest files at every handshake."""
        given = [(self._current, self._context())]

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            newest = self.current()
            if newest is not given[0][0]:
                try:
                    given[0] = newest, self._context()
                except (ssl.SSLError, OSError) as error:  # changed again this instant; the next handshake looks again
                    log.warning("certificates changed while they were read: %s", error)
            connection.context = given[0][1]

        outer = self._context()
        outer.sni_callback = choose
        return outer

    def client_context(self) -> ssl.SSLContext:
        """For a new connection to a server whose certificate has the name it is called by."""
        self.current()
        chain, key, authorities = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(chain, key)
        context.load_verify_locations(authorities)
        return context

    def _context(self) -> ssl.SSLContext:
        chain, key, authorities = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(chain, key)  # refuses a key of another certificate
        context.load_verify_locations(authorities)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _stamps(self) -> Sequence[tuple[int, int, int]]:
        try:
            return [(s.st_ino, s.st_mtime_ns, s.st_size) for s in (path.stat() for path in self._paths)]
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from None

    def _read(self) -> Certificates:
        chain, key, authorities = self._paths
        try:
            self._context()
            return Certificates(chain.read_bytes(), key.read_bytes(), authorities.read_bytes())
        except ssl.SSLError as error:
            raise CertificateError(f"{chain}, {key}, {authorities}: {error.reason or error}") from None
        except OSError as error:
            raise CertificateError(f"{error.filename or chain}: {error.strerror}") from None
