"""Run one benchmark: `python bench/run.py NAME [options]`. COMFYUI_PATH names the host.

Every folder here with a `main.py` is a benchmark. `dev.py bench NAME` does the set-up first and then calls this.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def names() -> list[str]:
    return sorted(path.parent.name for path in BENCH.glob("*/main.py"))


def import_bench() -> None:
    """Make `import bench` work without the project's root on the path, where `nodes` would hide the host's module."""
    spec = importlib.util.spec_from_file_location(
        "bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        sys.exit(f"bench takes one of these names: {', '.join(names())}.")
    name = sys.argv[1]
    sys.argv[:2] = [f"dev.py bench {name}"]  # results and --help name the command like this
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != BENCH]
    import_bench()
    importlib.import_module(f"bench.{name}.main").main()


if __name__ == "__main__":
    main()
