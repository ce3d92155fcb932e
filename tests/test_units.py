# SPDX-License-Identifier: Apache-2.0
"""Units of work: computed once, whole or not at all, apart for other settings, shared out among hosts."""

import tracemalloc

import jax
import numpy as np
import pytest

from errors import UserError
from evaluators.units import Units
from runtime.records import write_npz_rows


def counting(log, fail_at=None):
    def compute(k):
        if k == fail_at:
            raise KeyboardInterrupt
        log.append(k)
        return {"x": np.arange(k, k + 2), "y": np.full(1, k / 3)}

    return compute


def test_a_restart_does_the_rest_and_gives_the_same(tmp_path):
    whole = Units(tmp_path / "a", "bpd_1", {"rtol": 1e-5}).run(5, counting([]))
    log = []
    with pytest.raises(KeyboardInterrupt):
        Units(tmp_path / "b", "bpd_1", {"rtol": 1e-5}).run(5, counting(log, fail_at=3))
    resumed = Units(tmp_path / "b", "bpd_1", {"rtol": 1e-5}).run(5, counting(log))
    assert log == [0, 1, 2, 3, 4]
    for a, b in zip(whole, resumed, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


def test_other_settings_are_other_work(tmp_path):
    log = []
    Units(tmp_path, "bpd_1", {"rtol": 1e-5, "atol": 1.0}).run(2, counting(log))
    Units(tmp_path, "bpd_1", {"atol": 1.0, "rtol": 1e-5}).run(2, counting(log))  # the order of keys is not a setting
    assert log == [0, 1]
    Units(tmp_path, "bpd_1", {"rtol": 1e-6, "atol": 1.0}).run(2, counting(log))
    assert log == [0, 1, 0, 1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", None])
def test_a_damaged_unit_is_computed_again(tmp_path, content):
    units, log = Units(tmp_path, "bpd_1", {}), []
    first = units.run(2, counting(log))
    (path,) = tmp_path.glob("*/000001.npz")
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    again = units.run(2, counting(log))
    assert log == [0, 1, 1]
    np.testing.assert_array_equal(again[1]["x"], first[1]["x"])


def test_hosts_share_the_units(tmp_path, monkeypatch):
    """Two hosts, one after the other in this process: each does its own, the first finds the second's missing."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("evaluators.units.multihost_utils.sync_global_devices", lambda name: None)
    logs = [], []
    with pytest.raises(UserError, match=r"000001\.npz is missing: --workdir must be a folder that all hosts share"):
        Units(tmp_path, "bpd_1", {}).run(5, counting(logs[0]))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    results = Units(tmp_path, "bpd_1", {}).run(5, counting(logs[1]))
    assert logs == ([0, 2, 4], [1, 3])
    assert [int(row["x"][0]) for row in results] == [0, 1, 2, 3, 4]
    for path in tmp_path.glob("*/000003.npz"):
        path.unlink()
    told = []
    monkeypatch.setattr("evaluators.units.logging.info", lambda text, *values: told.append(text % values))
    Units(tmp_path, "bpd_1", {}).run(5, counting([]))
    assert told == ["bpd_1: 1 of this host's 2 units were there already"]


def test_one_unit_is_in_memory_at_a_time(tmp_path):
    """40 units of 1 MiB, read back and written as one array."""
    count, rows = 40, 2**17

    def compute(k):
        return {"x": np.full((rows, 1), k, np.float64)}

    units = Units(tmp_path, "samples_1", {}).run(count, compute)
    assert len(units) == count
    tracemalloc.start()
    write_npz_rows(tmp_path / "all.npz", "x", count * rows, (row["x"] for row in units))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 2**20
    with np.load(tmp_path / "all.npz") as file:
        np.testing.assert_array_equal(file["x"], np.repeat(np.arange(count, dtype=np.float64), rows)[:, None])
    with pytest.raises(IndexError):
        units[count]
