"""A process that is killed in the middle of a training loses little: the next one ends it as if nothing had been."""

import sys

from tests.conftest import ROOT, import_folder


def test_a_killed_training_ends_bit_by_bit_as_one_that_was_never_stopped(comfy_host, pack_nodes, tmp_path, monkeypatch):
    if "bench" not in sys.modules:
        import_folder("bench", ROOT / "bench")
    from bench.interruptions.training import STEPS, trainer
    from bench.report import run_bench
    from sa_inject.nodes.host.drawing import preview

    monkeypatch.setattr(preview, "STEPS", preview.STEPS)  # which the bench lowers
    states = tmp_path / "models/sa_inject/training_states"
    found, why = run_bench("interruptions", "--train-in", str(tmp_path), "--kill-at-step", "7")
    assert found is None, why
    (kept,) = states.glob("*.pt")
    assert "-000006-stopped" in kept.name  # saved every third step
    found, why = run_bench("interruptions", "--train-in", str(tmp_path))
    assert found is not None, why
    assert [path.name.split("-", 1)[1] for path in states.glob("*.pt")] == [f"{STEPS:06}-finished.pt"]
    assert found["digest"] == trainer(comfy_host)()
