"""The built-in issuer over years of runs, without a cluster: good certificates stay, and nobody ever meets one it does not trust."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from millrace_bootstrap.authority import Pair, new_authority, new_certificate, why_renew
from millrace_bootstrap.issuer import Issuer
from millrace_bootstrap.secret_store import Secret, SecretConflictError
from millrace_bootstrap.settings import BootstrapSettings, CertificateSettings
from millrace_kit.settings import SettingsError, parse_settings

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
NAMES = ("millrace-registry", "millrace-registry.ns.svc", "*.millrace-registry.ns.svc", "localhost")
SETTINGS = CertificateSettings(
    namespace="ns",
    authority_secret="ca",
    secrets={"registry-tls": NAMES, "client-tls": ("client.ns",)},
    labels={"a": "b"},
)


class MemorySecrets:
    """What the API server does with Secrets: versions, conflicts, types that stay."""

    def __init__(self) -> None:
        self.secrets: dict[str, Secret] = {}
        self.writes: list[str] = []

    def read(self, name: str) -> Secret | None:
        return self.secrets.get(name)

    def write(self, secret: Secret) -> None:
        there = self.secrets.get(secret.name)
        if secret.version != (there.version if there is not None else ""):
            raise SecretConflictError(secret.name)
        assert there is None or there.kind == secret.kind
        self.writes.append(secret.name)
        self.secrets[secret.name] = replace(secret, version=str(len(self.writes)))


def run(store: MemorySecrets, now: datetime, settings: CertificateSettings = SETTINGS) -> int:
    return Issuer(settings, store, now).run()


def leaf(store: MemorySecrets, name: str = "registry-tls") -> x509.Certificate:
    return x509.load_pem_x509_certificate(store.secrets[name].data["tls.crt"])


def trusts(bundle: bytes, certificate: x509.Certificate, now: datetime, name: str = "localhost") -> None:
    """As a client of another implementation verifies it: chain, dates, purposes, name."""
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(name))
    verifier.verify(certificate, [])
    PolicyBuilder().store(store).time(now).build_client_verifier().verify(certificate, [])


def test_the_first_run_makes_everything_and_the_second_nothing() -> None:
    store = MemorySecrets()
    assert run(store, START) == 3
    secret = store.secrets["registry-tls"]
    assert (secret.kind, dict(secret.labels)) == ("kubernetes.io/tls", {"a": "b"})
    assert set(secret.data) == {"tls.crt", "tls.key", "ca.crt"}
    assert Pair.from_pem(secret.data["tls.crt"], secret.data["tls.key"]) is not None
    trusts(secret.data["ca.crt"], leaf(store), START)
    trusts(secret.data["ca.crt"], leaf(store), START, "pod-0.millrace-registry.ns.svc")
    assert leaf(store).not_valid_after_utc - START == 90 * DAY
    assert run(store, START + 59 * DAY) == 0


def test_a_third_before_its_end_a_certificate_is_renewed() -> None:
    store = MemorySecrets()
    run(store, START)
    first = leaf(store)
    assert run(store, START + 60 * DAY + timedelta(hours=1)) == 2
    assert leaf(store).serial_number != first.serial_number
    assert leaf(store).public_key() != first.public_key()
    assert run(store, START + 61 * DAY) == 0


def test_other_names_a_lost_secret_and_a_broken_one() -> None:
    store = MemorySecrets()
    run(store, START)
    client = leaf(store, "client-tls")
    assert (
        run(store, START, SETTINGS.model_copy(update={"secrets": {**SETTINGS.secrets, "registry-tls": ("other",)}}))
        == 1
    )
    assert leaf(store, "client-tls") == client
    del store.secrets["registry-tls"]
    assert run(store, START) == 1
    broken = store.secrets["registry-tls"]
    store.secrets["registry-tls"] = replace(broken, data={**broken.data, "tls.key": b"no key"})
    assert run(store, START) == 1
    store.secrets["registry-tls"] = replace(store.secrets["registry-tls"], data={})
    assert run(store, START) == 1


def test_labels_of_others_stay() -> None:
    store = MemorySecrets()
    run(store, START)
    secret = store.secrets["client-tls"]
    store.secrets["client-tls"] = replace(secret, labels={**secret.labels, "theirs": "1"})
    assert run(store, START) == 0


def test_jobs_at_once_end_with_one_authority() -> None:
    store = MemorySecrets()
    raced = []

    class Racing(MemorySecrets):
        """Another job finishes everything between this one's first read and write."""

        def write(self, secret: Secret) -> None:
            if not raced:
                raced.append(1)
                run(store, START)
            store.write(secret)

        def read(self, name: str) -> Secret | None:
            return store.read(name)

    assert run(Racing(), START) == 0
    assert store.writes == ["ca", "registry-tls", "client-tls"]


def test_through_thirty_years_of_daily_runs_everybody_trusts_everybody() -> None:
    """Processes read new Secrets late: each run's certificates must be trusted by the run before, and the other way round."""
    settings = SETTINGS.model_copy(update={"authority_days": 1000, "secrets": {"registry-tls": NAMES}})
    store = MemorySecrets()
    now, authorities, before, writes = START, set(), None, 0
    for _ in range(30 * 365):
        writes += run(store, now, settings)
        bundle, certificate = store.secrets["registry-tls"].data["ca.crt"], leaf(store)
        authorities.add(
            certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        )
        assert len(x509.load_pem_x509_certificates(bundle)) <= 3
        if before is not None and (bundle, certificate) != before:
            trusts(before[0], certificate, now)
            trusts(bundle, before[1], now)
            trusts(bundle, certificate, now)
        assert certificate.not_valid_after_utc - now > 29 * DAY
        before = bundle, certificate
        now += DAY
    assert len(authorities) > 10
    assert writes < 600


def test_after_a_long_sleep_everything_is_made_anew() -> None:
    store = MemorySecrets()
    run(store, START)
    later = START + 4000 * DAY
    assert run(store, later) == 3
    trusts(store.secrets["registry-tls"].data["ca.crt"], leaf(store), later)
    assert len(x509.load_pem_x509_certificates(store.secrets["registry-tls"].data["ca.crt"])) == 1


def test_a_certificate_of_another_authority_is_not_good() -> None:
    ours, theirs = (new_authority(name, START, 1000 * DAY) for name in "ab")
    pair = new_certificate(theirs, NAMES, START, 90 * DAY)
    assert "not signed" in why_renew(pair, ours, NAMES, START, 30 * DAY)
    assert why_renew(pair, theirs, NAMES, START, 30 * DAY) == ""
    assert Pair.from_pem(pair.certificate_pem, ours.key_pem) is None


@pytest.mark.parametrize(
    "wrong", [{"renew_before_days": 90}, {"authority_days": 100}, {"secrets": {"a": []}}, {"namespace": ""}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    good = {"namespace": "n", "authority_secret": "ca", "secrets": {"a": ["b"]}}
    parse_settings(BootstrapSettings, {"certificates": good}, "here")
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        parse_settings(BootstrapSettings, {"certificates": {**good, **wrong}}, "here")
