# SPDX-License-Identifier: Apache-2.0
"""The studies of the paper's claims: a list of runs for each experiment."""

from collections.abc import Iterator

from reproduce.runner import Run

ORDERS = (1, 2, 3)
FINE_TUNE = ("optim.lr=0.001", "optim.warmup=50")


def order(n: int) -> str:
    return f"training.score_matching_order={n}"


def length(n: int) -> tuple[str, ...]:
    """n steps with one snapshot at the end, which alone is evaluated."""
    return f"training.n_iters={n}", f"training.snapshot_freq={n}", "eval.begin_ckpt=1", "eval.end_ckpt=1"


def fine_tuning(experiment: str, variant: str, base: Run, n: int, steps: int, *overrides: str) -> Run:
    """Trains the base's last checkpoint at order n for more steps."""
    overrides = order(n), *length(steps), *FINE_TUNE, *overrides
    return Run(experiment, variant, base.seed, base.config, overrides, after=base)


def from_scratch(name: str, seeds: int, curves: bool = False) -> Iterator[Run]:
    """Trains each order for the same steps from the same initial weights. curves: also Fisher curves of seed 0."""
    for seed in range(seeds):
        for n in ORDERS:
            run = Run(name, f"order{n}", seed, f"configs/reproduce/{name}.py", (order(n),))
            if curves and seed == 0:
                fisher = ("eval.begin_ckpt=0", "eval.end_ckpt=0", "eval.enable_bpd=False", "eval.enable_fisher=True")
                run = run._replace(evaluations=(*run.evaluations, ("eval_fisher", fisher)))
            yield run


def study(seeds: int) -> Iterator[Run]:
    """Varies what the gain on the mixture (VE) may depend on: weights, learning rate, input scale, starting point."""
    config = "configs/reproduce/mog_ve.py"
    variants = {
        "order2_w0.1": (2, "training.second_order_weight=0.1"),
        "order2_w1": (2, "training.second_order_weight=1.0"),
        "order3_w0.1_0.01": (3, "training.second_order_weight=0.1", "training.third_order_weight=0.01"),
        "order3_w0.5_0.01": (3, "training.third_order_weight=0.01"),
        "order3_w0.5_1": (3, "training.third_order_weight=1.0"),
        "order3_w1_1": (3, "training.second_order_weight=1.0", "training.third_order_weight=1.0"),
    }
    for name, *overrides in (
        ("lr0.0003", "optim.lr=0.0003"),
        ("scale2", "model.sigma_data=2.0"),
        ("wide", "model.nf=128", "model.num_layers=3"),
    ):
        variants |= {f"order{n}_{name}": (n, *overrides) for n in ORDERS}
    for seed in range(seeds):
        for variant, (n, *overrides) in variants.items():
            yield Run("mog_study", variant, seed, config, (order(n), *length(20_000), *overrides))
        first = Run("mog_ve", "order1", seed, config, (order(1),))
        for n in ORDERS:
            yield Run("mog_study", f"order{n}_finetuned", seed, config, (order(n), *length(10_000)), after=first)


def fine_tuned(name: str, seeds: int, steps: int, curves: bool = False) -> Iterator[Run]:
    """Trains a first-order model, and from its checkpoint each order for `steps` further steps."""
    for seed in range(seeds):
        base = Run(name, "base", seed, f"configs/reproduce/{name}.py", (order(1),))
        yield base
        for n in ORDERS:
            run = fine_tuning(name, f"order{n}", base, n, steps)
            if curves and seed == 0:
                fisher = ("eval.enable_bpd=False", "eval.enable_sampling=False", "eval.enable_fisher=True")
                run = run._replace(evaluations=(*run.evaluations, ("eval_fisher", fisher)))
            yield run


def digits_study(seeds: int) -> Iterator[Run]:
    """Varies what the gain on the digits may depend on: second weight, length of the fine-tuning and of its base."""
    under_ve = {
        "order1": (1, 500),
        "order2_w0.1": (2, 500, "training.second_order_weight=0.1"),
        "order2_w10": (2, 500, "training.second_order_weight=10.0"),
        "order1_long": (1, 2_000),
        "order2_long": (2, 2_000),
    }
    importance = "training.likelihood_weighting=True", "training.importance_weighting=True"
    under_vp = {
        "order1_vp": (1, 500),
        "order2_vp_w0.1": (2, 500, "training.second_order_weight=0.1"),
        "order1_vp_long": (1, 2_000),
        "order2_vp_long": (2, 2_000),
        "order2_vp_long_w0.1": (2, 2_000, "training.second_order_weight=0.1"),
        **{f"order{n}_vp_importance": (n, 500, *importance) for n in (1, 2)},
        **{f"order{n}_vp_importance_long": (n, 2_000, *importance) for n in (1, 2)},
    }
    for seed in range(seeds):
        plateau = Run("digits_study", "base_vp6000", seed, "configs/reproduce/digits_vp.py", (order(1), *length(6_000)))
        yield plateau
        for n in (1, 2):
            yield fine_tuning("digits_study", f"order{n}_vp6000", plateau, n, 500)
        for name, variants in (("digits_ve", under_ve), ("digits_vp", under_vp)):
            base = Run(name, "base", seed, f"configs/reproduce/{name}.py", (order(1),))
            for variant, settings in variants.items():
                yield fine_tuning("digits_study", variant, base, *settings)


def experiments(fast: bool) -> dict[str, list[Run]]:
    """The runs of each study, in their order. fast: the mixture with one seed, and the digits at orders 1 and 3."""
    if fast:
        mixture = {name: list(from_scratch(name, 1, curves=True)) for name in ("mog_ve", "mog_vp")}
        digits = [run for run in fine_tuned("digits_ve", 1, steps=500) if run.variant != "order2"]
        return {"digits_ve": digits, **mixture}
    return {
        "mog_ve": list(from_scratch("mog_ve", 5, curves=True)),
        "mog_vp": list(from_scratch("mog_vp", 5, curves=True)),
        "digits_ve": list(fine_tuned("digits_ve", 3, steps=500, curves=True)),
        "checkerboard_ve": list(from_scratch("checkerboard_ve", 5)),
        "swissroll_ve": list(from_scratch("swissroll_ve", 5)),
        "mog_study": list(study(3)),
        "digits_study": list(digits_study(1)),
        "digits_vp": list(fine_tuned("digits_vp", 3, steps=500, curves=True)),
        "fashion_ve": list(fine_tuned("fashion_ve", 3, steps=300)),
        "fashion_vp": list(fine_tuned("fashion_vp", 3, steps=300)),
        "fashion_ve_long": list(fine_tuned("fashion_ve_long", 3, steps=1_000)),
        "fashion_vp_long": list(fine_tuned("fashion_vp_long", 3, steps=1_000)),
    }
