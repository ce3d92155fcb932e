# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of the public code: read, written back, evaluated, fine-tuned from; and hostile ones."""

import json
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from golden_utils import GOLDEN, golden_config, load_golden, load_params, relative_error

import checkpoints
import datasets
import losses
import run_lib
import sde_lib
from checkpoints import legacy
from checkpoints.__main__ import export
from errors import UserError
from models import create_model
from models.score import get_score_fn

ROOT = Path(__file__).parent.parent
FILES = {name: GOLDEN / f"ckpt_{name}" / "checkpoint_3" for name in ("vp", "ve")}


def raw(path):
    """The file's tree as flax's own reader gives it."""
    return flax.serialization.msgpack_restore(path.read_bytes())


def assert_same(actual, expected):
    """Same names, dtypes, shapes and values, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_loaded_fields(name):
    arrays = load_golden(f"ckpt_{name}_steps.npz")
    state = legacy.load_legacy(FILES[name])
    assert int(state["step"]) == int(state["opt_state"]["count"]) == 3
    assert state["lr"] == np.float32(arrays["lr"]) and state["ema_rate"] == np.float32(arrays["ema_rate"])
    np.testing.assert_array_equal(state["key"], arrays["saved_rng"])
    assert_same(state["params"], jax.tree.map(np.asarray, load_params(arrays, "final_params:")))
    checksum = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state["ema_params"]))
    assert checksum == pytest.approx(float(arrays["ema_checksum"][0]), rel=1e-6)
    moments = raw(FILES[name])["optimizer"]["state"]["param_states"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(state["opt_state"]["mu"]["Conv_0"]["kernel"], moments["grad_ema"])
    np.testing.assert_array_equal(state["opt_state"]["nu"]["Conv_0"]["kernel"], moments["grad_sq_ema"])


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_loaded_network_gives_the_recorded_score(name):
    arrays = load_golden(f"ckpt_{name}_steps.npz")
    config = golden_config(arrays)
    model, sde = create_model(config), sde_lib.from_config(config)
    state = legacy.load_legacy(FILES[name])
    score = jax.jit(lambda params, x, t: get_score_fn(sde, model, params, {})(x, t))
    for key in ("params", "ema_params"):
        recorded = arrays["score_params" if key == "params" else "score_ema"]
        assert relative_error(score(state[key], arrays["x"], arrays["t"]), recorded) < 2e-5


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_round_trip_and_export_equal_to_the_file_of_the_public_code(name, tmp_path):
    state = legacy.load_legacy(FILES[name])
    legacy.export_legacy(state, tmp_path / "checkpoint_3", float(state["lr"]), float(state["ema_rate"]))
    assert_same(raw(tmp_path / "checkpoint_3"), raw(FILES[name]))
    assert (tmp_path / "checkpoint_3").read_bytes() == FILES[name].read_bytes()
    assert_same(legacy.load_legacy(tmp_path / "checkpoint_3"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_3"]


def test_a_chunked_array_and_python_numbers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)  # flax's own writer, a gigabyte there
    tree = raw(FILES["vp"]) | {"step": 3, "lr": 1e-3, "ema_rate": np.float32(0.6)}
    path = tmp_path / "checkpoint_3"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert_same(legacy.load_legacy(path), legacy.load_legacy(FILES["vp"]))


# Files that lie. Each gives (bytes of the file, words of the message).


def ext_array(shape, name, buffer):
    return msgpack.ExtType(1, msgpack.packb((shape, name, buffer)))


def changed(change, **top):
    """The golden file after `change(tree)`."""
    tree = raw(FILES["vp"])
    change(tree)
    return flax.serialization.msgpack_serialize(tree | top)


def with_target_kernel(kernel):
    tree = {"step": 3, "optimizer": {"target": {"Conv_0": {"kernel": kernel}}}}
    return msgpack.packb(tree)


def hostile():
    good = FILES["vp"].read_bytes()
    generator = np.random.default_rng(0)
    yield "empty", b"", "is empty"
    for i in range(8):
        yield f"random {i}", generator.bytes(1 + 10 ** (i % 6)), ""
    for first in (0x80, 0x8F, 0xDE, 0xDF, 0xC9, 0xDD, 0xD9):
        yield f"random after {first:x}", bytes([first]) + generator.bytes(100_000), ""
    for size in (1, 7, 50, 1000, 200_000, len(good) - 1):
        yield f"cut at {size}", good[:size], "cut off" if size > 1 else ""
    yield "trailing bytes", good + b"\0" * 100, "100 bytes follow"
    yield "pickle", b"\x80\x04\x95\x0c\x00\x00\x00", ""
    yield "nested lists", b"\x91" * 100_000 + b"\x00", ""
    yield "nested maps", b"\x81\xa1a" * 100_000 + b"\x00", ""
    yield "nested maps, shallow", b"\x81\xa1a" * 500 + b"\xc0", ""
    yield "huge lists in each other", b"\xdd\x00\x0f\xff\xff" * 1_000_000, ""
    yield "huge maps in each other", b"\xdf\x00\x00\x03\xff\xa1a" * 100_000, ""
    yield "map of 4 billion", b"\xdf\xff\xff\xff\xff" + b"\xa1a\x00" * 1000, "max_map_len"
    yield "list of 4 billion", b"\xdd\xff\xff\xff\xff" + b"\x00" * 1000, "max_array_len"
    yield "bin of 4 GiB", b"\x81\xa4step\xc6\xff\xff\xff\xff" + b"\x00" * 1000, "cut off"
    yield "ext of 4 GiB", b"\x81\xa4step\xc9\xff\xff\xff\xff\x01" + b"\x00" * 1000, "max_ext_len"
    yield "name of 4 GiB", b"\x81\xdb\xff\xff\xff\xff" + b"a" * 1000, "cut off"
    many = b"".join(msgpack.packb(f"{i:04}") + b"\xc0" for i in range(1000))
    yield (
        "a million entries",
        b"\xde\x03\xe8" + b"".join(msgpack.packb(str(i)) + b"\xde\x03\xe8" + many for i in range(1000)),
        "more than 100000 entries",
    )
    yield "array larger than its bytes", with_target_kernel(ext_array((10**6, 10**6), "float32", b"\0" * 16)), "bytes"
    yield "array of negative shape", with_target_kernel(ext_array((-1, -4), "float32", b"\0" * 16)), "shape"
    yield "array of overflowing shape", with_target_kernel(ext_array((2**63, 2**63), "float32", b"")), "bytes"
    yield "empty array of huge shape", with_target_kernel(ext_array((0, 2**63), "float32", b"")), ""
    yield "objects", with_target_kernel(ext_array((1,), "object", b"\0" * 8)), "dtype 'object'"
    yield "structured", with_target_kernel(ext_array((1,), "f4,f4", b"\0" * 8)), "dtype 'f4,f4'"
    yield "array of arrays", with_target_kernel(msgpack.ExtType(1, b"\x93" * 100_000)), ""
    yield "other extension", with_target_kernel(msgpack.ExtType(7, b"x")), "extension 7"
    yield (
        "chunks that do not fit",
        with_target_kernel(
            {"__msgpack_chunked_array__": True, "shape": {"0": 10**12}, "chunks": {"0": ext_array((1,), "int8", b"\0")}}
        ),
        "do not fill its shape",
    )
    yield "another msgpack file", msgpack.packb({"a": 1}), "lacks step"
    yield "no EMA", changed(lambda tree: tree.pop("params_ema")), "lacks params_ema"
    yield "one more", changed(lambda tree: None, extra=1), "has extra"
    yield "no moments", changed(lambda tree: tree["optimizer"]["state"].pop("param_states")), "param_states"
    conv = "Conv_0/kernel"
    yield "EMA lacks", changed(lambda tree: tree["params_ema"]["Conv_0"].pop("kernel")), f"lacks params_ema/{conv}"
    yield (
        "moment lacks",
        changed(lambda tree: tree["optimizer"]["state"]["param_states"]["Conv_0"]["kernel"].pop("grad_ema")),
        f"{conv}/grad_ema",
    )
    yield (
        "EMA transposed",
        changed(
            lambda tree: tree["params_ema"].update(Dense_0={k: v.T for k, v in tree["params_ema"]["Dense_0"].items()})
        ),
        "params_ema/Dense_0/kernel of shape (32, 8)",
    )
    yield "text in place of an array", changed(lambda tree: tree["params_ema"]["Conv_0"].update(kernel="x")), conv
    yield "a name of two lines", changed(lambda tree: tree["params_ema"].update({"a\nb": np.zeros(1)})), "a\\nb"
    yield "integers", changed(lambda tree: tree["optimizer"]["target"]["Conv_0"].update(bias=np.zeros(8, int))), "int64"
    yield "step of -1", changed(lambda tree: None, step=-1), "step is -1"
    yield "step of words", changed(lambda tree: None, step="three"), "step"
    yield "other rng", changed(lambda tree: None, rng=np.zeros(4, np.uint32)), "rng"


@pytest.mark.parametrize(("content", "words"), [pytest.param(*case[1:], id=case[0]) for case in hostile()])
def test_hostile_file_ends_in_one_line_quickly_and_in_bounded_memory(content, words, tmp_path):
    path = tmp_path / "checkpoint_3"
    path.write_bytes(content)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(UserError) as caught:
            checkpoints.restore(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 2
    assert peak < 8 * len(content) + 2**21
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 2**16 + 8 * len(content) // 1024  # KiB
    message = str(caught.value)
    assert str(path) in message and words in message and len(message.splitlines()) == 1 and len(message) < 600


def test_another_architecture_is_refused_by_the_first_difference(tmp_path):
    arrays = load_golden("ckpt_vp_steps.npz")
    optimizer = losses.get_optimizer(golden_config(arrays).optim)
    params = load_params(arrays, "final_params:")

    def into(params):
        target = losses.TrainState(
            jnp.zeros((), jnp.int32), params, params, optimizer.init(params), {}, jax.random.PRNGKey(0)
        )
        return checkpoints.into(target, checkpoints.restore(FILES["vp"]).state, FILES["vp"])

    assert_same(into(params).params, jax.tree.map(np.asarray, params))
    transposed = params | {"Dense_0": {**params["Dense_0"], "kernel": params["Dense_0"]["kernel"].T}}
    for other, words in (
        (transposed, "params/Dense_0/kernel of shape (8, 32), this config wants (32, 8)"),
        ({k: v for k, v in params.items() if k != "Conv_1"}, "has params/Conv_1/"),
        (params | {"Conv_9": params["Conv_0"]}, "lacks params/Conv_9/"),
    ):
        with pytest.raises(UserError) as caught:
            into(other)
        assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.fixture
def tiny(monkeypatch):
    """The config of a recorded checkpoint, at order 2 on 8x8 images of noise."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    data = datasets.Dataset(name="noise", shape=(8, 8, 3), is_image=True, train=images, test=images[:4])
    monkeypatch.setattr(datasets, "load", lambda config: data)
    config = golden_config(load_golden("ckpt_vp_steps.npz"))
    config.training.update(batch_size=4, n_iters=2, log_freq=1, eval_freq=10, snapshot_freq=2)
    config.training.update(snapshot_freq_for_preemption=2, snapshot_sampling=False, score_matching_order=2)
    config.eval.update(batch_size=4, num_repeats=1, rtol=1e-1, atol=1e-1, enable_sampling=False)
    config.eval.update(begin_ckpt=3, end_ckpt=3)
    return config


