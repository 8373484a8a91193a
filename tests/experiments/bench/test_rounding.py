"""The command that counts the weights that updates move: at random nothing is lost, to the nearest nearly all."""

import pytest

from experiments.bench.rounding import main


def test_rounding_at_random_makes_the_way_of_float32(capsys):
    assert main(["--weights", "20000", "--updates", "1", "20", "--learning-rates", "1e-6"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "1e-06" in line]
    made = {(row[2].strip(), int(row[1])): float(row[4]) for row in rows}
    # A weight moves by a whole step of 1e-4 or not at all, which makes the figures uncertain by some 8 and 2 %.
    assert made["at random", 1] == pytest.approx(1, abs=0.4) and made["at random", 20] == pytest.approx(1, abs=0.1)
    assert abs(made["to the nearest", 20]) < 0.3 and len(made) == 4
