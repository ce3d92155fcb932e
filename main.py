# SPDX-License-Identifier: Apache-2.0
"""Trains or evaluates a score-based diffusion model; see README.md.

python main.py --config configs/toy/mog_ve.py --workdir runs/mog --mode train --config.training.score_matching_order=2
"""

import errno
import os
import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from configs.check import check_config, check_key, flatten, load_config
from errors import UserError
from runtime import console

# jax, and all that needs it, is imported after the flags are checked: --help and a wrong flag do not wait for it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads data here; its start-up notes help nobody

FLAGS = flags.FLAGS


class _ConfigFile(flags.ArgumentParser):
    def parse(self, argument: str):
        return load_config(argument).lock()


config_flags.DEFINE_config_file("config", None, "Config file; override a key with --config.a.b=c.")
FLAGS["config"].parser = _ConfigFile()  # its complaints are one line; those of ml_collections' own parser are not
flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, samples, results.")
flags.DEFINE_enum("mode", None, list(console.MODES), "What to do with the model.")
flags.DEFINE_string("eval_folder", "eval", "Folder under workdir for the results of --mode eval.")
flags.DEFINE_string("deq_folder", "flowpp_dequantizer", "Folder under workdir of the variational dequantiser.")
flags.DEFINE_string("coordinator_address", None, "Several hosts: address:port of the first. SLURM, TPU: not needed.")
flags.DEFINE_integer("num_processes", None, "Several hosts: how many.")
flags.DEFINE_integer("process_id", None, "Several hosts: which this one is, from 0.")
flags.DEFINE_string("compilation_cache", "~/.cache/mle_score_ode", "Folder of compiled programs; empty: none.")
flags.mark_flags_as_required(["config", "mode"])


def log_config() -> None:
    """Logs the config file and the keys that the command line changes."""
    flag = FLAGS["config"]
    path, overrides = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    in_file = flatten(load_config(path)) if overrides else {}
    changes = [f"{key}={value!r} (file: {in_file.get(key)!r})" for key, value in overrides.items()]
    logging.info("config %s%s", path, f" with {', '.join(changes)}" if changes else "")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
    check_config(FLAGS.config)
    console.quieten_libraries()
    import jax

    from runtime import hosts

    hosts.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(FLAGS.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if FLAGS.mode == "stats":
        logging.set_verbosity(logging.INFO)
        import run_lib

        print(run_lib.stats(FLAGS.config))
        return
    if FLAGS.workdir is None:
        raise UserError(f"--mode {FLAGS.mode} needs --workdir, the folder of the run")
    if "://" in FLAGS.workdir:
        raise UserError(f"--workdir {FLAGS.workdir} is remote; mount the bucket (gcsfuse, s3fs) and give its folder")
    workdir = Path(FLAGS.workdir)
    if FLAGS.mode != "train" and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} does not exist; --mode {FLAGS.mode} needs the workdir of a training run")
    console.set_up_logging(workdir, jax.process_index() == 0)
    import run_lib

    log_config()
    if FLAGS.mode == "train":
        run_lib.train(FLAGS.config, workdir)
    elif FLAGS.mode == "train_deq":
        run_lib.train_deq(FLAGS.config, workdir, FLAGS.deq_folder)
    else:
        run_lib.evaluate(FLAGS.config, workdir, FLAGS.eval_folder, FLAGS.deq_folder)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags, or answers --help (--helpfull stays absl's) and exits. Raises UserError if one is wrong."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        ours = FLAGS.get_flags_for_module(FLAGS.find_module_defining_flag("mode"))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without a traceback
        described = {f.name: f.help + (f" [{f.default}]" if f.default is not None else "") for f in ours}
        print(console.help_text(described, Path(__file__).parent))
        sys.exit(0)
    try:
        return FLAGS(argv)
    except (KeyError, AttributeError) as error:  # ml_collections raises them for an override of an unknown key
        for argument in argv:
            if argument.startswith("--config."):
                check_key(argument.removeprefix("--config.").partition("=")[0])
        raise UserError(f"a flag names the unknown config key {error}") from error
    except (flags.Error, TypeError, ValueError) as error:
        if "must have a value other than None" in str(error):
            missing = " and ".join(f"--{name}" for name in ("config", "mode") if f"--{name}=None" in str(error))
            raise UserError(f"{missing} must be given; python main.py --help tells how") from error
        raise UserError(" ".join(str(error).split())) from error


def _abandon(message: str, error: Exception | None = None) -> None:
    if "runtime.hosts" in sys.modules:  # else this process has not joined others
        from runtime import hosts

        hosts.abandon(message, error)


_FAULTS_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


def one_line(fn):
    """Makes `fn` exit with one line and code 1 if the input is at fault. Other errors keep their traceback."""

    def wrapped(argv):
        try:
            return fn(argv)
        except UserError as error:
            line = f"error: {error}"
        except Exception as error:
            if not isinstance(error, OSError) or error.errno not in _FAULTS_OF_THE_DISK:
                _abandon(traceback.format_exc(), error)
                raise
            what = f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}"
            line = f"error: {what}; make room or the folder writable, and run again"
        _abandon(line)
        sys.exit(line)

    return wrapped


if __name__ == "__main__":
    app.run(one_line(main), flags_parser=one_line(parse_flags))
