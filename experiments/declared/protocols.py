"""Named bundles of data, recipe, sampler and scores. A command runs a table's rows under one.

A protocol's source says whose it is. No torch.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.declared.rates import with_chosen_rates
from experiments.engine.data.captioned import grammar
from experiments.engine.specs.latent_space import LatentSpace
from experiments.engine.specs.spec import Data, Diffusion, Recipe, Sampler
from experiments.engine.specs.stages import HeldOutScore, Protocol

# ---- What reduced protocols share: weights drawn by name, and a ladder of learning rates


def recipe_of_length(steps: int, lr: float) -> Recipe:
    """Return the recipe of a training that is scored by its loss on held-out images.

    Warm-up and average follow the length. At its end the average holds 0.03 % of initial weights.
    """
    return Recipe(
        steps=steps,
        batch=64,
        lr=lr,
        warmup=steps // 16,
        decay="cosine",
        ema=round(1 - 8 / steps, 6),
        initial="by_name",
    )


def at_half_length(protocol: Protocol) -> Protocol:
    """Return the protocol with half the steps, its own decay and its own average.

    What is fine-tuned starts from trainings of full length.
    """
    recipe = recipe_of_length(protocol.recipe.steps // 2, protocol.recipe.lr)
    start_from = protocol.start_from or protocol
    return replace(protocol, name=f"{protocol.name}_half", recipe=recipe, start_from=start_from)


def with_independent_weights(protocol: Protocol) -> Protocol:
    """Return the protocol with initial weights that rows of one seed do not share."""
    recipe = replace(protocol.recipe, initial="in_order")
    return replace(protocol, name=f"{protocol.name}_independent", recipe=recipe)


LADDER = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)

# ---- Digits: minutes on a CPU

DIGITS = with_chosen_rates(
    Protocol(
        name="digits",
        data=Data("digits", size=8, channels=1, num_classes=10, split="held_out"),
        recipe=recipe_of_length(1000, lr=1e-2),
        sampler=Sampler(num_steps=50, channels=None),
        num=500,
        features="digits_judge",
        labels="balanced",
        small=True,
        matched=True,
        source="this suite: scikit-learn's 8x8 digits in three parts, each network at the learning "
        "rate that the validation part chose",
        cost_hours=65 / 3600,
        heldout=HeldOutScore(draws=4),
        ladder=LADDER,
    )
)

DIGITS_LONG = with_chosen_rates(
    replace(
        DIGITS,
        name="digits_long",
        recipe=recipe_of_length(4000, lr=5e-3),
        source="protocol digits with four times its steps, as long as the slowest family needs",
        cost_hours=240 / 3600,
        ladder=(2.5e-3, 5e-3, 1e-2),
    )
)

DIGITS_WHOLE = replace(
    DIGITS,
    name="digits_whole",
    data=replace(DIGITS.data, split="whole"),
    recipe=Recipe(steps=650, batch=64, lr=5e-3, warmup=50, decay="cosine", ema=0.99),
    features="digits",
    matched=False,
    source="superseded by protocol digits: it trains on all images, is scored against the same "
    "ones, and gives every network 650 steps at one learning rate",
    cost_hours=40 / 3600,
    heldout=None,
    ladder=(),
    rates={},
)

# ---- CIFAR-10, folded to a size at which mixers differ

CIFAR10_16 = with_chosen_rates(
    Protocol(
        name="cifar10_16",
        data=Data(
            "cifar10",
            size=16,
            channels=12,
            num_classes=10,
            flip=True,
            fold=2,
            split="held_out",
        ),
        recipe=recipe_of_length(8000, lr=5e-3),
        sampler=Sampler("ddim", num_steps=25, channels=None, clip=True),
        num=5000,
        features="cifar_judge",
        labels="balanced",
        small=True,
        matched=True,
        source="this suite: CIFAR-10 with squares of 2x2 pixels folded into 12 channels, each "
        "network at the learning rate that the validation part chose",
        cost_hours=900 / 3600,
        heldout=HeldOutScore(num=5000),
        ladder=LADDER,
    )
)

# ---- Text to image: digits that captions name and place

DIGITS_TEXT = Protocol(
    name="digits_text",
    data=Data(
        grammar.NAME,
        size=grammar.SIZE,
        channels=1,
        num_classes=210,
        split="held_out",
        captions=grammar.VOCABULARY,
    ),
    recipe=Recipe(
        steps=2000,
        batch=32,
        lr=4e-3,
        warmup=50,
        decay="cosine",
        ema=0.99,
        grad_clip=1.0,
        power_snapshots=20,
    ),
    sampler=Sampler("ddim", num_steps=20, scale=2.0, channels=None, clip=True),
    num=1050,
    features="digits_text",
    labels="balanced",
    small=True,
    source="this suite: two of scikit-learn's digits placed by a caption, 40 pairs of which no "
    "network sees; a judge reads the named cells",
    diffusion=Diffusion(variance="fixed"),
    cost_hours=300 / 3600,
)

DIGITS_TEXT_LONG = replace(
    DIGITS_TEXT,
    name="digits_text_long",
    recipe=replace(DIGITS_TEXT.recipe, steps=6000),
    source="protocol digits_text with three times its steps, for the families that it leaves near "
    "chance, such as U-ViT",
    cost_hours=900 / 3600,
)

DIGITS_TEXT_RELATIONS = replace(
    DIGITS_TEXT_LONG,
    name="digits_text_relations",
    data=replace(DIGITS_TEXT.data, name=grammar.RELATIONS_NAME, num_classes=410),
    num=2050,
    source="protocol digits_text_long with the words right of and below, so that the order of the "
    "digits' words no longer tells their places",
)

# States of a frozen sentence encoder in place of words whose encoder is trained along.
MINILM_DIM = 384
DIGITS_TEXT_MINILM = replace(
    DIGITS_TEXT,
    name="digits_text_minilm",
    data=replace(DIGITS_TEXT.data, captions="all-MiniLM-L6-v2 53aa51172d142c89"),
    source="protocol digits_text with the states of all-MiniLM-L6-v2's tokens as the captions; "
    "its hash is part of its name",
    options=dict(context_dim=MINILM_DIM, vocabulary=None),
)

DIGITS_TEXT_MINILM_POOLED = replace(
    DIGITS_TEXT_MINILM,
    name="digits_text_minilm_pooled",
    data=replace(DIGITS_TEXT_MINILM.data, pooled=True),
    source="protocol digits_text_minilm, whose tokens all have the pooled vector of their caption: "
    "the control, which hardly tells a caption from its exchange (cosine 0.98)",
)

# ---- Text to image: MS-COCO 2014 at 256 pixels
#
# Its 616,767 captions are those of 82,783 images that are trained on, of which a visit draws one,
# and of 40,504 that are scored. Both papers' features are those of U-ViT's scripts, so crop, text
# and null caption agree; the factor of the latents, the objective and the sampler do not.

COCO_ROWS = ("U-ViT-S/2", "U-ViT-S/2 (Deep)", "MMDiT", "DiCo-CrossAttn", "DiCo-DWC")
COCO256_UVIT = Protocol(
    name="coco256_uvit",
    data=Data(
        "coco256_uvit",
        size=32,
        channels=4,
        num_classes=616_767,
        captions="clip-vit-large-patch14",
        space=LatentSpace(scale=(0.2301,)),
    ),
    recipe=Recipe(
        steps=1_000_000,
        batch=256,
        lr=2e-4,
        betas=(0.9, 0.9),
        weight_decay=0.03,
        warmup=5000,
        precision="bf16",
    ),
    sampler=Sampler("dpm_solver_3s", num_steps=50, scale=2.0, channels=None, interval=(0, 1001)),
    num=30_000,
    features="inception",
    labels="one_an_image",
    small=False,
    source="U-ViT's paper and code: noise, Stable Diffusion's betas, latents times 0.2301, "
    "guidance of 1 in its notation. Three differences: sd-vae-ft's encoder in place of a VAE "
    "without EMA, bf16 in place of fp16, and the last average is scored, not the best of 20 by "
    "FID-10K",
    diffusion=Diffusion(betas="stable_diffusion", variance="fixed", first_step=1),
    rows=COCO_ROWS,
)

COCO256_REPA = replace(
    COCO256_UVIT,
    name="coco256_repa",
    data=replace(COCO256_UVIT.data, name="coco256_repa", space=None),
    recipe=Recipe(steps=150_000, batch=256, grad_clip=1.0, precision="bf16"),
    sampler=Sampler("sde", scale=2.0, channels=None),
    source="REPA's paper and code, whose setup DiCo's second version takes: velocity, latents "
    "times 0.18215, 250 steps of the SDE. Three differences: bf16 in place of fp16, 30,000 images "
    "where its script draws 40,192, and averaged weights where it loads the others",
    diffusion=Diffusion("flow"),
)

# ---- CIFAR-10: real images in pixel space

CIFAR10 = Protocol(
    name="cifar10",
    data=Data("cifar10", size=32, channels=3, num_classes=10, flip=True),
    recipe=Recipe(steps=400_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="the ImageNet recipe in pixel space",
)

CIFAR10_CLASSIFIER = replace(
    CIFAR10,
    name="cifar10_classifier",
    features="cifar_classifier",
    source="protocol cifar10, the same trainings, scored without Inception on the features of a "
    "CIFAR-10 classifier that the suite trains",
)

CIFAR10_BF16 = replace(
    CIFAR10_CLASSIFIER,
    name="cifar10_bf16",
    recipe=replace(CIFAR10.recipe, steps=4000, precision="bf16", ema=0.999),
    sampler=Sampler("ddim", num_steps=25, channels=None, clip=True),
    num=5000,
    source="protocol cifar10_classifier, cut down so that a seed of Table 4 takes an hour of one "
    "H200. By its rows' counted Gflops, 48 minutes train at an assumed 100 TFLOP/s in bf16 (a "
    "tenth of the peak) and 10 minutes sample at 20 TFLOP/s in fp32",
)

# ---- ImageNet in the latent space of an autoencoder

IMAGENET256 = Protocol(
    name="imagenet256",
    data=Data("imagenet256", size=32, channels=4, num_classes=1000, flip=True),
    recipe=Recipe(steps=400_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="DiCo paper, Table 6 and section 4.1",
)

IMAGENET256_GUIDED = replace(
    IMAGENET256,
    name="imagenet256_guided",
    recipe=replace(IMAGENET256.recipe, steps=3_750_000),
    sampler=Sampler(scale=1.4),
    source="DiCo paper, Tables 1 and 6; the guidance scale is the authors' (README)",
)

IMAGENET256_FIXED = replace(
    IMAGENET256,
    name="imagenet256_fixed",
    data=replace(IMAGENET256.data, latents="fixed"),
    source="DiCo's code: one stored posterior sample of each image and of its flip. DiT draws a "
    "new sample at every visit",
)

IMAGENET512 = Protocol(
    name="imagenet512",
    data=Data("imagenet512", size=64, channels=4, num_classes=1000, flip=True),
    recipe=Recipe(steps=1_300_000, batch=256),
    sampler=Sampler(),
    num=50_000,
    features="inception",
    labels="random",
    small=False,
    source="DiCo paper, Tables 2 and 6",
)

IMAGENET512_FIXED = replace(
    IMAGENET512,
    name="imagenet512_fixed",
    data=replace(IMAGENET512.data, latents="fixed"),
    source=IMAGENET256_FIXED.source,
)

# ---- ImageNet as each paper trains its own network

OWN = "each system by the recipe and the sampler of its own paper"
IMAGENET256_OWN = replace(IMAGENET256, name="imagenet256_own", own=True, source=OWN)
IMAGENET512_OWN = replace(
    IMAGENET512, name="imagenet512_own", own=True, source=OWN, start_from=IMAGENET256_OWN
)

_ALL = (
    DIGITS,
    DIGITS_LONG,
    DIGITS_WHOLE,
    CIFAR10_16,
    CIFAR10,
    CIFAR10_CLASSIFIER,
    CIFAR10_BF16,
    IMAGENET256,
    IMAGENET256_FIXED,
    IMAGENET256_GUIDED,
    IMAGENET512,
    IMAGENET512_FIXED,
    IMAGENET256_OWN,
    IMAGENET512_OWN,
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
COCO256 = {protocol.name: protocol for protocol in (COCO256_UVIT, COCO256_REPA)}
# Protocols whose captions of digits are states of a sentence encoder.
SENTENCES = {
    protocol.name: protocol for protocol in (DIGITS_TEXT_MINILM, DIGITS_TEXT_MINILM_POOLED)
}
# Protocols of networks that read text, which others cannot be trained under.
CAPTIONED = {
    protocol.name: protocol
    for protocol in (DIGITS_TEXT, DIGITS_TEXT_LONG, DIGITS_TEXT_RELATIONS, *SENTENCES.values())
} | COCO256
