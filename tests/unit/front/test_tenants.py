"""Who may use the cluster."""

from pathlib import Path

import pytest

from cluster.front.tenants import Tenant, Tenants, first_token, read_tenants
from pyramidserve.errors import ConfigurationError, UnauthenticatedError

GOOD = "- {name: acme, token: s3cret, weight: 2}\n- {name: solo, token: other}\n"


def test_a_token_names_its_tenant(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text(GOOD)
    tenants = read_tenants(str(tmp_path / "tenants.yaml"))
    assert tenants.identify("Bearer s3cret") == "acme"
    assert tenants.identify("bearer other") == "solo"
    assert tenants.weights == {"acme": 2.0, "solo": 1.0}
    assert first_token(str(tmp_path / "tenants.yaml")) == "s3cret"


def test_without_a_file_everybody_is_the_same() -> None:
    tenants = read_tenants("")
    assert tenants.identify("") == tenants.identify("Bearer x") == ""
    assert tenants.weights == {}
    assert first_token("") is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "missing"),
        ("Bearer ", "missing"),
        ("Bearer wrong", "not known"),
        ("s3cret", "missing"),
        ("Basic s3cret", "not known"),
    ],
)
def test_a_missing_or_unknown_token_is_refused(value: str, problem: str) -> None:
    tenants = Tenants({"s3cret": Tenant("acme")})
    with pytest.raises(UnauthenticatedError, match=problem) as refused:
        tenants.identify(value)
    assert "s3cret" not in refused.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("- {name: [", "cannot be read"),
        ("", "is not a list of entries"),
        ("- {name: a}", "is not a list of entries"),
        ("- {name: a, token: b, weigth: 1}", "tenants.yaml': weigth; did you mean weight"),
        ("- {name: a, token: b, weight: 0}", "weight of 'a' is 0"),
        ("- {name: a, token: b, weight: much}", "weight of 'a' is 'much'"),
        ("- {name: a/b, token: b}", "without /"),
        ("- {name: a, token: b}\n- {name: c, token: b}", "'c' needs"),
        ("- {name: a, token: ''}", "'a' needs"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "tenants.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match=says) as refused:
        read_tenants(str(file))
    assert str(file) in refused.value.message
