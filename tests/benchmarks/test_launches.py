from benchmarks.launches import LaunchConfig, count


def test_a_step_dispatches_few_operators():
    """A small network on a fast GPU waits for launches."""
    for head, model, loss in (("anchor", 410, 200), ("free", 560, 210), ("free-e2e", 720, 230)):
        counts = count(LaunchConfig(head=head, imgsz=64, batch_size=2))
        limits = {"model": model, "loss": loss, "optimizer": 20, "average": 3}
        assert {name: counts[name] <= limit for name, limit in limits.items()} == dict.fromkeys(
            limits, True
        ), counts
    assert counts["loss"] == count(LaunchConfig(head=head, imgsz=64, batch_size=8))["loss"]
