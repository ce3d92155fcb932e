# SPDX-License-Identifier: Apache-2.0
"""Reports of made-up runs: what is seen in the files must be what went in."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
from configs.default_configs import get_default_configs
from errors import UserError
from report import run_curves, run_files, sample_grids, site
from report.__main__ import main

REPO = Path(report.__file__).parent.parent
MEANS, STDS, WEIGHTS = np.array([-2, -6, 4]) / 7, np.sqrt([0.1, 0.1, 1]) / 7, np.array([0.3, 0.3, 0.4])


class Page(HTMLParser):
    """What a page holds: its text without tags, and each tag's attributes that could name another file."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.links, self.tags = "", [], []
        self.feed(path.read_text())

    def handle_data(self, data):
        self.text += data + "\n"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def images(self) -> list[Image.Image]:
        found = [re.fullmatch(r"data:image/png;base64,(.*)", link) for link in self.links]
        assert all(found), "a picture that is not in the page itself"
        return [Image.open(io.BytesIO(base64.b64decode(match[1]))) for match in found if match]


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def mixture_logp(x: np.ndarray, shift: float = 0.0) -> np.ndarray:
    terms = WEIGHTS * np.exp(-0.5 * ((x - MEANS - shift) / STDS) ** 2) / (STDS * math.sqrt(2 * math.pi))
    return np.log(terms.sum(axis=-1) + 1e-300)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_metrics(workdir: Path, order: int = 3, n: int = 40, every: int = 500, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(every, every * n + 1, every):
        for split, noise in (("train", 0.15), ("eval", 0.02)):
            terms = {"first": 0.4 + 0.6 * math.exp(-step / 900), "second": 0.3 + 9 * math.exp(-step / 400)}
            terms["third"] = 2 + 900 * math.exp(-step / 700)
            terms = {name: v * math.exp(noise * rng.normal()) for name, v in terms.items()}
            terms = {name: v if i < order else 0.0 for i, (name, v) in enumerate(terms.items())}
            row = {
                "step": step,
                "split": split,
                "loss": terms["first"] + terms["second"] / 2 + terms["third"] / 10,
                **terms,
            }
            if split == "train":
                row["grad_norm"] = math.exp(rng.normal() - step / 5000)
            rows.append(json.dumps(row) + "\n")
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(rows))


def toy_run(workdir: Path, shift: float = 0.01, order: int = 3, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    write_metrics(workdir, order, seed=seed)
    write_json(workdir / "config.json", {"data": {"dataset": "mog", "dim": 1}, "training": {"note": "<script>&"}})
    index = rng.choice(3, 5000, p=WEIGHTS)
    data = (MEANS[index] + STDS[index] * rng.normal(size=5000)).astype(np.float32)[:, None]
    x = np.linspace(-1.6, 1.6, 1001, dtype=np.float32)[:, None]
    model = mixture_logp(x, shift) + 0.03 * np.sin(9 * x[:, 0])
    (workdir / "eval").mkdir()
    np.savez(workdir / "eval/density_1.npz", x=x, model_logp=model, true_logp=mixture_logp(x), data=data)
    logp = mixture_logp(data, shift)
    np.savez(workdir / "eval/bpd_1.npz", logp=logp[None], nfe=np.full((1, 5000), 60))
    np.savez(workdir / "eval/samples_1.npz", samples=data + np.float32(shift))
    result = {"checkpoint": 1, "step": 20000, "dataset": "mog", "true_entropy": 0.0123456, "kl": 0.00391}
    result["nll"] = {"mean": float(-logp.mean()), "stderr": 0.0124, "unit": "nats", "num_examples": 5000}
    result["nfe"] = {"min": 50, "mean": 61.25, "max": 74}
    write_json(workdir / "eval/report_1.json", result)
    return workdir


def plane_run(workdir: Path, truth: bool) -> Path:
    """A checkerboard on [-4, 4]^2: no config, no metrics."""
    axis = np.linspace(-5, 5, 50, dtype=np.float32)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)

    def inside(p):
        return (np.abs(p) < 4).all(axis=-1) & (np.floor(p / 2).sum(axis=-1) % 2 == 0)

    model = np.where(inside(x), 1 / 32, 1e-4) * np.exp(0.1 * np.sin(3 * x).sum(axis=-1))
    data = np.random.default_rng(0).uniform(-4, 4, (8000, 2)).astype(np.float32)
    data = data[inside(data)]
    arrays = {"x": x, "model_logp": np.log(model), "data": data}
    if truth:
        with np.errstate(divide="ignore"):
            arrays["true_logp"] = np.log(inside(x) / 32)
    (workdir / "eval").mkdir(parents=True)
    np.savez(workdir / "eval/density_2.npz", **arrays)
    np.savez(
        workdir / "eval/samples_2.npz", samples=data[::-1] + 0.1 * np.random.default_rng(1).normal(size=data.shape)
    )
    return workdir


