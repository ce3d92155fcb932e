# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the digits: train, stop, resume, evaluate; and what bad input is answered with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints
import datasets
import run_lib
from configs.check import check_config, check_key
from configs.default_toy_configs import get_toy_configs
from errors import UserError
from runtime import console, launch
from tests.test_interruptions import CACHE, ENVIRONMENT, FLAGS
from tests.tiny import tiny_digits

ROOT = Path(__file__).parent.parent


class InterruptedRunError(Exception):
    """Stands for a signal."""


def interrupt_after(monkeypatch, batches):
    """The data loader gives this many batches and then ends the run, as a signal would."""
    real = datasets.train_loader

    def loader(*args, **kwargs):
        iterator = real(*args, **kwargs)

        class Wrapper:
            left = batches
            get_state, set_state = iterator.get_state, iterator.set_state

            def __next__(self):
                if self.left == 0:
                    raise InterruptedRunError
                self.left -= 1
                return next(iterator)

        return Wrapper()

    monkeypatch.setattr(datasets, "train_loader", loader)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    config = tiny_digits(score_matching_order=2)
    whole = run_lib.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # one step after the checkpoint of step 4, with metrics of step 4 logged
        with pytest.raises(InterruptedRunError):
            run_lib.train(config, tmp_path / "parts")
    assert checkpoints.all_numbers(tmp_path / "parts/checkpoints-meta") == [2, 4]  # the one before, should 4 be damaged
    resumed = run_lib.train(config, tmp_path / "parts")
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count('"train"') == 3 and logs[0].count('"eval"') == 2
    for folder in ("checkpoints", "checkpoints-meta"):
        records = [checkpoints.restore(checkpoints.latest(tmp_path / run / folder)) for run in ("whole", "parts")]
        jax.tree.map(np.testing.assert_array_equal, records[0].state, records[1].state)
        assert records[0].record == records[1].record
    assert checkpoints.all_numbers(tmp_path / "parts/checkpoints") == [1, 2]

    # the evaluation of both runs: same figures; every example once, the last batch of 4 included
    results = [run_lib.evaluate(config, tmp_path / run)[0] for run in ("whole", "parts")]
    for run, truth in (("whole", [0]), ("parts", [0, 4])):
        launches = json.loads((tmp_path / run / "run.json").read_text())["launches"]
        assert [launched["step"] for launched in launches] == truth
    assert results[0] == results[1]
    saved = np.load(tmp_path / "whole/eval/bpd_2.npz")
    assert saved["bpd"].shape == (1, 20) and np.all(np.isfinite(saved["bpd"]))
    np.testing.assert_allclose(results[0]["bpd"]["mean"], saved["bpd"].mean(), rtol=1e-6)
    np.testing.assert_allclose(results[0]["bpd"]["stderr"], saved["bpd"].std(ddof=1) / np.sqrt(20), rtol=1e-5)
    np.testing.assert_allclose(saved["bpd"], -saved["logp"] / (64 * np.log(2)) + np.log2(17), rtol=1e-5)
    assert json.loads((tmp_path / "whole/eval/report_2.json").read_text()) == results[0]
    assert np.load(tmp_path / "whole/eval/samples_2.npz")["samples"].shape == (4, 8, 8, 1)
    assert (tmp_path / "whole/report/report.html").is_file() and (tmp_path / "whole/eval/samples_2.png").is_file()

    # the same folder, another network
    config.model.nf = 12
    with pytest.raises(UserError, match=r"shape .*this config wants .*another config"):
        run_lib.evaluate(config, tmp_path / "whole")
    with pytest.raises(UserError, match="another config"):
        run_lib.train(config, tmp_path / "whole")


def test_scanned_steps_equal_single_steps(tmp_path):
    """n_jitted_steps changes how many steps one program holds, not what they do."""
    states = []
    for jitted in (1, 3):
        config = get_toy_configs("vesde", "mog")
        config.model.update(nf=8, num_layers=1)
        config.training.update(batch_size=32, n_iters=6, log_freq=3, eval_freq=3, snapshot_freq=6)
        config.training.update(snapshot_freq_for_preemption=6, n_jitted_steps=jitted, score_matching_order=3)
        states.append(run_lib.train(config, tmp_path / str(jitted)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), states[0].params, states[1].params
    )


