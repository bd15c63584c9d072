"""The built-in issuer: brings the authority and every certificate to what the settings ask for, and never rewrites a good one.

An authority is replaced in three steps, so that no process ever meets a certificate it does not trust yet: the next one is made and
only trusted (every `ca.crt` holds both); after `trust_ahead_hours` it signs and every certificate is made anew; the one before stays
trusted until it ends by itself.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from cryptography import x509

from millrace_bootstrap.authority import BACKDATED, Pair, bundle, new_authority, new_certificate, why_renew
from millrace_bootstrap.secret_store import Secret, SecretConflictError, SecretStore
from millrace_bootstrap.settings import CertificateSettings

T = TypeVar("T")
log = logging.getLogger(__name__)

CERTIFICATE, KEY, TRUSTED = "tls.crt", "tls.key", "ca.crt"
NEXT_CERTIFICATE, NEXT_KEY = "next.crt", "next.key"
# Certificates get their last renewal from an authority that outlives them by this many of their lifetimes.
AUTHORITY_OVERLAP = 2
# Jobs that run at once write over each other at most this often before one gives up.
MAX_CONFLICTS = 10


class Issuer:
    """Reads, decides and writes for one instant."""

    def __init__(self, settings: CertificateSettings, store: SecretStore, now: datetime) -> None:
        self._settings = settings
        self._store = store
        self._now = now

    def run(self) -> int:
        """Do everything; returns how many Secrets were written.

        Raises:
            SecretStoreError: the API server refused or did not answer.
            SecretConflictError: other jobs kept writing the same Secret.
        """
        authority, trusted, written = self._retried(self._authority)
        for name, dns_names in self._settings.secrets.items():
            written += self._retried(partial(self._certificate, name, dns_names, authority, trusted))
        log.info("%d certificates are good, %d Secrets were written", len(self._settings.secrets), written)
        return written

    def _retried(self, work: Callable[[], T]) -> T:
        for _ in range(MAX_CONFLICTS - 1):
            try:
                return work()
            except SecretConflictError as conflict:
                log.info("Secret %s was written by another job; reading it again", conflict)
        return work()

    def _authority(self) -> tuple[Pair, bytes, int]:
        """Who signs now, whom everybody trusts, and whether the Secret was written."""
        name = self._settings.authority_secret
        there = self._store.read(name)
        data = dict(there.data) if there is not None else {}
        signing = Pair.from_pem(data.get(CERTIFICATE, b""), data.get(KEY, b""))
        upcoming = Pair.from_pem(data.get(NEXT_CERTIFICATE, b""), data.get(NEXT_KEY, b""))
        known = _certificates(data.get(TRUSTED, b""))
        if signing is None or signing.certificate.not_valid_after_utc <= self._now:
            log.warning("making an authority: %s", "there is none" if signing is None else "the one there has ended")
            signing, upcoming = upcoming or self._make(), None
        elif upcoming is None and self._left(signing) < AUTHORITY_OVERLAP * timedelta(days=self._settings.days):
            log.warning("the authority ends in %d days: the next one is trusted from now on", self._left(signing).days)
            upcoming = self._make()
        elif upcoming is not None and self._trusted_long_enough(upcoming):
            log.warning("the next authority signs from now on")
            signing, upcoming = upcoming, None
        pairs = [signing] if upcoming is None else [signing, upcoming]
        trusted = bundle([*(pair.certificate for pair in pairs), *known], self._now)
        wanted = {CERTIFICATE: signing.certificate_pem, KEY: signing.key_pem, TRUSTED: trusted}
        if upcoming is not None:
            wanted |= {NEXT_CERTIFICATE: upcoming.certificate_pem, NEXT_KEY: upcoming.key_pem}
        return signing, trusted, self._put(there, Secret(name, wanted, "Opaque", self._settings.labels))

    def _make(self) -> Pair:
        name = f"{self._settings.authority_secret}.{self._settings.namespace}"
        return new_authority(name, self._now, timedelta(days=self._settings.authority_days))

    def _left(self, pair: Pair) -> timedelta:
        return pair.certificate.not_valid_after_utc - self._now

    def _trusted_long_enough(self, pair: Pair) -> bool:
        made = pair.certificate.not_valid_before_utc + BACKDATED
        return self._now - made >= timedelta(hours=self._settings.trust_ahead_hours)

    def _certificate(self, name: str, dns_names: tuple[str, ...], authority: Pair, trusted: bytes) -> int:
        there = self._store.read(name)
        data = there.data if there is not None else {}
        pair = Pair.from_pem(data.get(CERTIFICATE, b""), data.get(KEY, b""))
        renew_before = timedelta(days=self._settings.renew_before_days)
        if why := why_renew(pair, authority, dns_names, self._now, renew_before):
            log.info("Secret %s: new certificate, because %s", name, why)
            pair = new_certificate(authority, dns_names, self._now, timedelta(days=self._settings.days))
        assert pair is not None
        wanted = {CERTIFICATE: pair.certificate_pem, KEY: pair.key_pem, TRUSTED: trusted}
        return self._put(there, Secret(name, wanted, "kubernetes.io/tls", self._settings.labels))

    def _put(self, there: Secret | None, wanted: Secret) -> int:
        if there is not None:
            # Its type cannot change, and labels of others stay.
            wanted = replace(wanted, kind=there.kind, version=there.version, labels={**there.labels, **wanted.labels})
            if dict(there.data) == dict(wanted.data) and dict(there.labels) == dict(wanted.labels):
                return 0
        self._store.write(wanted)
        return 1


def _certificates(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem) if pem.strip() else []
    except ValueError:
        log.warning("the bundle of trusted authorities cannot be read and is made anew")
        return []