def digits(n: int) -> np.ndarray:
    """n random images [8, 8, 1] in uint8."""
    return np.random.default_rng(3).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


def image_run(workdir: Path) -> Path:
    write_metrics(workdir, order=1, n=200, every=10)
    write_json(workdir / "config.json", {"data": {"dataset": "DIGITS"}})
    report.save_image_grid(workdir / "samples/step_00001000.png", digits(64))
    report.save_image_grid(workdir / "samples/step_00002000.png", digits(9))
    (workdir / "eval").mkdir()
    for number, mean in ((9, 4.0), (10, 3.0)):
        bpd = mean + 0.3 * np.random.default_rng(number).normal(size=(2, 360))
        np.savez(workdir / f"eval/bpd_{number}.npz", bpd=bpd, nfe=np.full((2, 360), 80))
        result = {"checkpoint": number, "step": number * 100, "dataset": "DIGITS", "some_metric": 12.5}
        result["bpd"] = {"mean": 3.14159, "stderr": 0.0123, "num_examples": 360, "num_repeats": 2}
        result["sampling"] = {"num_samples": 64, "nfe": 93.5}
        write_json(workdir / f"eval/report_{number}.json", result)
    return workdir


def headings(page: Path) -> list[str]:
    return [html.unescape(found) for found in re.findall("<h2>(.*?)</h2>", page.read_text())]


def names(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "report").iterdir()}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_grid_holds_each_image_pixel_for_pixel(tmp_path, channels, kind):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, channels), dtype=np.uint8)
    report.save_image_grid(tmp_path / "new" / "grid.png", images if kind == "uint8" else images / 255, columns=3)
    grid = np.asarray(picture(tmp_path / "new" / "grid.png"))
    factor, pad = 5, 2  # 8 * 5 is the first multiple of 8 not below 40
    assert grid.shape == (2 * (40 + pad) + pad, 3 * (60 + pad) + pad) + ((3,) if channels == 3 else ())
    for i, image in enumerate(images):
        y, x = pad + i // 3 * (40 + pad), pad + i % 3 * (60 + pad)
        cell = grid[y : y + 40, x : x + 60].reshape(40, 60, channels)
        np.testing.assert_array_equal(cell, np.kron(image, np.ones((factor, factor, 1), np.uint8)))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"], "a temporary file is left"


def test_grid_clips_and_does_not_enlarge_what_is_large(tmp_path):
    image = np.zeros((1, 64, 64, 1), np.float32)
    image[0, 0, :4, 0] = [-3.0, 2.0, np.nan, 0.5]
    report.save_image_grid(tmp_path / "grid.png", image)
    grid = np.asarray(picture(tmp_path / "grid.png"))
    assert grid.shape == (68, 68)
    assert grid[2, 2:6].tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 2), (0, 8, 8, 1)])
def test_grid_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match="images must be"):
        report.save_image_grid(tmp_path / "grid.png", np.zeros(shape))


def test_toy_report(tmp_path):
    workdir = toy_run(tmp_path / "mog")
    path = report.write_report(workdir, title="A <b>title</b> & more")
    assert path == workdir / "report" / "report.html"
    assert names(workdir) == {"report.html", "losses.png", "samples.png", "density.png", "bpd.png"}
    page, source = Page(path), path.read_text()
    sizes = [image.size for image in page.images()]
    assert sizes == [picture(workdir / "report" / f"{n}.png").size for n in ("samples", "density", "bpd", "losses")]
    assert "http" not in source and "script" not in page.tags and "link" not in page.tags
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in source and "b" not in page.tags
    assert '"note": "<script>&"' in page.text and page.tags.count("details") == 3  # results, config, all of it
    nll = json.loads((workdir / "eval/report_1.json").read_text())["nll"]["mean"]
    for text in (f"{nll:.3f} ± 0.012 nats (5,000 examples)", "0.012346 nats", "0.00391 nats", "step 20,000"):
        assert text in page.text
    assert "min 50, mean 61.25, max 74" in page.text
    for name in ("metrics.jsonl", "eval/density_1.npz", "eval/samples_1.npz", "eval/bpd_1.npz"):
        assert name in page.text


