"""A test authority for mutual TLS 1.3: one CA, a certificate for the sender, one for the receiver.

Certificates name the end they are for and no address, because a cluster's addresses change and its role does not. The
authority's own key is thrown away after signing: to renew, make a new folder. For tests and closed experiments; a
deployment brings certificates of its own authority under the same file names.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from repro.errors import UserError

ENDS = {"sender": ExtendedKeyUsageOID.CLIENT_AUTH, "receiver": ExtendedKeyUsageOID.SERVER_AUTH}


def make_certificates(folder: Path, *, valid_from: datetime | None = None, days: float = 30) -> None:
    """Write ca.pem, sender.pem, sender.key, receiver.pem and receiver.key. Raises UserError where files are there."""
    start = valid_from or datetime.now(UTC) - timedelta(minutes=5)
    end = start + timedelta(days=days)
    folder.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _name("kvcache-authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    root = (
        _certificate(authority, authority, authority_key.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder / "ca.pem", root.public_bytes(serialization.Encoding.PEM), 0o644)
    for end_name, purpose in ENDS.items():
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"kvcache-{end_name}"
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        leaf = (
            _certificate(_name(name), authority, key.public_key(), start, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        _write(folder / f"{end_name}.pem", leaf.public_bytes(serialization.Encoding.PEM), 0o644)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(folder / f"{end_name}.key", private, 0o600)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        # Created with its final mode: a key is never readable by others, not even for a moment.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UserError(f"{path} exists already; name a new folder") from None
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def main(argv: list[str]) -> int:
    """`scripts/make_certificates FOLDER [--days N]`; the last line is the folder, for `transport.tls`."""
    parser = argparse.ArgumentParser(prog="make_certificates", description="Certificates of a test authority.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--days", type=float, default=30)
    arguments = parser.parse_args(argv)
    make_certificates(arguments.folder, days=arguments.days)
    print(arguments.folder)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
