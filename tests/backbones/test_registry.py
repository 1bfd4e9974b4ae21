"""Names, options and refusals: what is unknown or impossible raises, and lists what is known."""

from typing import Any

import pytest
import torch

import backbones
from backbones.dico import DiCo


def test_names_are_sorted_and_matched_by_pattern():
    assert backbones.list_backbones("dit_s_*") == ["dit_s_2", "dit_s_4", "dit_s_8"]
    assert (
        backbones.list_backbones() == sorted(set(backbones.list_backbones()))
        and backbones.list_backbones("unet*") == []
    )


def test_a_name_is_registered_once():
    before = backbones.options_of("dico_s")
    with pytest.raises(ValueError, match="'dico_s' is registered twice"):
        backbones.register(DiCo, {"dico_s": dict(dim=1)}, tiny={})
    assert backbones.options_of("dico_s") == before


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("adm_256", "attention_resolutions", (8,)),
        ("ldm_8", "attention_factors", (2,)),
        ("adm_classifier_64", "attention_resolutions", (8,)),
    ],
)
def test_the_former_name_of_an_option_builds_the_same_network(
    name: str, option: str, value: tuple[int, ...]
):
    tiny = backbones.tiny_options_of(name)
    shapes = []
    for key in (option, "attention_at"):
        options = {other: given for other, given in tiny.items() if other != option}
        with torch.device("meta"):
            model = backbones.build(name, **options, **{key: value})
        shapes.append({key: weight.shape for key, weight in model.state_dict().items()})
    assert shapes[0] == shapes[1]

    # Both at once contradict each other.
    with pytest.raises(ValueError, match=f"both set {option}"):
        backbones.build(name, **{"attention_at": value, option: value})


@pytest.mark.parametrize(
    "name, option",
    [
        ("adm_256", "attention_resolutions"),
        ("ldm_8", "attention_factors"),
        ("adm_classifier_64", "attention_resolutions"),
    ],
)
def test_listings_show_the_name_that_says_the_unit(name: str, option: str):
    assert option in backbones.options_of(name)
    assert "attention_at" not in backbones.options_of(name)
    with pytest.raises(ValueError, match="has no option width") as refusal:
        backbones.build(name, width=8)
    assert option in str(refusal.value)
    assert "attention_at" not in str(refusal.value)


IMPOSSIBLE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("dico_z", {}, ["unknown backbone 'dico_z'", "dico_xl", "dit_s_2", "hourglass"]),
    (
        "dico_s",
        {"depth": 3, "width": 8},
        ["depth, width", "depths", "input_size", "learn_sigma"],
    ),
    ("dico_s", {"input_size": 6}, ["divisible by 4", "6"]),
    ("dit_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("dit_s_2", {"heads": 5}, ["dim by heads", "384", "5"]),
    ("hourglass", {"input_size": 10}, ["divisible by 4", "10"]),
    ("isotropic", {"input_size": 7}, ["divisible by patch", "7"]),
    (
        "isotropic",
        {"mixer": "mixer"},
        ["unknown mixer 'mixer'", "agent, conv, focused_linear, global_regional, softmax, window"],
    ),
    (
        "isotropic",
        {"mixer": "window", "mixer_options": {"windows": 4}},
        ["windows", "heads, window"],
    ),
    ("isotropic", {"mixer_options": {"channel": "eca"}}, ["'eca'", "cca, none, se, mdta"]),
    ("isotropic", {"mixer_options": {"activation": "silu"}}, ["'silu'", "gelu, relu"]),
    ("dic_s", {"input_size": 6}, ["divisible by 4", "6"]),
    ("dic_s", {"dim": 36}, ["32 groups", "36"]),
    ("dic_s", {"dim": 2}, ["groups of 4", "2"]),
    ("dic_s", {"depths": (6, 6, 5, 6, 7)}, ["every 3rd", "(6, 6, 5, 6, 7)"]),
    ("udit_s", {"input_size": 12}, ["divisible by 8", "12"]),
    ("udit_s", {"dim": 24}, ["divisible by 4 heads", "24", "4"]),
    ("uvit_l_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("uvit_l_2", {"heads": 5}, ["dim by heads", "1024", "5"]),
    ("uvit_l_2", {"depth": 5}, ["even", "5"]),
    ("uvit_l_2", {"learn_sigma": False}, ["learn_sigma", "conv_head"]),
    ("sit_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("adm_256", {"input_size": 100}, ["divisible by 32", "100"]),
    ("adm_256", {"dim": 48}, ["widths divisible by 32", "48, 48, 96"]),
    ("adm_256", {"head_dim": 48}, ["head_dim 48", "256"]),
    ("adm_base_128", {"heads": 3}, ["heads 3", "256"]),
    ("adm_256", {"order": "newer"}, ["'newer'", "legacy, new"]),
    ("adm_up_256", {"in_channels": 3}, ["in_channels must be even", "3"]),
    ("ldm_4", {"input_size": 20}, ["divisible by 8", "20"]),
    ("ldm_8", {"dim": 40}, ["widths divisible by 32", "40, 80, 160"]),
    ("ldm_8", {"head_dim": 48}, ["head_dim 48", "256"]),
    ("dis_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("dis_s_2", {"depth": 3}, ["even depth", "3"]),
    ("dim_l", {"input_size": 7}, ["divisible by patch", "7"]),
    ("dim_l", {"depth": 4}, ["odd depth", "4"]),
    ("dimsum_l_2", {"input_size": 20}, ["divisible by 4 patches", "20"]),
    ("dimsum_l_2", {"fusion_heads": 7}, ["fusion_heads 7"]),
    ("dig_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("dig_s_2", {"heads": 5}, ["twice the heads", "384", "5"]),
    ("dig_s_2", {"depth": 6}, ["divisible by 4", "6"]),
    ("dig_s_2", {"mlp_ratio": 2}, ["mlp_ratio", "depth, dim, heads"]),
    ("lightningdit_b_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("lightningdit_b_1", {"heads": 128}, ["dim by 4 heads", "768", "128"]),
    ("lightningdit_b_1", {"rope": False, "heads": 5}, ["dim by heads", "768", "5"]),
    ("flowdcn_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("flowdcn_s_2", {"groups": 5}, ["dim by groups", "384", "5"]),
    ("terdit_600m", {"input_size": 7}, ["divisible by patch", "7"]),
    ("terdit_600m", {"heads": 5}, ["twice the heads", "1536", "5"]),
    ("terdit_600m", {"alpha": "mean"}, ["'mean'", "normal, absmean"]),
    ("terdit_600m", {"packed": True, "ternary": False}, ["ternary=True"]),
    ("diffussm_xl", {"input_size": 9}, ["divisible by group", "9"]),
]


@pytest.mark.parametrize("name, options, words", IMPOSSIBLE)
def test_a_refusal_is_one_line_that_names_what_is_known(
    name: str, options: dict[str, Any], words: list[str]
):
    with torch.device("meta"), pytest.raises(ValueError) as refusal:
        backbones.build(name, **options)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
