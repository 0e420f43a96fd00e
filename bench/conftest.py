"""Makes the benchmarks' options and the keys of their results known to pytest."""

from ops import (  # noqa: F401
    pytest_addoption,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
    pytest_configure,
)
