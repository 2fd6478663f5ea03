"""Which device a started server will take: SGLang's own rule, told from its arguments."""

from __future__ import annotations

import pytest

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.server_runs.engine_device import serves_on_cpu


@pytest.mark.parametrize(
    ("arguments", "environment", "gpu", "expected"),
    [
        ([], {}, False, True),
        ([], {}, True, False),
        ([], {"SGLANG_USE_CPU_ENGINE": "1"}, True, True),
        (["--device", "cpu"], {}, True, True),
        (["--device=cpu"], {}, True, True),
        (["--device", "cuda"], {}, False, False),
        (["--device=cuda", "--tp-size", "8"], {"SGLANG_USE_CPU_ENGINE": "1"}, False, False),
        (["--device", "cuda", "--device", "cpu"], {}, True, True),  # the last one counts
    ],
)
def test_the_device_is_the_one_named_or_the_one_found(
    arguments: list[str], environment: dict[str, str], gpu: bool, expected: bool
) -> None:
    assert serves_on_cpu(arguments, environment, lambda: gpu) is expected


def test_a_device_without_its_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--device"):
        serves_on_cpu(["--tp-size", "8", "--device"], {}, lambda: True)