def test_four_devices_equal_one(tmp_path):
    """The same seed and global batches on one device and on four forced host devices."""
    states = []
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        overrides = {"batch_size": 32, "n_iters": 4, "n_jitted_steps": 2, "log_freq": 2, "eval_freq": 4}
        overrides |= {"snapshot_freq": 4, "snapshot_freq_for_preemption": 4, "score_matching_order": 3}
        arguments = [f"--config.training.{key}={value}" for key, value in overrides.items()]
        arguments += ["--config.model.nf=8", "--config.model.num_layers=1", f"--workdir={workdir}"]
        arguments += [f"--compilation_cache={CACHE}"]
        done = main("--config=configs/toy/mog_vp.py", "--mode=train", *arguments, devices=devices)
        assert done.returncode == 0, done.stderr
        states.append(checkpoints.restore(workdir / "checkpoints/checkpoint_1").state)
        told = (workdir / "stdout.txt").read_text()
        for line in (
            "config configs/toy/mog_vp.py with training.batch_size=32 (file: 512)",
            "training mlp, order 3, on mog\n",
            f"batch 32 on {devices} cpu device(s) of 1 host(s)",
            "1,048,576 training and 10,000 test examples of 1\n",
            f"parameters  {sum(leaf.size for leaf in jax.tree.leaves(states[-1]['params'])):,}\n",
            "steps       0 to 4\n",
            "training.n_iters=4",
            "step 4/4 ",
            "done at step 4 of 4\n",
            f"checkpoints  {workdir}/checkpoints (kept), {workdir}/checkpoints-meta (to resume from)\n",
            f"report       {workdir}/report/report.html\n",
        ):
            assert line in told, line
        assert "Unable to initialize backend" not in done.stderr + told
        (launched,) = json.loads((workdir / "run.json").read_text())["launches"]
        assert launched["step"] == 0 and "--config.training.n_iters=4" in launched["command"]
        assert launched["commit"] == launch.git_commit(ROOT) and launched["jax"] == jax.__version__
        assert launched["devices"] == f"{devices} x cpu of 1 host(s)"
    for part in ("params", "ema_params"):
        pairs = [states[0][part], states[1][part]]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *pairs)


