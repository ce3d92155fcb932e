# SPDX-License-Identifier: Apache-2.0
"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Bad input from outside: a config value, a flag, a file, a data set.

    The message is one line that says what is wrong, where, and what to do. `main.py` prints it without a traceback and
    exits with status 1; any other exception is a bug and keeps its traceback.
    """
