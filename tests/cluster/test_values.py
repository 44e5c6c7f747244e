"""values.yaml, the types of its values and the schema that helm reads say the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from chart_values import SCHEMA, ChartValues, schema

from tests.cluster.conftest import PROFILES
from tests.cluster.manifests import CHART

VALUES = CHART / "values.yaml"


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the values as helm merges them: maps key by key, all else replaced."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merged(inner, value) if both else value
    return result


def test_the_committed_schema_is_the_generated_one() -> None:
    assert SCHEMA.read_text() == schema(), "run `make chart-schema`"


def test_the_schema_is_one_that_helm_3_reads_too() -> None:
    """Its reader knows drafts up to 7: none of the later words, and every reference local."""
    text = schema()
    assert '"http://json-schema.org/draft-07/schema#"' in text
    assert not re.search(r'"(prefixItems|unevaluated\w+|dependentRequired|\$dynamicRef)"', text)
    assert all(ref.startswith("#/$defs/") for ref in re.findall(r'"\$ref": "([^"]+)"', text))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_of_these_types(profile: str) -> None:
    values = merged(
        yaml.safe_load(VALUES.read_text()),
        yaml.safe_load((CHART / f"values-{profile}.yaml").read_text()),
    )
    ChartValues.model_validate(values)


def test_values_say_what_they_are_for() -> None:
    """Every section has a comment, and the types name each value and no other."""
    text = VALUES.read_text()
    values = yaml.safe_load(text)
    for name in values:
        section = re.search(rf"(?ms)^(#[^\n]*\n)?{name}:.*?(?=^\S|\Z)", text)
        assert section is not None
        assert "#" in section.group(), f"{name}: unexplained"
    full = ChartValues.model_validate(values).model_dump(by_alias=True)
    del full["global"]
    assert keys(full) == keys(values)


def keys(node: Any) -> Any:
    """Return a document's keys, without the values."""
    return {key: keys(value) for key, value in node.items()} if isinstance(node, dict) else None
