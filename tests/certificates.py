"""A certificate for the servers of a test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.servers import missing


class Certificate(NamedTuple):
    """Files of a certificate that vouches for itself, and of its key."""

    certificate: Path
    key: Path


def make_certificate(directory: Path) -> Certificate:
    """Make one for 127.0.0.1. Without openssl the test is skipped on a laptop, and fails in CI."""
    if not shutil.which("openssl"):
        missing("openssl is not installed: it makes the certificate")
    made = Certificate(directory / "certificate.pem", directory / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", made.key, "-out", made.certificate,
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return made