def test_a_panel_for_each_term_that_is_not_all_zero(tmp_path):
    sizes = {}
    for order in (1, 3):
        write_metrics(tmp_path / str(order), order)
        report.write_report(tmp_path / str(order))
        sizes[order] = picture(tmp_path / str(order) / "report/losses.png").size
    width, height = 4.2 * 130, 3.1 * 130
    assert sizes[1] == pytest.approx((3 * width, height), abs=1)  # first, total, gradient
    assert sizes[3] == pytest.approx((3 * width, 2 * height), abs=1)  # and second, third


def test_smoothing_is_the_mean_of_the_neighbours_and_leaves_out_what_is_not_finite():
    steps, values = np.arange(81), np.random.default_rng(0).normal(size=81)
    values[7] = np.nan
    x, y = run_curves.smooth(steps, values)
    kept = np.delete(values, 7)
    assert 7 not in x and len(y) == 80
    np.testing.assert_allclose([y[0], y[40], y[-1]], [kept[:3].mean(), kept[38:43].mean(), kept[-3:].mean()])
    assert len(run_curves.smooth(steps[:0], values[:0])[1]) == 0


@pytest.mark.parametrize("truth", [True, False])
def test_plane_report_without_metrics_and_config(tmp_path, truth):
    workdir = plane_run(tmp_path, truth)
    page = Page(report.write_report(workdir))
    assert names(workdir) == {"report.html", "samples.png", "density.png"}
    assert len(page.images()) == 2 and "details" not in page.tags and "table" not in page.tags
    assert f"beside {'truth' if truth else 'true data'}" in page.text


def test_2d_density_is_drawn_with_x0_to_the_right_and_x1_upwards():
    axis = np.linspace(-1, 1, 11)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    logp = np.log(1 + 10 * x[:, 0] * (x[:, 0] > 0) + 3 * x[:, 1] * (x[:, 1] > 0))
    figure, _ = run_curves.density_2d({"x": x, "model_logp": logp, "true_logp": logp})
    for ax in figure.axes[:2]:
        (mesh,) = ax.collections
        shown = np.asarray(mesh.get_array())
        assert not ax.yaxis_inverted() and shown.shape == (11, 11)
        corners = mesh.get_coordinates()
        assert [*corners[0, 0], *corners[-1, -1]] == pytest.approx([-1.1, -1.1, 1.1, 1.1])
        assert shown[0, -1] == pytest.approx(11)  # row: x1 = -1, column: x0 = 1
        assert shown[-1, 0] == pytest.approx(4)


def test_image_report_takes_the_newest_of_each(tmp_path):
    workdir = image_run(tmp_path)
    page = Page(report.write_report(workdir))
    pictures = {"losses.png", "samples.png", "samples_over_training.png", "bpd.png", "bpd_by_checkpoint.png"}
    assert names(workdir) == {"report.html", *pictures}
    assert (workdir / "report/samples.png").read_bytes() == (workdir / "samples/step_00002000.png").read_bytes()
    assert "eval/bpd_10.npz" in page.text  # 10 is newer than 9, whatever the alphabet says
    assert page.text.index("Checkpoint 9, step 900") < page.text.index("Checkpoint 10, step 1,000")
    for text in ("3.142 ± 0.012 bits/dim (360 examples)", "some metric", "12.5", "num samples 64, nfe 93.5"):
        assert text in page.text
    for path in [workdir / "metrics.jsonl", *workdir.glob("eval/bpd_*")]:  # the pictures that are not asked for below
        path.unlink()
    np.savez(workdir / "eval/samples_10.npz", samples=digits(100))
    report.write_report(workdir)  # training went on after this evaluation: its samples are newer
    assert (workdir / "report/samples.png").read_bytes() == (workdir / "samples/step_00002000.png").read_bytes()
    write_json(workdir / "eval/report_11.json", {"checkpoint": 11, "step": 2000})
    np.savez(workdir / "eval/samples_11.npz", samples=digits(100))
    assert "The first 64 of 100 samples" in Page(report.write_report(workdir)).text
    assert picture(workdir / "report/samples.png").size == (8 * 42 + 2, 8 * 42 + 2)


