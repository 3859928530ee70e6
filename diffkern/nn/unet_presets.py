"""Configurations of published UNets, by the flags and arguments with which their authors made them."""

from __future__ import annotations

from typing import Any

from diffkern.nn.unet_config import UNetConfig
from diffkern.nn.weights.edm_config import dhariwal_unet_config, song_unet_config
from diffkern.nn.weights.openai_config import improved_unet_config, unet_config, upsampler_config

_ADM: dict[str, Any] = {
    "num_channels": 256,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "learn_sigma": True,
    "class_cond": True,
}
_NCSN: dict[str, Any] = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}

UNETS: dict[str, UNetConfig] = {
    # Nichol and Dhariwal 2021: 53 M, 121 M, 273 M and 114 M parameters
    "iddpm-cifar10": improved_unet_config(
        image_size=32, num_res_blocks=3, learn_sigma=True, dropout=0.3, diffusion_steps=4000
    ),
    "iddpm-imagenet64": improved_unet_config(image_size=64, num_res_blocks=3, learn_sigma=True, diffusion_steps=4000),
    "iddpm-imagenet64-classes": improved_unet_config(
        image_size=64, num_channels=192, num_res_blocks=3, learn_sigma=True, class_cond=True, diffusion_steps=4000
    ),
    "iddpm-lsun256": improved_unet_config(
        image_size=256,
        num_heads=1,
        learn_sigma=True,
        use_scale_shift_norm=False,
        attention_resolutions="16",
        rescale_timesteps=False,
    ),
    # Dhariwal and Nichol 2021: 296 M, 422 M, 554 M and 559 M; 553 M without classes; upsamplers 312 M and 309 M
    "adm-imagenet64": unet_config(**{**_ADM, "num_channels": 192}, image_size=64, num_res_blocks=3, dropout=0.1),
    "adm-imagenet128": unet_config(**{**_ADM, "num_head_channels": -1}, image_size=128, num_heads=4),
    "adm-imagenet256": unet_config(**_ADM, image_size=256),
    "adm-imagenet256-uncond": unet_config(**{**_ADM, "class_cond": False}, image_size=256),
    "adm-imagenet512": unet_config(**_ADM, image_size=512),
    "adm-lsun256": unet_config(**{**_ADM, "class_cond": False}, image_size=256, dropout=0.1),
    "adm-upsampler-64-256": upsampler_config(
        **{**_ADM, "num_channels": 192, "num_head_channels": -1}, large_size=256, small_size=64, num_heads=4
    ),
    "adm-upsampler-128-512": upsampler_config(
        **{**_ADM, "num_channels": 192, "attention_resolutions": "32,16"}, large_size=512, small_size=128
    ),
    # Karras et al. 2022: 55.7 M and 56.4 M at 32 x 32, 61.8 M and 62.8 M at 64 x 64, 296 M
    "edm-cifar10-ddpmpp": song_unet_config(img_resolution=32, channel_mult=(2, 2, 2), dropout=0.13, augment_dim=9),
    "edm-cifar10-ncsnpp": song_unet_config(
        img_resolution=32, channel_mult=(2, 2, 2), dropout=0.13, augment_dim=9, **_NCSN
    ),
    "edm-ffhq64-ddpmpp": song_unet_config(img_resolution=64, dropout=0.05, augment_dim=9),
    "edm-ffhq64-ncsnpp": song_unet_config(img_resolution=64, dropout=0.05, augment_dim=9, **_NCSN),
    "edm-imagenet64": dhariwal_unet_config(img_resolution=64, label_dim=1000),
}
"""Of networks that were trained without classes, `dataclasses.replace` or the functions above make the others."""
