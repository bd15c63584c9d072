"""X.509 by ECDSA P-256: an authority, what it signs, and whether a certificate is still good. Values in, values out; no clock of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Clocks of nodes may be behind.
BACKDATED = timedelta(hours=1)
# RFC 5280: a common name has at most 64 characters.
MAX_COMMON_NAME = 64


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes) -> "Pair | None":
        """The pair, or None when it is no certificate with its ECDSA key."""
        try:
            loaded = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError):
            return None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or loaded.public_key() != private.public_key():
            return None
        return cls(loaded, private)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key, PKCS #8, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def new_authority(name: str, now: datetime, lifetime: timedelta) -> Pair:
    """A self-signed authority that signs no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), now, now + lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def new_certificate(authority: Pair, dns_names: Sequence[str], now: datetime, lifetime: timedelta) -> Pair:
    """A certificate for servers and clients; it never outlives its authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + lifetime, authority.certificate.not_valid_after_utc)
    builder = _builder(_name(dns_names[0]), authority.certificate.subject, key.public_key(), now, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
    builder = builder.add_extension(names, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def why_renew(
    pair: Pair | None, authority: Pair, dns_names: Sequence[str], now: datetime, renew_before: timedelta
) -> str:
    """Why a certificate has to be made anew; empty while it is good."""
    if pair is None:
        return "there is no usable certificate"
    certificate = pair.certificate
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (InvalidSignature, ValueError, TypeError):
        return "it is not signed by the authority"
    if names_of(certificate) != set(dns_names):
        return f"it is for {', '.join(sorted(names_of(certificate)))}"
    # What the authority's own end cuts short would be renewed at every run.
    left = certificate.not_valid_after_utc - now
    if left < renew_before and certificate.not_valid_after_utc < authority.certificate.not_valid_after_utc:
        return f"it ends in {left.days} days"
    return "" if left > timedelta(0) else "it has ended"


def names_of(certificate: x509.Certificate) -> set[str]:
    """DNS names of a certificate."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    return set(extension.value.get_values_for_type(x509.DNSName))


def bundle(certificates: Sequence[x509.Certificate], now: datetime) -> bytes:
    """PEM of those that have not ended, each once, in their order."""
    kept: dict[bytes, None] = {}
    for certificate in certificates:
        if certificate.not_valid_after_utc > now:
            kept[certificate.public_bytes(serialization.Encoding.PEM)] = None
    return b"".join(kept)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:MAX_COMMON_NAME])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - BACKDATED).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
