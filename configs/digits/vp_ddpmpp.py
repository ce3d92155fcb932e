"""8x8 digits, VP SDE, DDPM++."""

from configs.default_digits_configs import get_digits_configs


def get_config():
    config = get_digits_configs()
    config.training.sde = "vpsde"
    config.data.centered = True
    config.model.update(embedding_type="positional", fir=False, progressive_input="none", scale_by_sigma=False)
    return config