def test_untrained_mixture_has_the_nll_of_its_gaussian(tmp_path):
    """The MLP starts as the exact score of N(0, sigma_data^2): its NLL on the mixture has a closed form."""
    config = get_toy_configs("vesde", "mog")
    config.model.update(nf=8, num_layers=1, sigma_data=0.6)
    config.training.update(batch_size=32, n_iters=1, n_jitted_steps=1)
    config.optim.lr = 1e-12
    config.eval.update(batch_size=1000, num_examples=1000, enable_sampling=False)
    run_lib.train(config, tmp_path)
    result = run_lib.evaluate(config, tmp_path)[0]
    weights, means, variances = np.array([0.3, 0.3, 0.4]), np.array([-2, -6, 4]) / 7, np.array([0.1, 0.1, 1]) / 49
    second_moment = np.sum(weights * (means**2 + variances))
    # the ODE carries N(0, 0.6^2 + sigma(eps)^2) to N(0, 0.6^2 + 50^2), which the prior N(0, 50^2) stands in for
    model_var = (0.6**2 + 0.01**2) * 50**2 / (0.6**2 + 50**2)
    truth = 0.5 * np.log(2 * np.pi * model_var) + 0.5 * second_moment / model_var
    np.testing.assert_allclose(result["exact_nll"], truth, atol=2e-4)
    np.testing.assert_allclose(result["model_mass"], 1, atol=0.05)  # the grid ends near the data
    assert abs(result["nll"]["mean"] - truth) < 5 * result["nll"]["stderr"]
    kl = result["kl_of_examples"]
    assert kl["num_examples"] == 1000 and abs(kl["mean"] - result["kl"]) < 5 * kl["stderr"] < kl["mean"]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("training.score_matching_order", 4, r"training\.score_matching_order=4 is not supported; use one of 1, 2, 3"),
        ("training.sde", "edm", r"training\.sde='edm'.*vpsde"),
        ("training.reduce_mean", False, r"reduce_mean=False with training\.score_matching_order=2"),
        ("training.n_jitted_steps", 7, r"n_jitted_steps=7 must divide training\.log_freq"),
        ("training.importance_weighting", True, r"importance_weighting=True needs training\.likelihood_weighting"),
        ("training.smallest_time", 1.5, r"smallest_time=1\.5 must be below"),
        ("training.batch_size", 0, r"batch_size=0 must be at least 1"),
        ("eval.end_ckpt", -1, r"eval\.end_ckpt=-1"),
        ("data.dataset", "NIST", r"NIST.*DIGITS"),
        ("model.name", "unet", r"unet.*ncsnpp"),
        ("model.progressive", "foo", r"model\.progressive='foo'"),
    ],
)
def test_bad_config_values_are_named(key, value, complaint):
    config = tiny_digits(score_matching_order=2)
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=complaint) as error:
        run_lib.build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("is_image", "keys", "complaint"),
    [
        (True, {"model.name": "mlp"}, "model.name='mlp' takes points, but data.dataset='new' has images"),
        (False, {"model.name": "NCSNpp"}, "model.name='NCSNpp' takes images, but data.dataset='new' has points"),
        (False, {"model.name": "mlp", "eval.dequantizer": True}, "points are continuous; set eval.dequantizer=False"),
        (True, {}, None),
        (False, {"model.name": "mlp"}, None),
    ],
)
def test_a_new_data_set_with_the_wrong_network_is_one_line(monkeypatch, is_image, keys, complaint):
    shape = (8, 8, 1) if is_image else (2,)
    examples = np.zeros((4, *shape), np.uint8 if is_image else np.float32)
    data = datasets.Dataset("new", shape, is_image, examples, examples)
    monkeypatch.setitem(datasets._DATASETS, "new", lambda config: data)
    config = tiny_digits()
    config.data.dataset = "new"
    config.update_from_flattened_dict(keys)
    if complaint is None:
        assert run_lib.build(config).dataset is data
        return
    with pytest.raises(UserError) as error:
        run_lib.build(config)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "order"), [("training.exact_jacobian", True, 2), ("eval.hutchinson_type", "exact", 1)]
)
def test_an_exact_jacobian_of_a_large_image_is_refused(monkeypatch, key, value, order):
    examples = np.zeros((4, 32, 32, 3), np.uint8)
    data = datasets.Dataset("new", (32, 32, 3), True, examples, examples)
    monkeypatch.setitem(datasets._DATASETS, "new", lambda config: data)
    config = tiny_digits(score_matching_order=order)
    config.data.update(dataset="new", image_size=32, num_channels=3)
    run_lib.build(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        run_lib.build(config)
    message = str(error.value)  # 3072^2 float32 are 36 MiB
    assert f"{key}={value!r} with the 3072 dimensions" in message and "9,437,184 numbers (36 MiB) an example" in message
    assert "\n" not in message
    config.update(data={"dataset": "DIGITS", "image_size": 8, "num_channels": 1})
    run_lib.build(config)  # 64


def test_unknown_and_mistyped_keys():
    config = tiny_digits()
    config.training.bach_size = 3
    with pytest.raises(UserError, match=r"'training\.bach_size' does not exist; did you mean 'training\.batch_size'"):
        check_config(config)
    config = tiny_digits()
    with config.ignore_type():
        config.training.batch_size = "many"
    with pytest.raises(UserError, match=r"training\.batch_size='many' has type str; it must be int"):
        check_config(config)
    config = tiny_digits()
    del config.eval["rtol"]
    with pytest.raises(UserError, match=r"'eval\.rtol' is missing"):
        check_config(config)


def main(*arguments, devices=1):
    environment = {**ENVIRONMENT, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "main.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


DIGITS = "--config=configs/digits/ve_ncsnpp.py"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--config=configs/nope.py", "--mode=train"], "config file 'configs/nope.py' does not exist"),
        ([DIGITS, "--mode=train", "--config.training.bach_size=3"], "did you mean 'training.batch_size'"),
        ([DIGITS, "--mode=train", "--config.training.score_matching_order=4"], "use one of 1, 2, 3"),
        ([DIGITS, "--mode=fly"], "value should be one of"),
        ([DIGITS, "--mode=train", "--config.training.batch_size=9"], "batch_size=9 is not divisible by the 2 devices"),
        ([DIGITS, "--mode=train", "--config.data.dataset=NIST"], "NIST"),
        (["--config=configs/fashion_mnist/ve_ncsnpp.py", "--mode=train", "--config.data.dir=/no/where"], "/no/where"),
        ([DIGITS, "--mode=eval"], "--mode eval needs the workdir of a training run"),
        ([DIGITS, "--mode=train", "--workdir=gs://bucket/run"], "is remote; mount the bucket"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, arguments, complaint):
    done = main(f"--workdir={tmp_path / 'run'}", *arguments, devices=2)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and complaint in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def get_config(:\n", "mine.py, line 1: SyntaxError"),
        ("def get_config():\n    return {'seed': 1}\n", "mine.py, line 1: TypeError: get_config returns dict"),
        ("def get_config():\n    raise TypeError('a\\nb')\n", "mine.py, line 2: TypeError: a b; correct it there"),
    ],
)
def test_a_config_file_that_fails_ends_in_one_line(tmp_path, text, complaint):
    (tmp_path / "mine.py").write_text(text)
    done = main(f"--config={tmp_path / 'mine.py'}", "--mode=train", f"--workdir={tmp_path}", "--config.seed=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and complaint in line


def test_help_names_every_mode_flag_and_config_at_once():
    program = "import sys, main; sys.argv = ['main.py', '--help']; main.parse_flags(sys.argv)"
    heavy = (
        "import atexit, sys; atexit.register(lambda: print(sorted({'jax', 'numpy', 'tensorflow'} & set(sys.modules))))"
    )
    command = [sys.executable, "-c", f"{heavy}; {program}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")  # nothing heavy was imported for it
    for word in ("--config ", "--workdir ", "--mode ", "--eval_folder ", "--coordinator_address ", *console.MODES):
        assert f"  {word}" in done.stdout
    configs = {str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*/*.py") if p.name != "__init__.py"}
    assert set(re.findall(r"^  (configs/\S+)", done.stdout, re.MULTILINE)) == configs
    assert max(map(len, done.stdout.splitlines())) <= console.WIDTH
    assert main("--help").stdout + "[]\n" == done.stdout
    missing = main("--mode=train")
    assert missing.returncode == 1 and "error: --config must be given; python main.py --help" in missing.stderr


def test_help_may_be_cut_short():
    """As by `| head -3`: no traceback of a broken pipe."""
    command = [sys.executable, "main.py", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("example", console.EXAMPLES)
def test_examples_of_the_help_are_right(example):
    for argument in example.split():
        if argument.startswith("--config."):
            check_key(argument.removeprefix("--config.").partition("=")[0])
    arguments = dict(zip(example.split()[2::2], example.split()[3::2], strict=False))
    assert (ROOT / arguments["--config"]).is_file() and arguments["--mode"] in console.MODES


def test_commit_of_a_checkout(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", tmp_path, *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert launch.git_commit(tmp_path) == "unknown"
    git("init")
    assert launch.git_commit(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    assert launch.git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "runs").mkdir()
    assert launch.git_commit(tmp_path / "runs") == "unknown"  # a folder of it is not the code
    (tmp_path / "code.py").write_text("2")
    assert launch.git_commit(tmp_path) == git("rev-parse", "HEAD") + " with local changes"


def test_workdir_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint.*train first"):
        run_lib.evaluate(tiny_digits(), tmp_path)


def test_damaged_checkpoint_is_one_line(tmp_path):
    state = {"a": np.arange(4.0)}
    path = checkpoints.save(tmp_path, state, 1)
    assert not list(tmp_path.glob("*tmp*"))
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore(path)
