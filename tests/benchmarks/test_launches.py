from benchmarks.launches import LaunchConfig, count


def test_a_step_dispatches_few_operators():
    """A small network on a fast GPU waits for launches."""
    counts = count(LaunchConfig(imgsz=64, batch_size=2))
    limits = {"model": 410, "loss": 200, "optimizer": 20, "average": 3}
    assert {name: counts[name] <= limit for name, limit in limits.items()} == dict.fromkeys(
        limits, True
    ), counts
    assert counts["loss"] == count(LaunchConfig(imgsz=64, batch_size=8))["loss"]
