"""2-D checkerboard, VE SDE."""

from configs.default_toy_configs import get_toy_configs


def get_config():
    return get_toy_configs("vesde", "checkerboard")