def test_mean_and_band_of_the_likelihood_histogram(tmp_path):
    values = np.random.default_rng(0).normal(3, 1, (2, 400))
    per_example = values.mean(axis=0)
    mean, stderr = per_example.mean(), per_example.std(ddof=1) / 20
    (ax,) = run_curves.likelihoods(values, "bits/dim").axes
    assert ax.get_legend_handles_labels()[1] == [f"mean {mean:.3f} ± {stderr:.3f} bits/dim"]
    assert ax.get_lines()[0].get_xdata() == pytest.approx([mean, mean])
    assert sum(bar.get_height() for bar in ax.patches if bar.get_alpha() == 0.65) == 400


def test_values_that_are_not_finite_do_not_stop_a_report(tmp_path):
    rows = [{"step": s, "split": "train", "loss": math.nan if s > 5 else 1.0, "first": 1.0} for s in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 10, "spl')
    write_json(tmp_path / "eval/report_1.json", {"bpd": {"mean": math.nan, "stderr": math.nan}, "kl": None})
    assert "nan bits/dim" in Page(report.write_report(tmp_path)).text
    assert "losses.png" in names(tmp_path)


def test_a_run_that_has_only_begun_is_no_error(tmp_path):
    write_json(tmp_path / "config.json", {"seed": 1})
    assert names(report.write_report(tmp_path).parent.parent) == {"report.html"}


def test_user_errors_are_one_line(tmp_path):
    for workdir in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"nothing to report in .*") as error:
            report.write_report(workdir)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists() and not (tmp_path / "missing").exists()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.write_report(tmp_path)
    write_json(tmp_path / "config.json", {})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/bpd_1.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"cannot read .*bpd_1\.npz"):
        report.write_report(tmp_path)
    np.savez(tmp_path / "eval/density_1.npz", x=np.zeros((4, 1)))
    with pytest.raises(UserError, match=r"density_1\.npz.*model_logp"):
        report.write_report(tmp_path)


