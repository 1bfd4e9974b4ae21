"""Which timesteps a spacing takes: numbers worked out by hand from iDDPM's definition."""

import pytest

from experiments.engine.diffusion.iddpm import IDDPM
from experiments.engine.diffusion.respacing import spaced_timesteps


def test_ddim_spacing_takes_every_kth_timestep_from_the_first():
    assert spaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert spaced_timesteps(1000, "ddim250") == list(range(0, 1000, 4))  # ends at 996
    assert spaced_timesteps(1000, "ddim1000") == list(range(1000))
    assert spaced_timesteps(10, "ddim4") == [0, 3, 6, 9]
    assert spaced_timesteps(10, "ddim3") == [0, 4, 8]  # the first stride that takes three


def test_a_stride_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="no whole stride takes 300 of 1000"):
        spaced_timesteps(1000, "ddim300")  # a stride of 3 takes 334, one of 4 takes 250


def test_sections_are_spaced_one_by_one_with_both_their_ends():
    # Three sections of 5: strides 4, 2 and 4/3, whose positions 1.33 and 2.67 round to 1 and 3.
    assert spaced_timesteps(15, "2,3,4") == [0, 4, 5, 7, 9, 10, 11, 13, 14]
    # The example of the authors' documentation: 300 timesteps in sections of 100.
    taken = spaced_timesteps(300, "10,15,20")
    assert taken[:10] == list(range(0, 100, 11))
    assert taken[10:18] == [100, 107, 114, 121, 128, 135, 142, 149]  # strides of 99 / 14 = 7.07
    assert taken[24] == 199 and taken[25] == 200 and taken[-1] == 299
    assert len(taken) == 45


def test_the_first_sections_hold_the_timesteps_that_are_left_over():
    # 11 = 4 + 4 + 3; a section of one timestep takes its first.
    assert spaced_timesteps(11, "2,1,2") == [0, 3, 4, 8, 10]


def test_a_sequence_of_counts_is_the_text_of_its_numbers():
    assert spaced_timesteps(1000, [10, 15, 20]) == spaced_timesteps(1000, "10,15,20")


def test_one_section_takes_both_ends():
    assert spaced_timesteps(1000, "250") == spaced_timesteps(1000, 250)
    assert spaced_timesteps(1000, "250")[-3:] == [991, 995, 999]


@pytest.mark.parametrize("count", [2, 4, 5, 10, 25, 50, 100, 250, 500, 1000])
def test_a_count_is_one_section_for_every_count_that_is_declared(count: int):
    assert spaced_timesteps(1000, count) == spaced_timesteps(1000, str(count))


@pytest.mark.parametrize(
    "spacing, message",
    [
        ("ddim", "is no count"),
        ("fast", "is no count"),
        ("10,,5", "is no count"),
        ("600,1", "a section of 500 timesteps does not hold 600"),
        ([1], "two timesteps in all"),
        ([], "two timesteps in all"),
    ],
)
def test_what_is_no_spacing_is_refused(spacing: str | list[int], message: str):
    with pytest.raises(ValueError, match=message):
        spaced_timesteps(1000, spacing)


@pytest.mark.parametrize("spacing", ["ddim50", "10,15,20", [10, 15, 20]])
def test_a_respaced_diffusion_keeps_the_marginals_of_its_timesteps(spacing: str | list[int]):
    original = IDDPM.linear()
    respaced = original.respaced(spacing)
    taken = spaced_timesteps(1000, spacing)
    assert respaced.timesteps.tolist() == taken
    assert respaced.times == (taken[0], taken[-1])
    difference = respaced.alphas_cumprod / original.alphas_cumprod[taken] - 1
    assert difference.abs().max() < 1e-12
