"""Places where environments break: what is gone around, when, and what is only looked at more closely."""

from __future__ import annotations

import pytest

from shoal.engines.poison import ANY_ROW, CERTAIN, DOUBTFUL, UNNAMED, WHILE_RESTORED, Suspects


def after(*faults: tuple[int, ...]) -> Suspects:
    suspects = Suspects()
    for fault in faults:
        suspects.add(*fault)
    return suspects


@pytest.mark.parametrize(
    ("faults", "given_up"),
    [
        ([(7, 3, 1)], ()),
        ([(7, 3, 1)] * 2, ((3, 1),)),
        ([(7, 3, 1), (7, 3, 0)], ()),  # two environments, once each
        ([(7, 3, 1), (7, 4, 1)], ()),  # the same one elsewhere
        ([(7, 3, 1), (8, 3, 1)], ()),  # another rollout
        ([(7, 3, 1)] * 3, ((3, 1), (3, 1))),  # the episode after it broke as well: pass over two
        ([(7, 3, UNNAMED), (7, 3, 1)], ((3, 1),)),  # first a hang, then its name
        ([(7, 3, UNNAMED)] * 9, ()),  # nobody can be given up
        ([(7, 3, 1, DOUBTFUL)] * 3, ()),  # kills from elsewhere
        ([(7, 3, UNNAMED, DOUBTFUL), *[(7, 3, 1, DOUBTFUL)] * 3], ((3, 1),)),  # four at one place are no accident
        ([(7, ANY_ROW, UNNAMED), (7, 3, 1)], ((3, 1),)),  # of a paced group the row was not known either
        ([(7, WHILE_RESTORED, 1)] * 5, ()),  # before the first row: nothing can be ended there
    ],
)
def test_what_broke_twice_at_the_same_place_is_gone_around(faults, given_up):
    assert after(*faults).given_up(7) == given_up


def test_an_attempt_is_careful_where_nobody_could_be_named():
    suspects = after((7, 5, UNNAMED), (7, 3, UNNAMED, DOUBTFUL), (7, 9, 2), (8, 1, UNNAMED), (7, WHILE_RESTORED, UNNAMED))
    assert (suspects.careful(7), suspects.careful(8), suspects.careful(9)) == ((3, 5), (1,), ())
    suspects.forget_before(8)
    assert (suspects.careful(7), suspects.careful(8)) == ((), (1,))


def test_points_are_those_that_make_two_certain_ones_enough():
    assert after((0, 0, 0, CERTAIN), (0, 0, 0, DOUBTFUL)).given_up(0) == ()
    assert after((0, 0, 0, CERTAIN), (0, 0, 0, DOUBTFUL), (0, 0, 0, DOUBTFUL)).given_up(0) == ((0, 0),)


def test_a_step_of_a_paced_group_is_gone_around_whatever_rollout_it_hung_in():
    suspects = Suspects()
    suspects.add_step(1, 7, 30)
    suspects.add_step(1, 7, 31)
    suspects.forget_before(100)
    assert suspects.given_up_steps() == ()
    suspects.add_step(1, 7, 30)
    assert suspects.given_up_steps() == ((1, 7, 30),)