def test_summary_of_runs_on_two_data_sets(tmp_path):
    runs = {"order 1 <": toy_run(tmp_path / "a", 0.02, 1), "order 3": toy_run(tmp_path / "b", -0.01, 3, seed=1)}
    runs["digits"] = image_run(tmp_path / "c")
    for path in [*tmp_path.glob("*/eval/bpd_*"), *tmp_path.glob("*/eval/samples_*")]:
        path.unlink()
    rows = [{"run": "order 1 <", "NLL (nats)": 0.0301234567, "n": 5000}, {"run": "order 3", "n": "0.02 ± 0.01"}]
    path = report.write_summary(tmp_path / "out" / "report.html", "Three & runs", runs, rows)
    assert path == tmp_path / "out" / "report.html"
    page = Page(path)
    assert len(page.images()) == 3 + 2 + 2 + 4  # compared, and each run's
    compared = {f"report_{name}.png" for name in ("density_mog", "likelihood_mog", "loss")}
    assert {p.name for p in path.parent.iterdir()} == {"report.html", *compared}
    assert "http" not in path.read_text() and "Three &amp; runs" in path.read_text()
    for text in ("order 1 <", "order 3", "digits", "NLL (nats)", "0.030123", "5,000", "0.02 ± 0.01"):
        assert text in page.text
    assert headings(path) == [
        "Compared",
        "Density",
        "Losses",
        "Samples",
        "Samples over training",
        "Likelihood by checkpoint",
        "Results",
        "Configs, where one differs from the default (marked: where they differ)",
    ]
    assert not (tmp_path / "a" / "report").exists()


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of PNGs of them."""
    drawn = []
    for module in (run_curves, sample_grids):
        monkeypatch.setattr(module, "png", lambda figure: drawn.append(figure) or b"")
    return drawn


@pytest.mark.parametrize("kind", ["images", "points", "1-D points"])
def test_samples_over_training_are_those_of_the_snapshots(tmp_path, figures, kind):
    shape = {"images": (4, 8, 8, 1), "points": (50, 2), "1-D points": (50, 1)}[kind]
    for step in range(10, 80, 10):
        samples = np.random.default_rng(step).random(shape, dtype=np.float32)
        path = tmp_path / f"samples/step_{step:08d}"
        if kind == "images":
            report.save_image_grid(path.with_suffix(".png"), samples)
        else:
            path.parent.mkdir(exist_ok=True)
            np.savez(path.with_suffix(".npz"), samples=samples)
    (_,) = sample_grids.over_training(run_files.load(tmp_path))
    axes = figures[0].axes
    assert [ax.get_title() for ax in axes] == ["step 10", "step 30", "step 50", "step 70"]  # first, last, even between
    for ax, step in zip(axes, (10, 30, 50, 70), strict=True):
        samples = np.random.default_rng(step).random(shape, dtype=np.float32)
        if kind == "images":
            truth = picture(tmp_path / f"samples/step_{step:08d}.png").convert("RGB")
            np.testing.assert_array_equal(np.asarray(ax.get_images()[0].get_array()), np.asarray(truth))
        elif kind == "points":
            np.testing.assert_allclose(np.asarray(ax.collections[0].get_offsets()), samples)
        else:
            low, high = ax.patches[0].get_x(), ax.patches[-1].get_x() + ax.patches[-1].get_width()
            counts, _ = np.histogram(samples[:, 0], 10, (low, high), density=True)
            np.testing.assert_allclose([bar.get_height() for bar in ax.patches], counts, rtol=1e-4)  # float32


def test_likelihoods_by_checkpoint_have_their_errors_as_bars(tmp_path, figures):
    truth = {100: (4.0, 0.25), 300: (3.5, 0.125), 200: (3.75, 0.5)}
    for number, (step, (mean, stderr)) in enumerate(truth.items()):
        result = {"checkpoint": number, "step": step, "bpd": {"mean": mean, "stderr": stderr}}
        result["bound"] = {"mean": mean + 1, "stderr": stderr, "unit": "bits/dim"}
        result["nll"] = {"mean": math.nan, "stderr": math.nan}
        write_json(tmp_path / f"eval/report_{number}.json", result)
    run = run_files.load(tmp_path)
    (picture,) = run_curves.by_checkpoint({"": run}, "bpd_by_checkpoint")
    (ax,) = figures[0].axes
    assert picture.name == "bpd_by_checkpoint" and "bits/dim" in ax.get_ylabel()
    for container, shift, label in zip(ax.containers, (0, 1), ("ODE", "bound by the SDE"), strict=True):
        assert container.get_label() == label
        np.testing.assert_allclose(container.lines[0].get_xydata(), [[s, truth[s][0] + shift] for s in sorted(truth)])
        bars = [segment[:, 1] - shift for segment in container.lines[2][0].get_segments()]
        np.testing.assert_allclose(bars, [(m - e, m + e) for m, e in (truth[s] for s in sorted(truth))])
    (_,) = run_curves.by_checkpoint({"one": run, "two": run}, "compared")
    assert [c.get_label() for c in figures[1].axes[0].containers] == ["one", "two"]


def test_compared_losses_have_a_panel_for_each_order_of_some_run(tmp_path, figures):
    for name, order in (("one", 1), ("three", 3)):
        write_metrics(tmp_path / name, order)
    assert [p.name for p in run_curves.comparisons({n: run_files.load(tmp_path / n) for n in ("one", "three")})] == [
        "loss"
    ]
    first, *others = figures[0].axes
    assert [len(ax.get_lines()) for ax in (first, *others)] == [2, 1, 1]
    assert first.get_legend_handles_labels()[1] == ["one", "three"]


LAUNCH = {"started": "2026-01-01 10:00:00+00:00", "step": 0, "command": "main.py --mode train", "commit": "abc123"}


def test_config_and_environment_tables(tmp_path):
    config = get_default_configs()
    config.training.batch_size = 17
    config.model.ch_mult = (1, 2)
    saved = {**config.to_dict(), "gone": {"key": 1}}  # as an older project may have left it
    write_json(tmp_path / "a/config.json", saved)
    write_json(tmp_path / "a/run.json", {"launches": [LAUNCH, {**LAUNCH, "step": 70, "commit": "unknown"}]})
    path = report.write_report(tmp_path / "a")
    assert headings(path) == ["Config, where it differs from the default", "Environment"]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", path.read_text())]
    assert [row for row in rows if row and "." in row[0]] == [
        ["model.ch_mult", "(1, 2)", "(1, 2, 2, 2)"],
        ["training.batch_size", "17", "128"],
    ]
    assert ["From step", "0", "70"] in rows and ["Git commit of the code", "abc123", "unknown"] in rows
    assert ["Platform", "not recorded", "not recorded"] in rows
    config.training.batch_size = 18
    write_json(tmp_path / "b/config.json", config.to_dict())
    path = report.write_summary(tmp_path / "both.html", "Both", {"a": tmp_path / "a", "b": tmp_path / "b"})
    marked = re.findall('<tr class="marked">(.*?)</tr>', path.read_text())
    assert [re.findall("<td>(.*?)</td>", row) for row in marked] == [["training.batch_size", "17", "18", "128"]]
    assert "<td>Git commit of the code</td><td>abc123</td><td>unknown</td><td>not recorded</td>" in path.read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = "gpu quic background-networking component-update sync"
# The natural width of each picture, 0 if it is broken or has no place, as the page's title.
COUNT = """<script>onload = () => {
document.title = [...document.images].map(i => i.naturalWidth * (i.getBoundingClientRect().width > 9))}</script>"""


def browse(profile: Path, page: Path, *wanted: str) -> str:
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in QUIET.split())]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--window-size=1200,2000", *wanted, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the report in")
def test_a_browser_shows_the_pages(tmp_path):
    one, two = toy_run(tmp_path / "one"), image_run(tmp_path / "two")
    write_json(one / "run.json", {"launches": [LAUNCH]})
    main([str(one), str(two)])
    for page, wanted in ((one / "report/report.html", 4), (one / "report/comparison.html", 1 + 4 + 5)):
        screenshot = tmp_path / "screenshot.png"
        browse(tmp_path / "profile", page, f"--screenshot={screenshot}")
        shown = picture(screenshot).convert("RGB")
        assert len(shown.getcolors(2**24)) > 200  # text, lines in several colours, antialiased
        assert 0.02 < np.mean(np.asarray(shown).min(axis=-1) < 250) < 0.9  # neither a blank page nor a dark one
        counted = tmp_path / "counted.html"
        counted.write_text(page.read_text() + COUNT)
        dom = browse(tmp_path / "profile", counted, "--dump-dom")
        widths = [int(width) for width in re.findall("<title>(.*?)</title>", dom)[0].split(",")]
        assert len(widths) == wanted and min(widths) > 0  # every picture is decoded and has its place
        sections = re.findall("<section><h2>(.*?)</h2>", dom)
        assert {"Results", "Losses", "Samples", "Density"} <= set(sections) and "Environment" in sections[-1]


def test_the_page_of_the_project_is_that_of_the_readme():
    assert site.OUT.read_bytes() == site.render((REPO / "README.md").read_text(), REPO), "run python -m report.site"
    page = Page(site.OUT)
    tables = re.findall(r"^\| --- \|", (REPO / "README.md").read_text(), re.M)
    assert page.tags.count("img") == 2 and page.tags.count("table") == len(tables)
    for link in page.links:
        assert re.match("https://|data:image/png", link) or (site.OUT.parent / link.partition("#")[0]).exists(), link


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the page in")
def test_a_browser_shows_the_page_of_the_project(tmp_path):
    counted = tmp_path / "counted.html"
    counted.write_text(site.OUT.read_text() + COUNT)
    dom = browse(tmp_path / "profile", counted, "--dump-dom")
    widths = [int(width) for width in re.findall("<title>(.*?)</title>", dom)[0].split(",")]
    assert len(widths) == 2 and min(widths) > 0


def test_compared_densities_have_a_curve_a_run_and_its_error():
    x = np.linspace(-1, 1, 101)[:, None]
    truth = mixture_logp(x)
    models = {name: {"x": x, "model_logp": truth + d, "true_logp": truth} for name, d in (("a", 0.1), ("b", -0.2))}
    top, bottom = run_curves.density_1d(models)[0].axes
    assert top.get_legend_handles_labels()[1] == ["truth", "a", "b"]
    a, b = top.get_lines()
    assert a.get_color() != b.get_color()
    np.testing.assert_allclose(np.asarray(b.get_ydata()), np.exp(truth - 0.2))
    for line, error in zip(bottom.get_lines()[1:], (0.1, -0.2), strict=True):
        y = np.asarray(line.get_ydata())
        np.testing.assert_allclose(y[np.isfinite(y)], error, rtol=1e-6)
        np.testing.assert_array_equal(np.isfinite(y), np.exp(truth - truth.max()) > 1e-3)


def test_likelihoods_are_compared_by_example(tmp_path):
    """`b` is better by 0.3 and 0.1 on the two examples of `a`; `c` has three examples, and `d` no likelihood."""
    for name, bpd in (("a", [3.0, 5.0]), ("b", [2.7, 4.9]), ("c", [1.0, 2.0, 3.0]), ("d", [])):
        values = {"bpd": {"mean": np.mean(bpd), "stderr": 1.0}} if bpd else {"loss": 1.0}
        write_json(tmp_path / name / "eval/report_1.json", {"dataset": "DIGITS", **values})
        np.savez(tmp_path / name / "eval/bpd_1.npz", bpd=np.array([bpd]), logp=np.array([bpd]))
    rows = report.likelihoods({name: run_files.load(tmp_path / name) for name in "abcd"})
    assert [row[""] for row in rows] == ["a", "b", "c"]
    assert [row.get("difference to a, by example") for row in rows] == [None, "-0.20 ± 0.10", None]


def test_command_line(tmp_path, capsys):
    first, second = tmp_path / "one", tmp_path / "two"
    for workdir, kl in ((first, 0.00391), (second, 0.0456)):
        write_json(workdir / "eval/report_1.json", {"dataset": "mog", "kl": kl})
    main([str(first), str(second)])
    paths = capsys.readouterr().out.split()
    comparison = first / "report/comparison.html"
    assert paths == [str(first / "report/report.html"), str(second / "report/report.html"), str(comparison)]
    assert re.search(r"0\.00391 nats\s+0\.0456 nats", Page(comparison).text)
    with pytest.raises(UserError, match="usage"):
        main([])
    done = subprocess.run(
        [sys.executable, "-m", "report", str(tmp_path / "no")], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: nothing to report in") and done.stderr.count("\n") == 1


def test_report_imports_nothing_of_the_model():
    loaded = "import sys, report; print(sorted({'jax', 'run_lib', 'models', 'losses', 'main'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=REPO, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_the_likelihood_and_its_worth_come_before_the_first_picture(tmp_path):
    likelihood = {"mean": 1.8204, "stderr": 0.0148, "num_examples": 297}
    result = {"bpd": likelihood, "baselines": {"uniform": 4.0874, "png": 3.7141}, "gaussian_bpd": 2.9531}
    write_json(tmp_path / "eval/report_1.json", result)
    write_metrics(tmp_path, 1)
    page = Page(report.write_report(tmp_path))
    assert "1.820 ± 0.015 bits/dim (297 examples)" in page.text
    assert "On the same examples: uniform 4.087, png 3.714, a fitted Gaussian 2.953" in page.text
    assert page.tags.index("small") < page.tags.index("img") < page.tags.index("table")


def test_compared_losses_of_other_data_have_no_empty_axes(tmp_path, figures):
    write_metrics(tmp_path / "one", 3)
    write_metrics(tmp_path / "digits", 1)
    write_json(tmp_path / "digits/config.json", {"data": {"dataset": "DIGITS"}})
    list(run_curves.comparisons({name: run_files.load(tmp_path / name) for name in ("one", "digits")}))
    assert [bool(ax.get_lines()) == ax.axison for ax in figures[0].axes] == [True] * 6


def test_settings_of_a_quantity_are_for_the_json_file_alone():
    sampling = {"method": "ode", "num_samples": 700, "nfe": 50.0, "settings": {"rtol": 1e-5}}
    rows = report.results_table([{"checkpoint": 1, "step": 10, "sampling": sampling}]).splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["Samples:", "method", "ode"],
        ["Samples:", "num", "samples", "700"],
        ["Samples:", "nfe", "50"],
    ]
