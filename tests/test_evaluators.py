# SPDX-License-Identifier: Apache-2.0
"""What `--mode eval` computes: closed forms for an exact score; tiny digits, stopped and resumed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

import datasets
import losses
import report
import run_lib
import sde_lib
from configs.default_configs import get_default_configs
from errors import UserError
from evaluators import EVALUATORS, likelihood, loss, units
from evaluators import samples as sampled
from evaluators.context import Context, per_example, split
from evaluators.dequantized import uniform
from runtime.devices import replicate
from task import Task, build
from tests.tiny import tiny_digits

STD = np.array([0.3, 0.8, 1.5])


class ExactScore(nn.Module):
    """Of N(0, diag STD^2) diffused by the VP SDE to time t."""

    conditioning = "time"
    parameterization = "score"

    @nn.compact
    def __call__(self, x, t, train):
        scale = self.param("scale", nn.initializers.ones, ())  # a checkpoint has some parameter
        log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.5 * 0.1 * t
        alpha_sq = jnp.exp(2 * log_alpha)[:, None]
        return -scale * x / (alpha_sq * jnp.asarray(STD, jnp.float32) ** 2 + 1 - alpha_sq)


@pytest.fixture
def gaussian(tmp_path):
    """Task whose score is exact, 301 test examples, and a context to evaluate them in."""
    config = get_default_configs()
    config.training.update(sde="vpsde", exact_jacobian=True, score_matching_order=3)
    config.data.dataset = "gaussian"
    config.eval.update(batch_size=128, num_repeats=2, num_samples=700, num_examples=0, fisher_num_examples=0)
    config.eval.update(bound_num_times=500, fisher_num_times=5)
    rng = np.random.default_rng(0)
    train, test = ((rng.normal(size=(n, 3)) * STD).astype(np.float32) for n in (10, 301))
    dataset = datasets.Dataset("gaussian", (3,), False, train, test)
    model = ExactScore()
    task = Task(config, sde_lib.from_config(config), dataset, model, losses.get_optimizer(config.optim))
    params = {"scale": np.float32(1)}
    context = Context(replicate(params), replicate({}), 1, tmp_path, {"parameters": "exact"})
    return task, context


def true_logp(x):
    return -0.5 * np.sum((x / STD) ** 2 + np.log(2 * np.pi * STD**2), axis=1)


def test_likelihood_of_an_exact_score(gaussian):
    task, context = gaussian
    result = EVALUATORS["enable_bpd"](task, uniform())(context)
    saved = np.load(context.file("bpd"))
    truth = true_logp(task.dataset.test)
    assert saved["logp"].shape == (2, 301)  # every example once a repeat, the last batch of 45 included
    # a probe's v . J v is the trace for a diagonal Jacobian; beta makes the prior exact to 1e-4
    np.testing.assert_allclose(saved["logp"], np.stack([truth, truth]), atol=2e-3)
    assert result["nll"]["mean"] == pytest.approx(-truth.mean(), abs=1e-3)
    assert result["nll"]["stderr"] == pytest.approx(truth.std(ddof=1) / np.sqrt(301), rel=1e-3)
    assert result["nfe"]["min"] == saved["nfe"].min() and result["nfe"]["max"] == saved["nfe"].max()


def test_likelihood_on_an_even_grid(gaussian, caplog):
    task, context = gaussian
    task.config.eval.ode_solver = "adams"
    result = EVALUATORS["enable_bpd"](task, uniform())(context)
    saved = np.load(context.file("bpd"))
    errors = np.abs(saved["logp"] - true_logp(task.dataset.test))
    assert errors.shape == saved["ode_error"].shape == (2, 301) and errors.max() < 3e-3
    assert result["nfe"] == {"min": 203, "mean": 203, "max": 203}
    expected = {"mean": saved["ode_error"].mean(), "max": saved["ode_error"].max()}
    assert result["ode_error"].pop("unit") == "nats"
    assert result["ode_error"] == pytest.approx(expected, rel=1e-5)
    assert result["nll"]["settings"]["ode_steps"] == 192 and "rtol" not in result["nll"]["settings"]
    task.config.eval.ode_steps = 4
    result = EVALUATORS["enable_bpd"](task, uniform())(context)["nll"]
    saved = np.load(context.file("bpd"))
    assert re.search(r"failed on \d+ of 128 .*eval\.ode_steps=4 the error.*eval\.ode_solver=rk45", caplog.text)
    failed = np.isnan(saved["logp"]).any(axis=0)  # an example with a failed repeat
    assert 0 < failed.sum() < 301 and result["num_failed"] == failed.sum()
    assert result["num_examples"] == 301 - failed.sum()
    assert result["mean"] == pytest.approx(-saved["logp"][:, ~failed].mean(), rel=1e-5)
    text = report.results_table([{"checkpoint": 1, "step": 2, "nll": result}])
    assert f"({301 - failed.sum()} examples, incomplete: {failed.sum()} failed)" in text


@pytest.mark.parametrize(("split_name", "count"), [("test", 20), ("train", 30), ("train", 0)])
def test_the_gaussian_is_of_the_same_examples_as_the_likelihood(tmp_path, monkeypatch, split_name, count):
    config = tiny_digits()
    config.eval.update(dataset=split_name, num_examples=count, gaussian_baseline=True, batch_size=500)
    seen = []

    def log_likelihood(task, size):
        def call(params, model_state, x, index, repeat):
            seen.append(x)
            return {"logp": np.zeros(len(x), np.float32), "nfe": np.ones(len(x), np.int32)}

        return call

    monkeypatch.setattr(likelihood, "log_likelihood", log_likelihood)
    task = build(config)
    result = EVALUATORS["enable_bpd"](task, uniform())(Context({}, {}, 1, tmp_path, {}))
    train = np.concatenate([b["x"] for b in datasets.eval_batches(task.dataset, config.data, "train", 500, seed=42)])
    unit, train = (x.reshape(len(x), -1).astype(np.float64) for x in (np.concatenate(seen), train))
    assert len(unit) == (count or 1500) and not config.data.centered
    gaussian = stats.multivariate_normal(train.mean(axis=0), np.cov(train, rowvar=False))
    expected = -gaussian.logpdf(unit).mean() / (64 * np.log(2)) + np.log2(17)
    assert result["gaussian_bpd"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("dsm", "importance"), [(True, True), (False, True), (True, False)])
def test_bound_of_an_exact_score_is_the_likelihood(gaussian, dsm, importance):
    task, context = gaussian
    task.config.eval.update(dsm=dsm, bound_importance_weighting=importance)
    result = EVALUATORS["bound"](task, uniform())(context)["bound"]
    errors = np.load(context.file("bound"))["bound"] - true_logp(task.dataset.test)
    spread = errors.mean(axis=0).std(ddof=1) / np.sqrt(301)
    assert abs(errors.mean()) < 4 * spread < 0.4
    assert result["mean"] == pytest.approx(-np.load(context.file("bound"))["bound"].mean(), rel=1e-5)


def test_loss_of_an_exact_score(gaussian):
    """E|sigma s + z|^2 / D = mean_d sigma^2 / (alpha^2 std_d^2 + sigma^2) ... at the minimum, averaged over t."""
    task, context = gaussian
    task.config.eval.batch_size = 50
    result = EVALUATORS["enable_loss"](task, uniform())(context)["loss"]
    times = np.linspace(1e-5, 1, 2001)
    alpha_sq = np.exp(-0.5 * times**2 * 19.9 - 0.1 * times)[:, None]
    at_minimum = np.mean(1 - (1 - alpha_sq) / (alpha_sq * STD**2 + 1 - alpha_sq), axis=1)
    truth = np.trapezoid(at_minimum, times)
    assert abs(result["first"]["mean"] - truth) < 4 * result["first"]["stderr"]
    saved = np.load(context.file("loss"))
    assert saved["loss"].shape == (1, 301) and np.all(saved["third"] > 0)
    np.testing.assert_allclose(saved["loss"], saved["first"] + saved["second"] + saved["third"], rtol=1e-5)


def units_of(kind, context):
    return {path.name for path in (context.out / "units").glob(f"{kind}_*")}


def test_a_new_key_of_the_loss_is_not_read_back_from_another_setting(gaussian, monkeypatch):
    task, context = gaussian
    original = losses.get_loss_fn

    def scaled(training, *args):  # what a newcomer adds: a key that the loss reads
        return lambda *call: jax.tree.map(lambda x: training.scale * x, original(training, *args)(*call))

    monkeypatch.setattr(losses, "get_loss_fn", scaled)
    task.config.training.update(score_matching_order=1, exact_jacobian=False)
    task.config.eval.num_examples = 8
    means = []
    for scale in (1.0, 2.0):
        with task.config.unlocked():
            task.config.training.scale = scale
        means.append(EVALUATORS["enable_loss"](task, uniform())(context)["loss"]["loss"]["mean"])
    assert means[1] == pytest.approx(2 * means[0])
    before = units_of("loss", context)
    assert set(loss.CANNOT_MATTER) <= set(task.config.training)
    task.config.training.update(n_iters=7, wandb_project="mine", batch_size=3)
    EVALUATORS["enable_loss"](task, uniform())(context)
    assert units_of("loss", context) == before and len(before) == 2


@pytest.mark.parametrize(("method", "ignored"), [("ode", "snr"), ("pc", "rtol")])
def test_samples_are_told_apart_by_every_key_that_their_sampler_reads(gaussian, monkeypatch, method, ignored):
    task, context = gaussian
    sampling_config = task.config.sampling
    sampling_config.method = method
    assert {key for keys in sampled.CANNOT_MATTER.values() for key in keys} < set(sampling_config)
    monkeypatch.setattr(sampled, "sampler", lambda task: lambda p, s, keys: (np.zeros((len(keys), 3)), np.ones(1)))
    run = EVALUATORS["enable_sampling"]
    run(task, uniform())(context)
    sampling_config[ignored] = 0.3
    run(task, uniform())(context)
    assert len(units_of("samples", context)) == 1
    with task.config.unlocked():
        sampling_config.churn = 1.0  # what a newcomer adds
    run(task, uniform())(context)
    assert len(units_of("samples", context)) == 2


def test_samples_of_an_exact_score(gaussian):
    task, context = gaussian
    result = EVALUATORS["enable_sampling"](task, uniform())(context)["sampling"]
    samples = np.load(context.file("samples"))["samples"]
    assert samples.shape == (700, 3) and result["num_samples"] == 700  # not a round more
    np.testing.assert_allclose(samples.mean(axis=0) / STD, 0, atol=4 / np.sqrt(700))
    np.testing.assert_allclose(samples.std(axis=0) / STD, 1, atol=4 / np.sqrt(1400))


@pytest.mark.parametrize(("method", "remedy"), [("ode", "loosen sampling.rtol"), ("pc", "raise model.num_scales")])
def test_failed_samples_are_counted(gaussian, monkeypatch, caplog, method, remedy):
    task, context = gaussian
    task.config.sampling.method = method
    task.config.eval.update(batch_size=4, num_samples=10)
    drawn = np.arange(36, dtype=np.float32).reshape(12, 3)
    drawn[[1, 6, 11], 2] = np.nan, np.inf, np.nan  # the last one is of a round of 4 of which 2 are wanted

    def draw(params, state, keys):
        rows = drawn[draw.done : draw.done + len(keys)]
        draw.done += len(keys)
        return rows, np.full(len(rows), 7)

    draw.done = 0
    monkeypatch.setattr(sampled, "sampler", lambda task: draw)
    result = EVALUATORS["enable_sampling"](task, uniform())(context)["sampling"]
    assert (result["num_samples"], result["num_failed"], result["nfe"]) == (8, 2, 7)
    np.testing.assert_array_equal(np.load(context.file("samples"))["samples"], drawn[[0, 2, 3, 4, 5, 7, 8, 9]])
    assert "failed on 1 of 4 samples" in caplog.text and remedy in caplog.text
    assert ("reverse_diffusion" in caplog.text) == (method == "pc")


def test_an_incomplete_evaluation_is_written_and_exits_with_an_error(trained, monkeypatch):
    original = sampled.sampler

    def spoilt(task):
        draw = original(task)

        def call(*args):
            x, nfe = draw(*args)
            x = np.array(x)
            x[0] = np.nan
            return x, nfe

        return call

    monkeypatch.setattr(sampled, "sampler", spoilt)
    config = tiny_digits()
    config.eval.enable_bpd = False
    with pytest.raises(UserError, match=r"incomplete: checkpoint 2: 1 failed of sampling\. Warnings above tell why"):
        run_lib.evaluate(config, trained, "incomplete")
    result = json.loads((trained / "incomplete/report_2.json").read_text())
    assert (result["sampling"]["num_samples"], result["sampling"]["num_failed"]) == (3, 1)
    assert np.load(trained / "incomplete/samples_2.npz")["samples"].shape == (3, 8, 8, 1)


def test_units_of_other_data_or_code_are_not_read_back(gaussian, trained, monkeypatch, tmp_path):
    task, context = gaussian
    evaluate = EVALUATORS["enable_loss"](task, uniform())
    evaluate(context)
    task.dataset.test[300, 2] += 1  # another copy of the data
    evaluate(context)
    assert len(units_of("loss", context)) == 2

    def identity(**data):
        task = run_lib.build(tiny_digits())
        task.config.data.update(**data)
        return run_lib._load(task, task.init_state(), trained / "checkpoints/checkpoint_2", tmp_path)[0].identity

    first = identity()
    assert first == identity() != identity(dir="/elsewhere")
    monkeypatch.setattr(run_lib, "code_digest", lambda: "mended")
    assert identity() != first


def test_the_digest_of_the_code_is_of_all_that_an_evaluation_runs(monkeypatch, tmp_path):
    program = (
        "import sys, run_lib; print(*sorted(m.__file__ or '' for m in sys.modules.values() if hasattr(m, '__file__')))"
    )
    root = Path(units.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    files = [Path(name) for name in done.stdout.split() if name.startswith(f"{root}/") and "/.venv/" not in name]
    loaded = {path.relative_to(root).with_suffix("").parts[0] for path in files}
    assert "likelihood" in loaded
    around = {
        "checkpoints",
        "configs",
        "errors",
        "legacy",
        "loop",
        "plots",
        "report",
        "run_lib",
        "runtime",
        "snapshots",
    }
    assert loaded - around == set(units._CODE)

    monkeypatch.setattr(units, "__file__", str(tmp_path / "evaluators" / "units.py"))
    (tmp_path / "models").mkdir()
    digests = {units.code_digest()}
    for path, text in (("ode.py", "1"), ("ode.py", "2"), ("models/mlp.py", "2"), ("report.py", "2")):
        (tmp_path / path).write_text(text)
        digests.add(units.code_digest())
    assert len(digests) == 4  # the report's is not among them


def test_fisher_curves_of_an_exact_score(gaussian):
    """The ODE's own score is the model's: the misfit of the prior is below 1e-4."""
    task, context = gaussian
    EVALUATORS["enable_fisher"](task, uniform())(context)
    saved = np.load(context.file("fisher"))
    assert saved["times"].shape == (5,)
    assert np.all(saved["score_ode"] < 1e-3 * (1 + saved["score_normal"]))
    assert np.all(saved["grad_divergence_normal"] < 1e-4) and np.all(saved["divergence_normal"][1:] > 0)
    single = dict(saved)
    task.config.eval.fisher_num_probes = 2
    EVALUATORS["enable_fisher"](task, uniform())(context)
    pairs = np.load(context.file("fisher"))
    for name in ("score_normal", "divergence_normal"):  # the same, as a Rademacher probe gives the trace of c I exactly
        np.testing.assert_allclose(pairs[name], single[name], rtol=1e-3)
    assert any(not np.array_equal(pairs[name], single[name]) for name in single)


def test_results_do_not_depend_on_the_batch(gaussian):
    task, context = gaussian
    task.config.sampling.update(rtol=1e-7, atol=1e-7)  # at 1e-5 a step taken here and not there is seen
    logps, samples = [], []
    for size in (128, 37):
        task.config.eval.update(batch_size=size, num_samples=60)
        EVALUATORS["enable_bpd"](task, uniform())(context)
        EVALUATORS["enable_sampling"](task, uniform())(context)
        logps.append(np.load(context.file("bpd"))["logp"])
        samples.append(np.load(context.file("samples"))["samples"])
    np.testing.assert_allclose(logps[0], logps[1], atol=1e-4)
    np.testing.assert_allclose(samples[0], samples[1], atol=1e-4)


def test_products_are_in_float32():
    """On the accelerators whose default is TF32; in what is compiled, not in what the CPU does."""
    seen = {}

    def fn(params, state, x):
        jaxpr = jax.make_jaxpr(lambda x: x @ x.T)(x)
        seen["precision"] = jaxpr.eqns[-1].params["precision"] or jax.config.jax_default_matmul_precision
        return x.sum(axis=1)

    per_example(fn, 2)({}, {}, np.ones((2, 3), np.float32))
    assert "float32" in str(seen["precision"]) or "HIGHEST" in str(seen["precision"])


def test_batches_of_a_split(gaussian):
    task, _ = gaussian
    examples = split(task, "test", repeats=2)
    seen = [examples.batch(k) for k in range(examples.num_units)]
    assert [repeat for repeat, _, _ in seen] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(np.concatenate([index for _, _, index in seen]), np.tile(np.arange(301), 2))


def evaluated(config, workdir, folder="eval"):
    results = run_lib.evaluate(config, workdir, folder)
    arrays = {p.name: dict(np.load(p)) for p in sorted((workdir / folder).glob("*.npz"))}
    return results, arrays


def assert_same(a, b):
    assert json.dumps(a[0]) == json.dumps(b[0])
    assert a[1].keys() == b[1].keys() and len(a[1]) > 3
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(tiny_digits(), workdir)
    return workdir


def everything():
    config = tiny_digits()
    config.eval.update(enable_loss=True, bound=True, enable_fisher=True, bound_num_times=5, fisher_num_times=3)
    config.eval.update(fisher_num_examples=8, num_repeats=2, num_probes=2)
    config.sampling.method, config.model.num_scales = "pc", 6
    return config


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_to_the_same_figures(trained, monkeypatch):
    config = everything()
    whole = evaluated(config, trained, "whole")
    (result,) = whole[0]
    for key in ("loss", "bpd", "bound", "sampling", "fisher", "nfe"):
        assert key in result
    assert result["bpd"]["num_repeats"] == 2 and result["bpd"]["stderr_over_repeats"] > 0
    assert result["bpd"]["settings"]["num_probes"] == 2

    class StoppedError(Exception):
        pass

    original = units.write_npz

    for allowed in (1, 4, 9, 2):  # within loss, likelihood, bound, samples
        written = []

        def write(path, allowed=allowed, written=written, **arrays):
            if path.parent.parent.name == "units":
                if len(written) == allowed:
                    raise StoppedError
                written.append(path)
            original(path, **arrays)

        with monkeypatch.context() as patch:
            patch.setattr(units, "write_npz", write)
            with pytest.raises(StoppedError):
                run_lib.evaluate(config, trained, "task")
    assert_same(evaluated(config, trained, "task"), whole)


def test_other_settings_are_computed_anew_and_results_add_up(trained):
    config = tiny_digits()
    config.eval.update(enable_sampling=False, num_examples=8, hutchinson_type="gaussian")
    first = run_lib.evaluate(config, trained, "mixed")[0]
    config.eval.hutchinson_type = "rademacher"
    second = run_lib.evaluate(config, trained, "mixed")[0]
    assert first["bpd"]["mean"] != second["bpd"]["mean"]
    config.eval.update(enable_bpd=False, enable_sampling=True)
    third = run_lib.evaluate(config, trained, "mixed")[0]
    assert third["bpd"] == second["bpd"] and "sampling" in third
    config.eval.update(enable_bpd=True, enable_sampling=False, dataset="train")
    fourth = run_lib.evaluate(config, trained, "mixed")[0]
    assert fourth["bpd"] == second["bpd"] and fourth["bpd_train"]["num_examples"] == 8
    assert fourth["bpd_train"]["num_repeats"] == 1


def test_a_checkpoint_is_waited_for_only_if_asked(trained):
    config = tiny_digits()
    config.eval.update(begin_ckpt=2, end_ckpt=3, enable_sampling=False, num_examples=8)
    with pytest.raises(UserError, match=r"holds no checkpoint_3 \(it has: 1, 2\).*eval\.wait_for_checkpoints_s"):
        run_lib.evaluate(config, trained, "wait")
    assert (trained / "wait" / "report_2.json").is_file()  # what is there is not held up by what is not
