"""The command that times log-probs without logits: its table, on shapes that take no time. Times themselves are not
tested."""

import pytest

from experiments.bench import head as bench_head


def test_prints_both_forms_of_every_shape(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
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
