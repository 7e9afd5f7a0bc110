"""What deploy/ holds is what the tools that read it accept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("ray-cluster*.yaml")), ids=lambda path: path.name)
def test_ray_accepts_the_cluster_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local" and config["head_start_ray_commands"]
