"""The faults of `make mutants` can still be planted: each changes a text that stands in its file exactly once."""

from pathlib import Path

from mutants import FAULTS, ROOT, noticing_tests, plant


def test_every_fault_can_be_planted():
    assert len({(fault.path, fault.before) for fault in FAULTS}) == len(FAULTS) >= 40
    for fault in FAULTS:
        sound = (ROOT / fault.path).read_text(encoding="utf-8")
        changed = plant(sound, fault)
        assert changed != sound
        compile(changed, fault.path, "exec")
        assert all((ROOT / path).exists() for path in noticing_tests(fault.path)), fault.path


def test_the_noticing_tests_a_fault_are_in_the_fast_tier():
    makefile = (Path(ROOT) / "Makefile").read_text(encoding="utf-8")
    fast = makefile.split("FAST :=")[1].split("\n\n")[0].replace("\\\n", " ").split()
    for fault in FAULTS:
        for path in noticing_tests(fault.path):
            assert path.startswith(tuple(fast)), fault.path
