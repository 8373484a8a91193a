"""The command that times log-probs without logits: its table, on shapes that take no time. Times are not tested."""

import pytest

from experiments.bench import head as bench_head


def test_prints_both_forms_of_every_shape(capsys, monkeypatch):
    """The second shape repeats the figures of the first, as only the table is looked at."""
    monkeypatch.setenv("COLUMNS", "160")
    measured, measure_shape = {}, bench_head.measure_shape

    def measure_once(shape, direction, benchmark):
        if direction not in measured:
            measured[direction] = measure_shape(shape, direction, benchmark)
        return [(",".join(map(str, shape)), *line[1:]) for line in measured[direction]]

    monkeypatch.setattr(bench_head, "measure_shape", measure_once)
    assert bench_head.main(["--shapes", "1,4,3,5", "2,3,4,6", "--repeats", "2", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for shape in ("1,4,3,5", "2,3,4,6"):
        for form in bench_head.FORMS:
            assert sum(shape in line and form in line for line in lines) == 2


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,0", "1,2,3,x", "1,2,3,-4"])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="B,T,D,V"):
        bench_head.main(["--shapes", shape])


def test_one_repeat_has_no_quartiles():
    with pytest.raises(ValueError, match="repeats"):
        bench_head.main(["--shapes", "1,4,3,5", "--repeats", "1"])
