"""Event files of TensorBoard, read back by TensorBoard's own reader."""

import errno

import pytest
from tensorboard.backend.event_processing import event_accumulator

from rspo_jax.records.board import Board


def points(folder, tag):
    """Return the steps and values of a tag that TensorBoard shows for a folder."""
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)] if tag in reader.Tags()["scalars"] else []


def test_numbers_come_back_by_tag(tmp_path):
    board = Board(tmp_path / "new" / "folder", 0)
    board.add({"reward": 0.5, "loss": -2.0}, 3)
    board.add({"reward": 0.25}, 4)
    board.close()
    assert points(tmp_path / "new" / "folder", "reward") == [(3, 0.5), (4, 0.25)]
    assert points(tmp_path / "new" / "folder", "loss") == [(3, -2.0)]


def test_sync_leaves_nothing_in_memory(tmp_path):
    board = Board(tmp_path, 0)
    for step in range(3):
        board.add({"reward": 0.5}, step)
    board.sync()
    assert points(tmp_path, "reward") == [(0, 0.5), (1, 0.5), (2, 0.5)]  # while the file is open
    board.close()


def test_numbers_tell_files_of_one_second_apart(tmp_path):
    for number in (0, 1):
        board = Board(tmp_path, number)
        board.add({"reward": float(number)}, number)
        board.close()
    assert sorted(path.name[-5:] for path in tmp_path.iterdir()) == [".0000", ".0001"]
    assert points(tmp_path, "reward") == [(0, 0.0), (1, 1.0)]


def test_a_restart_hides_the_points_that_follow_it(tmp_path):
    before = Board(tmp_path, 0)
    for step in range(5):
        before.add({"reward": 0.0}, step)
    before.close()
    after = Board(tmp_path, 1, purge_step=3)
    after.add({"reward": 1.0}, 3)
    after.close()
    assert points(tmp_path, "reward") == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0)]


def test_a_file_in_the_place_of_the_folder_is_told_at_once(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(FileExistsError):
        Board(tmp_path / "tensorboard", 0)


def test_a_full_disk_is_told_to_the_caller(tmp_path, monkeypatch):
    board = Board(tmp_path, 0)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(board._events, "flush", full)
        with pytest.raises(OSError, match="No space left"):
            board.sync()
        patch.setattr(board, "_flush_at", 0.0)  # as if two seconds had passed
        with pytest.raises(OSError, match="No space left"):
            board.add({"reward": 0.5}, 0)
    board.close()
    assert points(tmp_path, "reward") == [(0, 0.5)]
