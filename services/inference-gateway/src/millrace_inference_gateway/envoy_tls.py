"""TLS of the public port, as secrets that Envoy reads from files and exchanges when they change."""

from pathlib import Path

from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2
from google.protobuf.wrappers_pb2 import BoolValue

from millrace_inference_gateway.envoy_clusters import file_source, packed
from millrace_inference_gateway.envoy_files import EnvoyFiles, write_resources
from millrace_inference_gateway.settings import PublicTlsSettings

CERTIFICATE, CLIENT_CA = "public_certificate", "public_client_ca"


def write_secrets(files: EnvoyFiles, tls: PublicTlsSettings) -> None:
    """Write where the certificates are; Envoy watches their folders, so that an exchanged Secret counts at once."""
    if tls.mode == "none":
        return
    certificate = common_pb2.TlsCertificate(
        certificate_chain=base_pb2.DataSource(filename=tls.cert_file),
        private_key=base_pb2.DataSource(filename=tls.key_file),
        watched_directory=_folder(tls.cert_file),
    )
    write_resources(files.secret(CERTIFICATE), [secret_pb2.Secret(name=CERTIFICATE, tls_certificate=certificate)])
    if tls.mode == "mutual":
        context = common_pb2.CertificateValidationContext(
            trusted_ca=base_pb2.DataSource(filename=tls.ca_file), watched_directory=_folder(tls.ca_file)
        )
        write_resources(files.secret(CLIENT_CA), [secret_pb2.Secret(name=CLIENT_CA, validation_context=context)])


def transport_socket(files: EnvoyFiles, tls: PublicTlsSettings) -> base_pb2.TransportSocket | None:
    """TLS for a listener; None for plain connections."""
    if tls.mode == "none":
        return None
    context = tls_pb2.DownstreamTlsContext()
    common = context.common_tls_context
    common.alpn_protocols.append("h2")
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.tls_certificate_sds_secret_configs.append(_secret(files, CERTIFICATE))
    if tls.mode == "mutual":
        context.require_client_certificate.CopyFrom(BoolValue(value=True))
        common.validation_context_sds_secret_config.CopyFrom(_secret(files, CLIENT_CA))
    return base_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=packed(context))


def _secret(files: EnvoyFiles, name: str) -> secret_pb2.SdsSecretConfig:
    return secret_pb2.SdsSecretConfig(name=name, sds_config=file_source(str(files.secret(name))))


def _folder(path: str) -> base_pb2.WatchedDirectory:
    return base_pb2.WatchedDirectory(path=str(Path(path).absolute().parent))
