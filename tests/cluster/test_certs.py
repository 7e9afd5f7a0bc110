"""Certificates are looked at before anything is started: members that do not trust each other could not say why."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvbank.cluster.certs import check_certificates, make_certificates
from kvbank.cluster.launcher import LocalCluster
from kvbank.errors import ConfigError
from kvbank.workers.models.random_model import write_random_model


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "certs", days=30)
    return tmp_path / "certs"


def test_fresh_and_renewed_certificates_are_good(folder: Path) -> None:
    check_certificates(folder)
    make_certificates(folder)
    check_certificates(folder)


def test_a_machine_needs_the_roles_of_its_own_members_only(folder: Path) -> None:
    for role in ("control", "gateway"):
        (folder / f"{role}.pem").unlink()
    check_certificates(folder)


@pytest.mark.parametrize("days", [-1, 31])
def test_a_certificate_that_is_not_valid_now_is_named_with_its_days(folder: Path, days: int) -> None:
    with pytest.raises(ConfigError, match=r"worker\.pem is valid from .* which is not now: renew"):
        check_certificates(folder, now=datetime.now(UTC) + timedelta(days=days))


def test_a_certificate_of_another_authority_is_named_before_a_cluster_starts(folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "control.pem", folder)
    model = write_random_model(tmp_path / "model", num_layers=1)
    with pytest.raises(ConfigError, match=r"control\.pem was not signed by the authority"):
        LocalCluster(str(model), launcher="process", redis=None, tls_dir=str(folder), state_dir=str(tmp_path / "s")).start()


def test_what_is_no_certificate_is_named(folder: Path) -> None:
    (folder / "gateway.pem").write_text("half")
    with pytest.raises(ConfigError, match=r"gateway\.pem or its ca\.pem cannot be read"):
        check_certificates(folder)
    (folder / "ca.pem").unlink()
    with pytest.raises(ConfigError, match=r"control\.pem or its ca\.pem cannot be read|worker\.pem"):
        check_certificates(folder)


def test_an_authority_that_cannot_sign_or_a_name_that_cannot_be_signed_is_told(folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other")
    for name, data in (("ca.key", b"nonsense"), ("ca.pem", None), ("ca.key", (tmp_path / "other" / "ca.key").read_bytes())):
        made = tmp_path / f"made-{name}-{len(data or b'')}"
        make_certificates(made)
        if data is None:
            (made / name).unlink()
        else:
            (made / name).write_bytes(data)
        with pytest.raises(ConfigError, match="new folder"):
            make_certificates(made)
    with pytest.raises(ConfigError, match="xn--"):
        make_certificates(tmp_path / "named", names=["münchen.de"])
