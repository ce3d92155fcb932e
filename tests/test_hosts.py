# SPDX-License-Identifier: Apache-2.0
"""Two real processes on 127.0.0.1 as two hosts, and several devices in one, against one process with one device."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import checkpoints
from runtime import hosts
from task import build
from tests.test_interruptions import ENVIRONMENT, FLAGS, ROOT, command, finish, wait_until
from tests.tiny import tiny_digits

TRAIN = {"training.n_iters": 8, "training.snapshot_freq": 4, "training.snapshot_freq_for_preemption": 4}
TRAIN |= {"training.log_freq": 2, "training.eval_freq": 4, "training.score_matching_order": 2}
TRAIN |= {"training.snapshot_sampling": True}
EVAL = {"eval.enable_loss": True, "eval.num_repeats": 2, "eval.num_samples": 20}


ENDLESS = {**TRAIN, "training.n_iters": 100_000, "training.snapshot_freq": 100_000, "training.score_matching_order": 1}
ENDLESS |= {"training.snapshot_freq_for_preemption": 100_000}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices):
    return {**ENVIRONMENT, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}"}


def start_two(mode, workdir, devices=1, **overrides):
    return start_at_once(mode, [workdir, workdir], devices, **overrides)


def start_at_once(mode, workdirs, devices=1, **overrides):
    flags = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={len(workdirs)}"]
    return [
        subprocess.Popen(
            [*command(mode, workdir, **overrides), *flags, f"--process_id={k}"],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k, workdir in enumerate(workdirs)
    ]


def finish_two(*args, **overrides):
    processes = start_two(*args, **overrides)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n---\n".join(o[-2000:] for o in outputs)
    return outputs


def assert_close_states(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6), a, b)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single") / "run"
    finish("train", workdir, **TRAIN)
    return workdir


def assert_same_training(workdir, single):
    assert checkpoints.all_numbers(workdir / "checkpoints") == checkpoints.all_numbers(single / "checkpoints") == [1, 2]
    one, other = (checkpoints.restore(run / "checkpoints/checkpoint_2") for run in (workdir, single))
    assert_close_states(one.state, other.state)
    assert one.record["loader"] == other.record["loader"]
    for a, b in zip(metrics(workdir), metrics(single), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        np.testing.assert_allclose([a[k] for k in ("loss", "first")], [b[k] for k in ("loss", "first")], rtol=1e-4)
    one, other = (np.asarray(Image.open(run / "samples/step_00000008.png"), float) for run in (workdir, single))
    assert np.abs(one - other).mean() < 1  # of 255: a random image differs by some 80


@pytest.mark.slow  # quicker, of the mixture: test_run.py::test_four_devices_equal_one
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_of_one_host(tmp_path, single, devices):
    """Dropout, data order, times, noise and probes are functions of the example, not of the device."""
    workdir = tmp_path / "run"
    done = subprocess.run(
        command("train", workdir, **TRAIN), cwd=ROOT, env=environment(devices), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_training(workdir, single)


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path, single):
    outputs = finish_two("train", tmp_path / "run", **TRAIN)
    assert_same_training(tmp_path / "run", single)
    assert "batch 8 on 2 cpu device(s) of 2 host(s)" in outputs[0]


@pytest.mark.slow
def test_two_hosts_train_resume_and_evaluate(tmp_path, single):
    workdir = tmp_path / "run"
    half = {**TRAIN, "training.n_iters": 4}
    outputs = finish_two("train", workdir, 2, **half)
    assert checkpoints.all_numbers(workdir / "checkpoints-meta") == [4]
    finish_two("train", workdir, 2, **TRAIN)
    assert_same_training(workdir, single)
    assert "batch 8 on 4 cpu device(s) of 2 host(s)" in outputs[0]
    launches = json.loads((workdir / "run.json").read_text())["launches"]  # told by the first host alone
    assert [(one["step"], one["devices"]) for one in launches] == [(n, "4 x cpu of 2 host(s)") for n in (0, 4)]

    finish("eval", single, **EVAL)
    os.rename(workdir / "checkpoints", workdir / "own")
    os.symlink(single / "checkpoints", workdir / "checkpoints")  # the same parameters to the last bit
    outputs = finish_two("eval", workdir, **EVAL)
    assert "Negative log-likelihood" in outputs[0] and "Negative log-likelihood" not in outputs[1]
    reports = [json.loads((run / "eval/report_2.json").read_text()) for run in (workdir, single)]
    assert reports[0] == reports[1]
    for name in ("bpd_2", "samples_2"):
        one, other = (np.load(run / "eval" / f"{name}.npz") for run in (workdir, single))
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_after_the_same_step(tmp_path):
    workdir = tmp_path / "run"
    processes = start_two("train", workdir, 1, **ENDLESS)
    assert wait_until(lambda: (workdir / "metrics.jsonl").exists() and len(metrics(workdir)) > 4, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n---\n".join(o[-2000:] for o in outputs)
    (step,) = checkpoints.all_numbers(workdir / "checkpoints-meta")
    assert f"stopped by a signal to another host after step {step}" in outputs[0]
    assert f"stopped by SIGTERM after step {step}" in outputs[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_others_with_one_line(tmp_path, victim):
    """At once where they meet in a collective; else within `hosts.HEARTBEAT_S`."""
    workdir = tmp_path / "run"
    processes = start_two("train", workdir, 1, **ENDLESS)
    assert wait_until(lambda: (workdir / "metrics.jsonl").exists() and len(metrics(workdir)) > 4, processes[0])
    processes[victim].kill()
    output, _ = processes[1 - victim].communicate(timeout=hosts.HEARTBEAT_S + 30)
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 1
    assert output.splitlines()[-1] == hosts.LOST and "Traceback" not in output


def test_hosts_that_read_different_parameters_end_with_one_line(tmp_path):
    """Two folders that claim to be one: the checkpoint of the second has the same number, but another weight."""
    config = tiny_digits()
    state = build(config).init_state()
    for k in range(2):
        checkpoints.save(tmp_path / str(k) / "checkpoints-meta", state, 2, {"config": config.to_dict()})
        state.params["Conv_0"]["bias"] += 1e-3
    for process in start_at_once("train", [tmp_path / "0", tmp_path / "1"]):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 1
        assert "error: process 1 of this run has config or parameters other than the first's" in output.splitlines()[-1]


UNDER_SLURM = """
import jax
from runtime import hosts
hosts.initialize(None, None, None)
print(jax.process_count(), jax.config.values["jax_cuda_visible_devices"])
"""


@pytest.mark.parametrize(("nodes", "devices"), [(2, ["2 all", "2 all"]), (1, ["2 0", "2 1"])])
def test_a_slurm_task_has_all_devices_of_a_node_that_it_has_alone(nodes, devices):
    def start(task):
        job = {"JOB_ID": 1, "STEP_NODELIST": "127.0.0.1", "STEP_NUM_NODES": nodes, "NTASKS": 2, "STEP_NUM_TASKS": 2}
        job |= {"PROCID": task, "LOCALID": task % (2 // nodes)}
        slurm = {f"SLURM_{name}": str(value) for name, value in job.items()}
        return subprocess.Popen(
            [sys.executable, "-c", UNDER_SLURM],
            cwd=ROOT,
            env={**ENVIRONMENT, **slurm, "JAX_COORDINATOR_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    port = str(free_port())
    tasks = [start(0), start(1)]
    assert [task.communicate(timeout=100)[0].strip().splitlines()[-1] for task in tasks] == devices


ON_A_TPU_VM = """
import os
import jax
from runtime import hosts
del os.environ["TPU_SKIP_MDS_QUERY"]  # JAX sets it where it finds no TPU
calls = []
jax.distributed.initialize = lambda *args, **options: calls.append(args)
hosts.initialize(None, None, None)
print(calls)
"""


@pytest.mark.parametrize(
    ("workers", "calls"), [("10.0.0.1,10.0.0.2", "[(None, None, None)]"), ("10.0.0.1", "[]"), (None, "[]")]
)
def test_a_tpu_vm_asks_google_for_the_other_hosts_of_its_slice(workers, calls):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.endswith("/instance/attributes/worker-network-endpoints") and workers is not None
            self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((workers or "").encode())

        def log_message(self, *_):
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        environment = {**ENVIRONMENT, "GCE_METADATA_IP": address, "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", ON_A_TPU_VM], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        server.shutdown()
    assert done.stdout.strip() == calls, done.stderr


def test_a_save_is_due_by_the_clock_of_the_first_host(monkeypatch):
    """Agreed once, two steps after it was asked for, however often it is asked for meanwhile. A signal is anyone's."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index, saves in ((0, [2, 7]), (1, [])):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        request = hosts.StopRequest()
        due = [True] * 3 + [False] * 2 + [True] * 3 + [False] * 4  # true until it was saved
        answers = [request.agreed(step) for step in due]
        assert [i for i, (_, save) in enumerate(answers) if save] == saves
        assert not any(stop for stop, _ in answers)
        request.signal = "SIGTERM"
        assert [request.agreed(False)[0] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num_processes=2"], "--coordinator_address and --process_id missing"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be in 0 ..",
        ),
    ],
)
def test_wrong_flags(tmp_path, flags, complaint):
    done = subprocess.run(
        [*command("train", tmp_path / "run"), *flags], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and complaint in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
