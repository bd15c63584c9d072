"""Real certificates for tests: an authority and what it signs, as files that a process under test reads."""

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from millrace_kit.settings import TlsSettings


@dataclass(frozen=True)
class Authority:
    """Signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, name: str = "test authority") -> "Authority":
        """One that nobody trusts yet."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, subject, key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, *names: str) -> tuple[bytes, bytes]:
        """Chain and key of a new certificate for `names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        builder = _builder(subject, self.certificate.subject, key.public_key())
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
        encoded = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), encoded


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))


def write(folder: Path, authority: Authority, *names: str, trusted: bytes = b"") -> TlsSettings:
    """Put a new certificate of `authority` into `folder` all at once, as the kubelet does: a link to a folder is replaced."""
    fresh = folder / f"..{os.urandom(4).hex()}"
    fresh.mkdir(parents=True)
    chain, key = authority.sign(*names)
    files = {"tls.crt": chain, "tls.key": key, "ca.crt": trusted or authority.pem}
    for name, content in files.items():
        (fresh / name).write_bytes(content)
    link = folder / "..data_tmp"
    link.symlink_to(fresh.name)
    link.rename(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    return TlsSettings(
        cert_file=str(folder / "tls.crt"), key_file=str(folder / "tls.key"), ca_file=str(folder / "ca.crt")
    )
