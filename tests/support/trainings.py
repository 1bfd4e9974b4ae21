from __future__ import annotations

from dataclasses import replace

import torch

from backbones.mixers import MIXERS
from experiments.engine.specs.spec import Backbone, Data, Diffusion, Recipe, Train

CPU = torch.device("cpu")


DIGITS = Data("digits", size=8, channels=1, num_classes=10)


SHAPE = dict(input_size=8, in_channels=1, num_classes=10)


DICO = Backbone("dico_s", dict(dim=8, depths=(1, 1, 1, 1, 1)) | SHAPE)


STEPS = 14


SPEC = Train(DICO, DIGITS, Recipe(steps=STEPS, batch=16, lr=1e-3, warmup=4, ema=0.9))


MIXER_OPTIONS = {
    "window": dict(window=4),
    "agent": dict(agents=4),
    "global_regional": dict(window=4, pool=2),
}


FAMILIES = {
    "dico": DICO,
    "dit": Backbone("dit_s_2", dict(dim=24, depth=2, heads=3) | SHAPE),
    "isotropic with skips": Backbone(
        "isotropic", dict(dim=16, depth=5, mlp_ratio=2.0, skips=True) | SHAPE
    ),
} | {
    f"hourglass {mixer}": Backbone(
        "hourglass",
        dict(dim=8, depths=(2, 1, 1, 1, 1), mixer=mixer, mixer_options=MIXER_OPTIONS.get(mixer))
        | ({} if mixer == "conv" else dict(heads=(2, 2, 4, 2, 2)))
        | SHAPE,
    )
    for mixer in MIXERS
}


FLOW, STABLE = (
    Diffusion("flow"),
    Diffusion(betas="stable_diffusion", variance="fixed", first_step=1),
)


OBJECTIVES = {  # those of the families that have one of their own
    "sit": FLOW,
    "dimsum": replace(FLOW, path="gvp"),
    "uvit": STABLE,
    "dim": STABLE,
    "adm": Diffusion(betas="cosine"),
    "ldm": Diffusion(betas="ldm_imagenet", variance="fixed"),
}
FAMILIES |= {
    "sit": Backbone("sit_s_2", dict(dim=24, depth=2, heads=3) | SHAPE),
    "dimsum": Backbone(
        "dimsum_l_2", dict(dim=24, depth=4, heads=3, fusion_heads=3, attention_every=2) | SHAPE
    ),
    "uvit": Backbone("uvit_l_2", dict(dim=24, depth=4, heads=3) | SHAPE),
    "dim": Backbone("dim_l", dict(dim=20, depth=5) | SHAPE),
    "adm": Backbone(
        "adm_base_64",
        dict(
            dim=32,
            multipliers=(1, 2),
            num_res_blocks=1,
            attention_at=(4,),
            head_dim=32,
            null_label=True,
        )
        | SHAPE,
    ),
    "ldm": Backbone(
        "ldm_4",
        dict(dim=32, multipliers=(1, 2), num_res_blocks=1, attention_at=(2,), context_dim=12)
        | SHAPE,
    ),
    "dis": Backbone("dis_s_2", dict(dim=20, depth=2) | SHAPE),
    "dig": Backbone("dig_s_2", dict(dim=24, depth=4, heads=3) | SHAPE),
    "dic": Backbone("dic_s", dict(dim=12, depths=(2, 1, 1, 1, 2)) | SHAPE),
    "udit": Backbone("udit_s", dict(dim=16, depths=(1, 1, 1, 1, 1), heads=2) | SHAPE),
    "diffussm": Backbone("diffussm_xl", dict(dim=12, depth=2, states=5) | SHAPE),
}
