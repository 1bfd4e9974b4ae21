"""The parts of a registered network's name: its family and its size."""

from __future__ import annotations

# Families as the literature writes them, by the first part of a registered name, in the order of
# their colours.
TITLES = {
    "dit": "DiT",
    "dico": "DiCo",
    "dig": "DiG",
    "dic": "DiC",
    "dis": "DiS",
    "dim": "DiM",
    "uvit": "U-ViT",
    "adm": "ADM",
    "diffussm": "DiffuSSM",
    "dimsum": "DiMSUM",
}


def family_of(name: str) -> str:
    """Return the family of a registered network: 'dit' of 'dit_s_2'."""
    return name.partition("_")[0]


def size_of(name: str) -> str:
    """Return the size of a registered network: 's' of 'dit_s_2', and '' of 'hourglass'."""
    _, _, rest = name.partition("_")
    return rest.partition("_")[0]
