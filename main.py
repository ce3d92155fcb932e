"""Trains or evaluates a score-based diffusion model; see README.md.

python main.py --config configs/toy/mog_ve.py --workdir runs/mog --mode train --config.training.score_matching_order=2
"""

import errno
import logging as std_logging
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads data here; its start-up notes help nobody

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import hosts
from configs.check import check_config, check_key
from errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config file; override a key with --config.a.b=c.")
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, samples, results.")
flags.DEFINE_enum(
    "mode",
    None,
    ["train", "eval", "train_deq", "stats"],
    "train: the score model. eval: its likelihoods, samples and metrics. train_deq: a variational dequantiser of it. "
    "stats: statistics of the training images for FID and KID (no workdir).",
)
flags.DEFINE_string("eval_folder", "eval", "Folder under workdir for the results of --mode eval.")
flags.DEFINE_string("deq_folder", "flowpp_dequantizer", "Folder under workdir of the variational dequantiser.")
flags.DEFINE_string("coordinator_address", None, "Several hosts: address:port of the first. SLURM, TPU: not needed.")
flags.DEFINE_integer("num_processes", None, "Several hosts: how many.")
flags.DEFINE_integer("process_id", None, "Several hosts: which this one is, from 0.")
flags.DEFINE_string("compilation_cache", "~/.cache/mle_score_ode", "Folder of compiled programs; empty: none.")
flags.mark_flags_as_required(["config", "mode"])


def set_up_logging(workdir: Path, to_file: bool) -> None:
    """Progress to the console and, of the first host, appended to `workdir/stdout.txt`."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = std_logging.FileHandler(workdir / "stdout.txt") if to_file else std_logging.NullHandler()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error
    file.setFormatter(std_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    std_logging.getLogger().addHandler(file)
    logging.set_verbosity(logging.INFO)
    for name in ("jax", "orbax", "tensorboardX"):  # they tell of every step they take
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    logging.get_absl_handler().addFilter(_from_this_project)
    file.addFilter(_from_this_project)


def _from_this_project(record: std_logging.LogRecord) -> bool:
    """orbax and grain log their routine through absl as well; their warnings stay."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, so that a second launch starts in a fraction of the time."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
    check_config(FLAGS.config)
    hosts.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    use_compilation_cache(FLAGS.compilation_cache)
    if FLAGS.mode == "stats":
        logging.set_verbosity(logging.INFO)
        import evaluation

        print(evaluation.stats(FLAGS.config))
        return
    if FLAGS.workdir is None:
        raise UserError(f"--mode {FLAGS.mode} needs --workdir, the folder of the run")
    if "://" in FLAGS.workdir:
        raise UserError(f"--workdir {FLAGS.workdir} is remote; mount the bucket (gcsfuse, s3fs) and give its folder")
    workdir = Path(FLAGS.workdir)
    if FLAGS.mode != "train" and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} does not exist; --mode {FLAGS.mode} needs the workdir of a training run")
    set_up_logging(workdir, jax.process_index() == 0)
    import run_lib  # late: a wrong flag should not wait for the libraries

    if FLAGS.mode == "train":
        run_lib.train(FLAGS.config, workdir)
    elif FLAGS.mode == "train_deq":
        run_lib.train_deq(FLAGS.config, workdir, FLAGS.deq_folder)
    else:
        run_lib.evaluate(FLAGS.config, workdir, FLAGS.eval_folder, FLAGS.deq_folder)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with one line in place of a traceback where a config file or an override is wrong."""
    try:
        rest = FLAGS(argv)
        path = config_flags.get_config_filename(FLAGS["config"])
        if not Path(path).is_file():
            raise UserError(f"config file {path!r} does not exist; see configs/ for those that do")
        return rest
    except (KeyError, AttributeError) as error:  # ml_collections' answer to an override of a key that is not there
        for argument in argv:
            if argument.startswith("--config."):
                check_key(argument.removeprefix("--config.").partition("=")[0])
        raise UserError(f"a flag names the unknown config key {error}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


_FAULTS_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


def one_line(fn):
    """Ends the program with one line and exit code 1 where the input is at fault; other errors keep their traceback."""

    def wrapped(argv):
        try:
            return fn(argv)
        except UserError as error:
            line = f"error: {error}"
        except OSError as error:
            if error.errno not in _FAULTS_OF_THE_DISK:
                hosts.abandon(traceback.format_exc())
                raise
            where = error.filename or "a file of the run"
            line = (
                f"error: {where} cannot be written: {error.strerror}; make room or the folder writable, and run again"
            )
        except Exception:
            hosts.abandon(traceback.format_exc())
            raise
        hosts.abandon(line)
        sys.exit(line)

    return wrapped


if __name__ == "__main__":
    app.run(one_line(main), flags_parser=one_line(parse_flags))
