"""The order in which a step's responses are shown."""

import numpy as np

from rspo_jax.training.samples import show_first


def order(rewards, groups, left_out=()):
    left = np.isin(np.arange(len(rewards)), left_out)
    return show_first(np.array(rewards, np.float32), np.array(groups), left).tolist()


def test_the_best_and_the_worst_of_mixed_groups_come_first_and_ties_stay_in_order():
    cases = {
        "one mixed group": (([0, 1, 0.5, 0], [0, 0, 0, 0]), [1, 0, 2, 3]),
        "mixed groups before equal ones": (([1, 1, 0, 1], [0, 0, 1, 1]), [3, 2, 0, 1]),
        "groups in their order, whatever the rewards": (([0, 0.1, 5, 0], [7, 7, 3, 3]), [2, 3, 1, 0]),
        "one of each equal group, then the rest": (([0, 0, 1, 1], [0, 0, 1, 1]), [0, 2, 1, 3]),
        "groups of one": (([0, 1, 0], [2, 0, 1]), [1, 2, 0]),
        "negative rewards": (([-3, -1, -2], [0, 0, 0]), [1, 0, 2]),
        "what has no reward is last and no worst": (([0, 0, 1], [0, 0, 0], [0]), [2, 1, 0]),
        "nothing has a reward": (([0, 0], [0, 0], [0, 1]), [0, 1]),
    }
    for name, (arguments, expected) in cases.items():
        assert order(*arguments) == expected, name
