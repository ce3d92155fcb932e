# SPDX-License-Identifier: Apache-2.0
"""The one exception whose message is meant for the user. Any other is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input: a config value, a flag, a file, a data set. One line says what is wrong, where, and what to do."""
