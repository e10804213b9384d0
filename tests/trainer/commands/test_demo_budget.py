"""What fits: sizes by hand, monotone in speed and minutes."""

import pytest

from mopo_trainer.commands.demo_budget import LADDER, Rates, Sizes, describe, drawing_rates, fit, minutes_of

WHOLE = Sizes(steps=28, prompts=42, num_samples=4)
FAST = Rates(spent=30, fixed=20, steps=9, batch=7, text=0.3, batch_size=100)


def slower(factor):
    return Rates(*(factor * x for x in (FAST.spent, FAST.fixed, FAST.steps, FAST.batch, FAST.text)), FAST.batch_size)


def test_seconds_by_hand():
    assert WHOLE.seconds(FAST) == pytest.approx(30 + 20 + 28 * 9 + 3 * (2 * 7 + 42 * 4 * 0.3))


def test_a_fast_machine_does_the_whole_and_no_more():
    assert fit(FAST, 10, WHOLE) == fit(FAST, 60, WHOLE) == WHOLE


def test_half_the_work_by_hand():
    """84 texts a model on 42 prompts are two a prompt; 14 of 28 steps."""
    half = Sizes(steps=14, prompts=42, num_samples=2)
    seconds = half.seconds(FAST) - FAST.spent
    minutes = (FAST.spent + seconds / 0.9) / 60 + 1e-6
    assert fit(FAST, minutes, WHOLE) == half
    less = fit(FAST, minutes - 0.1, WHOLE)
    assert less.steps < 14
    assert less.prompts < 42


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4, 6])
@pytest.mark.parametrize("minutes", [5, 10, 20])
def test_what_is_chosen_fits(factor, minutes):
    rates = slower(factor)
    sizes = fit(rates, minutes, WHOLE)
    assert sizes.seconds(rates) <= 60 * minutes or sizes == fit(rates, 0, WHOLE)
    assert 1 <= sizes.steps <= 28
    assert 2 <= sizes.num_samples <= 4
    assert 2 <= sizes.prompts <= 42
    more = fit(rates, minutes + 2, WHOLE)
    assert more.steps >= sizes.steps
    assert more.prompts * more.num_samples >= sizes.prompts * sizes.num_samples


def test_an_older_machine_still_shows_something_in_ten_minutes():
    """28% of it: 150 s, 8 steps of 30 s for both runs and 3 × 46 texts of 1.1 s, of 90 + 0.9 × 510 s."""
    rates = Rates(spent=90, fixed=60, steps=30, batch=0, text=1.1, batch_size=192)
    assert WHOLE.seconds(rates) > 24 * 60
    assert fit(rates, 10, WHOLE) == Sizes(steps=8, prompts=23, num_samples=2)


def test_nothing_fits_no_time():
    assert fit(FAST, 0, WHOLE) == Sizes(steps=1, prompts=2, num_samples=2)


def test_steps_that_are_asked_for_stay():
    sizes = fit(FAST, 5, WHOLE, keep_steps=True)
    assert sizes.steps == 28
    assert 2 <= sizes.prompts * sizes.num_samples < 42 * 4


def test_texts_shrink_with_the_share():
    counts = [s.prompts * s.num_samples for share in LADDER for s in [fit(slower(1 / share), 7.6, WHOLE)]]
    assert counts == sorted(counts, reverse=True)


def test_two_batches_tell_what_a_batch_and_a_text_cost():
    assert drawing_rates((64, 39.0), (192, 77.4)) == (pytest.approx(19.8), pytest.approx(0.3), 192)


def test_where_texts_of_a_large_batch_cost_more_the_small_one_is_taken():
    assert drawing_rates((64, 32.0), (192, 100.0)) == (0, 0.5, 64)


def test_noise_makes_no_text_free():
    assert drawing_rates((64, 40.0), (192, 38.4)) == (0, pytest.approx(0.2), 192)
    assert drawing_rates((6, 3.0), (6, 3.3)) == (0, pytest.approx(0.55), 6)  # no more texts than that are there


def test_a_demo_that_does_not_fit_says_so():
    rates = slower(10)
    assert "more than the 3 asked for" in describe(rates, fit(rates, 3, WHOLE), 3, WHOLE)
    assert describe(FAST, WHOLE, 10, WHOLE) == (
        "28 steps a run; 42 prompts × 4 texts a model, drawn 100 at a time at most. About 8.3 minutes in all."
    )


def test_a_training_that_is_cut_names_the_minutes_that_do_it_all():
    rates = slower(2)
    cut, enough = fit(rates, 10, WHOLE), minutes_of(rates, WHOLE)
    assert cut.steps < 28
    assert f"--minutes {enough} does the whole demo" in describe(rates, cut, 10, WHOLE)
    assert fit(rates, enough, WHOLE) == WHOLE
    assert fit(rates, enough - 1, WHOLE) != WHOLE
