from __future__ import annotations

import json
import subprocess

from benchmarks import threads


def test_each_setting_has_processes_of_its_own_and_its_median(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    seen = []

    def answer(command, env, **_):
        seen.append({name: env.get(name) for name in (*threads.WAITING, "OMP_NUM_THREADS")})
        return json.dumps([10.0 * len(seen), 1.0])

    monkeypatch.setattr(subprocess, "check_output", answer)
    threads.main(["--rounds", "3"])
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    expected = [(None,) * 4, (None, "10000", "1", None), ("passive", None, None, None)]
    assert [tuple(one[name] for name in names) for one in seen[:3]] == expected
    assert seen[3] == {**dict.fromkeys(names), "OMP_NUM_THREADS": "1"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("training")[1].split()[0] for line in lines] == [
        "50.0",
        "60.0",
        "70.0",
        "80.0",
    ]


def test_both_times_are_measured():
    rate, milliseconds = threads.measure(0)
    assert 0 < rate < 1e5
    assert 0 < milliseconds < 1e5
