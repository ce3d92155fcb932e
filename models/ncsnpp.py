# SPDX-License-Identifier: Apache-2.0
"""The U-Nets NCSN++ and DDPM++ (Song et al. 2021, arXiv 2011.13456), as one network with options.

The order in which parts are created names their parameters, as in the published checkpoints: it must not change.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import layerspp
from models.layers import ACTIVATIONS, conv, dense, get_timestep_embedding, normalize, with_fourier_features

Image = Float[Array, "B H W C"]


@functools.cache
def _rematted(block: type[nn.Module]) -> type[nn.Module]:
    """`block` under `nn.remat`, with its old name so that the parameter paths stay."""
    rematted = nn.remat(block, static_argnums=(3,))  # (self, x, temb, train)
    rematted.__name__ = block.__name__
    return rematted


class NCSNpp(nn.Module):
    """Maps images [B, H, W, C] and a time condition [B] to [B, H, W, C].

    `models.score.get_score_fn` makes a score of the output, by `parameterization`. The time condition is sigma, 999 t
    or the log-SNR if `conditioning` is "sigma", "scaled_time" or "log_snr". The other fields are keys of `config.model`
    and `config.data`; `configs.check` has their values, and the image sizes that fit `ch_mult`.
    With `dtype` "bfloat16" the feature maps and their products with weights are in bfloat16. Parameters, time
    embedding, the statistics of the normalisations, and the convolutions that read the image or write the output stay
    float32: bfloat16 pixels would be as coarse as the smallest noise.
    """

    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    conditioning: str
    parameterization: str
    sigma_data: float
    centered: bool
    nonlinearity: str
    dropout: float
    resamp_with_conv: bool
    conditional: bool
    fir: bool
    fir_kernel: tuple[float, ...]
    skip_rescale: bool
    resblock_type: str
    progressive: str
    progressive_input: str
    progressive_combine: str
    embedding_type: str
    fourier_scale: float
    trainable_embedding: bool
    log_snr_scale: float
    input_frequencies: tuple[int, ...]
    init_scale: float
    conv_size: int
    scale_by_sigma: bool
    remat: bool = False  # reverse mode computes each residual block again
    dtype: str = "float32"

    takes_images = True

    @nn.compact
    def __call__(self, x: Image, time_cond: Float[Array, "B"], train: bool = False) -> Image:
        temb = self._embed(time_cond)
        h = x if self.centered else 2 * x - 1
        skips = self._encode(h, temb, train)

        resnet, attention = self._parts()
        h = resnet()(skips[-1], temb, train)
        h = attention()(h)
        h = resnet()(h, temb, train)

        h = self._decode(h, skips, x.shape[-1], temb, train).astype(x.dtype)
        return h / time_cond[:, None, None, None] if self.scale_by_sigma else h

    def _embed(self, time_cond: Float[Array, "B"]) -> Float[Array, "B E"] | None:
        """Time embedding [B, 4 nf], or None for a network that does not depend on the time."""
        if self.embedding_type == "fourier":
            level = jnp.log(time_cond) if self.conditioning == "sigma" else time_cond
            # It is created even if not conditional: its fixed weights are part of every checkpoint.
            temb = layerspp.GaussianFourierProjection(self.nf, self.fourier_scale, self.trainable_embedding)(level)
        else:
            scale = self.log_snr_scale if self.conditioning == "log_snr" else 1.0
            temb = get_timestep_embedding(scale * time_cond, self.nf)
        if not self.conditional:
            return None
        temb = dense(4 * self.nf)(temb)
        return dense(4 * self.nf)(ACTIVATIONS[self.nonlinearity](temb))

    def _parts(self) -> tuple[Any, Any]:
        """Constructors of the residual block and the attention block, with the options filled in."""
        names = ["dropout", "skip_rescale", "init_scale", "conv_size"]
        block = layerspp.ResnetBlockDDPMpp
        if self.resblock_type == "biggan":
            block, names = layerspp.ResnetBlockBigGANpp, [*names, "fir", "fir_kernel"]
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        block = _rematted(block) if self.remat else block
        resnet = functools.partial(block, act=ACTIVATIONS[self.nonlinearity], **options)
        return resnet, functools.partial(layerspp.AttnBlockpp, self.skip_rescale, self.init_scale)

    def _resampler(self, cls: Any, with_conv: bool, features: int | None = None) -> Any:
        return cls(with_conv, self.fir, self.fir_kernel, features, self.conv_size)

    def _encode(self, x: Image, temb: Any, train: bool) -> list[Array]:
        """The way down. Returns every feature map that the way up reads, the coarsest last."""
        resnet, attention = self._parts()
        pyramid = x  # the image at the current resolution
        dtype = jnp.bfloat16 if self.dtype == "bfloat16" else x.dtype
        skips = [conv(self.nf, self.conv_size)(with_fourier_features(x, self.input_frequencies)).astype(dtype)]
        for level, multiplier in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = resnet(features=self.nf * multiplier)(skips[-1], temb, train)
                if h.shape[1] in self.attn_resolutions:
                    h = attention()(h)
                skips.append(h)
            if level == len(self.ch_mult) - 1:
                break

            if self.resblock_type == "biggan":
                h = resnet(down=True)(skips[-1], temb, train)
            else:
                h = self._resampler(layerspp.Downsample, self.resamp_with_conv)(skips[-1])
            if self.progressive_input == "input_skip":
                pyramid = self._resampler(layerspp.Downsample, with_conv=False)(pyramid)
                h = layerspp.Combine(self.progressive_combine)(pyramid, h).astype(dtype)
            elif self.progressive_input == "residual":
                pyramid = self._resampler(layerspp.Downsample, True, h.shape[-1])(pyramid).astype(dtype)
                h = pyramid = layerspp.add_skip(pyramid, h, self.skip_rescale)
            skips.append(h)
        return skips

    def _decode(self, h: Image, skips: list[Array], channels: int, temb: Any, train: bool) -> Array:
        """The way up, to an output with `channels` channels."""
        resnet, attention = self._parts()
        pyramid: Any = None
        for level, multiplier in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = resnet(features=self.nf * multiplier)(jnp.concatenate([h, skips.pop()], axis=-1), temb, train)
            if h.shape[1] in self.attn_resolutions:
                h = attention()(h)

            if self.progressive == "output_skip":
                if pyramid is not None:
                    pyramid = self._resampler(layerspp.Upsample, with_conv=False)(pyramid)
                output = self._head(h, channels, self.init_scale)
                pyramid = output if pyramid is None else pyramid + output
            elif self.progressive == "residual" and pyramid is None:
                pyramid = self._head(h, h.shape[-1], init_scale=1.0).astype(h.dtype)
            elif self.progressive == "residual":
                pyramid = self._resampler(layerspp.Upsample, True, h.shape[-1])(pyramid)
                h = pyramid = layerspp.add_skip(pyramid, h, self.skip_rescale)

            if level != 0 and self.resblock_type == "biggan":
                h = resnet(up=True)(h, temb, train)
            elif level != 0:
                h = self._resampler(layerspp.Upsample, self.resamp_with_conv)(h)
        return pyramid if self.progressive == "output_skip" else self._head(h, channels, self.init_scale)

    def _head(self, h: Image, features: int, init_scale: float) -> Array:
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        h = ACTIVATIONS[self.nonlinearity](normalize(h))
        return conv(features, self.conv_size, init_scale=init_scale)(h)