def test_evaluates_in_place(tiny, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/checkpoint_3").write_bytes(FILES["vp"].read_bytes())
    (result,) = run_lib.evaluate(tiny, tmp_path)
    assert result["checkpoint"] == result["step"] == 3
    with np.load(tmp_path / "eval/bpd_3.npz") as file:
        assert all(np.isfinite(file[key]).all() for key in file.files)
    assert np.isfinite(result["bpd"]["mean"])


def start(task, workdir):
    """State and record that `run_lib.train` begins with."""
    state = task.init_state()
    resumed = run_lib._resume(task.config, workdir, state)
    return resumed or (run_lib._init_from(task.config.training, state)[0], {})


def test_starts_from_a_file_and_exports_it_again(tiny, tmp_path):
    source = legacy.load_legacy(FILES["vp"])
    tiny.training.init_from = str(FILES["vp"])
    task = run_lib.build(tiny)
    state, record = start(task, tmp_path / "nothing here")
    assert int(state.step) == 0 and record == {}
    assert_same(state.params, source["params"])
    assert_same(state.ema_params, source["ema_params"])
    fresh_optimizer = task.optimizer.init(state.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh_optimizer)

    tiny.training.update(init_optimizer=True, n_iters=5)
    state, _ = start(task, tmp_path / "nothing here")
    assert int(state.step) == 3
    adam, _, schedule = state.opt_state[1]
    assert int(adam.count) == int(schedule.count) == 3
    assert_same({"mu": adam.mu, "nu": adam.nu}, {key: source["opt_state"][key] for key in ("mu", "nu")})

    # saved as ours, then exported: the file of the public code again, to the byte
    folder = checkpoints.save(
        tmp_path / "checkpoints-meta", state.replace(key=source["key"]), 3, {"config": tiny.to_dict()}
    )
    out = tmp_path / "exported"
    command = [sys.executable, "-m", "checkpoints", "export", str(folder), str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert out.read_bytes() == FILES["vp"].read_bytes()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # it exists now
    assert done.returncode == 1 and done.stderr == f"error: {out} exists; give the name of a new file\n"

    # a folder of ours serves as well; the checkpoint of a run that is resumed comes before it
    tiny.training.update(init_from=str(folder), init_optimizer=False)
    state, _ = start(task, tmp_path / "nothing here")
    assert int(state.step) == 0
    assert_same(state.ema_params, source["ema_params"])
    tiny.training.init_from = "nowhere"
    state, record = start(task, tmp_path)
    assert int(state.step) == 3 and record["config"]["training"]["n_iters"] == 5


@pytest.mark.parametrize("folder", ["checkpoints-meta", "checkpoints"])
def test_a_run_of_the_public_code_is_not_silently_started_over(tiny, tmp_path, folder):
    path = tmp_path / folder / "checkpoint_3"
    path.parent.mkdir()
    path.write_bytes(FILES["vp"].read_bytes())
    for given in ("", str(path)):
        tiny.training.init_from = given
        with pytest.raises(UserError) as caught:
            run_lib._resume(tiny, tmp_path, target=None)
        message = str(caught.value)
        assert f"new --workdir with --config.training.init_from={path}" in message and "\n" not in message
    assert path.read_bytes() == FILES["vp"].read_bytes()


def test_a_file_is_neither_overwritten_nor_removed(tiny, tmp_path):
    content = FILES["vp"].read_bytes()
    for number in (1, 3):
        (tmp_path / f"checkpoint_{number}").write_bytes(content)
    state = {"a": np.zeros(2)}
    assert checkpoints.save(tmp_path, state, 3, keep=1).is_dir()
    assert (tmp_path / "checkpoint_3.legacy").read_bytes() == (tmp_path / "checkpoint_1").read_bytes() == content
    assert checkpoints.all_numbers(tmp_path) == [1, 3]
    for path, out, words in (
        (tmp_path / "checkpoint_1", "new", "layout already"),
        (tmp_path / "checkpoint_3", "new", "no 'config' in its record"),
        (tmp_path / "checkpoint_2", "new", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            export(path, tmp_path / out)
    with pytest.raises(UserError, match="cannot be written: No such file"):
        legacy.export_legacy(legacy.load_legacy(FILES["vp"]), tmp_path / "no/folder", 1e-3, 0.6)
    with pytest.raises(UserError, match="no Adam moments"):
        legacy.export_legacy({"opt_state": {"0": {}}}, tmp_path / "new", 1e-3, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("carried", [False, True])
def test_fine_tunes_at_order_two(tiny, tmp_path, carried):
    source = legacy.load_legacy(FILES["vp"])
    tiny.training.update(init_from=str(FILES["vp"]), init_optimizer=carried, n_iters=5 if carried else 2)
    state = run_lib.train(tiny, tmp_path)
    assert int(state.step) == tiny.training.n_iters
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state.params, source["params"]))
    assert 0 < max(moved) <= 3 * tiny.optim.lr  # two steps, each of some lr in every entry
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "train" in str(entry)] == ([4, 5] if carried else [1, 2])


def test_init_errors(tiny, tmp_path):
    tiny.training.init_optimizer = True
    with pytest.raises(UserError, match=r"needs training\.init_from"):
        run_lib.train(tiny, tmp_path)
    tiny.training.init_from = str(FILES["vp"])
    with pytest.raises(UserError, match="goes on from step 3"):
        run_lib.train(tiny, tmp_path)
    tiny.training.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        run_lib.train(tiny, tmp_path)
