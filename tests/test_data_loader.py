import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data.loader import Tokens, TrainLoader, eval_batches, prefetch, stream_hash
from model.constants import IGNORED
from model.errors import UserError


def tokens_of(folder: Path, n_tokens: int, *, dtype: str = "<u2", name: str = "train") -> Tokens:
    """A split whose ids are 0, 1, 2 ..., so that an id is its own position."""
    path = folder / f"{name}-{n_tokens}.bin"
    np.arange(n_tokens).astype(dtype).tofile(path)
    return Tokens(path=path, dtype=np.dtype(dtype), n_tokens=n_tokens, name=name)


def loader_of(folder: Path, n_tokens: int = 230, **overrides: int) -> TrainLoader:
    return TrainLoader(tokens_of(folder, n_tokens), **({"block_size": 7, "global_rows": 6, "seed": 3} | overrides))


def test_targets_are_the_next_tokens(tmp_path):
    idx, targets = loader_of(tmp_path).rows(0, range(6))
    assert idx.shape == targets.shape == (6, 7)
    assert idx.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, idx + 1)
    assert torch.equal(idx, idx[:, :1] + torch.arange(7))


@pytest.mark.parametrize("parts", [[range(6)], [range(4), range(4, 6)], [range(i, i + 1) for i in range(6)]])
def test_a_row_is_the_same_however_the_batch_is_split_and_in_whatever_order_it_is_asked(tmp_path, parts):
    whole = [loader_of(tmp_path).rows(step, range(6)) for step in range(20)]
    loader = loader_of(tmp_path)
    for step in reversed(range(20)):
        idx, targets = (torch.cat(part) for part in zip(*[loader.rows(step, part) for part in parts], strict=True))
        assert torch.equal(idx, whole[step][0])
        assert torch.equal(targets, whole[step][1])


def test_every_epoch_shows_every_block_once_in_an_order_and_from_an_offset_of_its_own(tmp_path):
    loader = loader_of(tmp_path, global_rows=1)
    epochs = []
    for epoch in range(4):
        first = range(epoch * loader.blocks_per_epoch, (epoch + 1) * loader.blocks_per_epoch)
        epochs.append([int(loader.rows(row, range(1))[0][0, 0]) for row in first])
    for starts in epochs:
        assert np.diff(sorted(starts)).tolist() == [7] * (loader.blocks_per_epoch - 1)
        assert starts != sorted(starts)
    assert len({min(starts) for starts in epochs}) > 1


def test_an_epoch_leaves_out_less_than_two_blocks(tmp_path):
    for n_tokens in range(8, 60):
        loader = loader_of(tmp_path, n_tokens, global_rows=1)
        assert n_tokens - loader.blocks_per_epoch * 7 <= 14 or loader.blocks_per_epoch == 1
        last = max(int(loader.rows(row, range(1))[1].max()) for row in range(40))
        assert last <= n_tokens - 1


def test_the_last_token_is_reached_in_some_epoch(tmp_path):
    loader = loader_of(tmp_path, 8, global_rows=1)
    assert loader.rows(0, range(1))[1].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    loader = loader_of(tmp_path, 30, global_rows=1)
    assert max(int(loader.rows(row, range(1))[1].max()) for row in range(100)) == 29


def test_seeds_give_different_orders(tmp_path):
    starts = {tuple(loader_of(tmp_path, seed=seed).rows(0, range(6))[0][:, 0].tolist()) for seed in range(5)}
    assert len(starts) == 5


def test_the_order_is_what_it_was_when_this_test_was_written(tmp_path):
    assert loader_of(tmp_path).rows(4, range(6))[0][:, 0].tolist() == [108, 38, 59, 164, 45, 157]


def test_epoch_counts_how_often_the_split_was_seen(tmp_path):
    loader = loader_of(tmp_path)
    assert loader.blocks_per_epoch == 31
    assert (loader.epoch(0), loader.epoch(31)) == (0.0, 6.0)


@pytest.mark.parametrize(("n_tokens", "fitting"), [(312, 256), (257, 256), (256, 128), (2, 1)])
def test_a_split_shorter_than_the_context_is_refused_with_a_block_size_that_fits(tmp_path, n_tokens, fitting):
    with pytest.raises(UserError) as error:
        loader_of(tmp_path, n_tokens, block_size=1024)
    assert str(error.value) == (
        f"train split has {n_tokens} tokens, block_size is 1024; use --model.block_size {fitting} or more text"
    )
    assert loader_of(tmp_path, n_tokens, block_size=fitting).rows(0, range(6))[0].shape == (6, fitting)


def test_one_token_is_not_enough_for_anything(tmp_path):
    with pytest.raises(UserError, match="train split has 1 tokens, block_size is 7; use more text"):
        loader_of(tmp_path, 1)


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 42, 43, 44, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 14, 50, 1000])
def test_evaluation_counts_every_token_once_and_in_order(tmp_path, n_tokens, max_tokens):
    tokens = tokens_of(tmp_path, n_tokens)
    seen = []
    for idx, targets in eval_batches(tokens, block_size=7, batch_size=3, max_tokens=max_tokens):
        assert idx.shape == targets.shape
        assert idx.shape[1] == 7
        assert idx.shape[0] <= 3
        counted = targets != IGNORED
        assert torch.equal(targets[counted], idx[counted] + 1)
        seen += targets[counted].tolist()
    assert seen == list(range(1, min(n_tokens, 1 + (max_tokens or n_tokens))))


def test_a_short_last_window_is_filled_on_the_right(tmp_path):
    *_, (idx, targets) = eval_batches(tokens_of(tmp_path, 13), block_size=5, batch_size=2)
    assert idx.tolist() == [[10, 11, 0, 0, 0]]
    assert targets.tolist() == [[11, 12, IGNORED, IGNORED, IGNORED]]


def test_a_split_with_nothing_to_predict_is_refused(tmp_path):
    with pytest.raises(UserError, match="val split has 1 tokens and must have at least 2; use more text"):
        next(eval_batches(tokens_of(tmp_path, 1, name="val"), block_size=5, batch_size=2))


def test_stream_hash_changes_with_what_evaluation_sees_and_with_nothing_else(tmp_path):
    tokens = tokens_of(tmp_path, 100)
    wide = tokens_of(tmp_path, 101, dtype="<u4")
    assert stream_hash(tokens, 7, 50) == stream_hash(wide, 7, 50)
    assert stream_hash(tokens, 7) == stream_hash(tokens, 7, 99) == stream_hash(tokens, 7, 1000)
    hashes = [stream_hash(tokens, 7), stream_hash(tokens, 8), stream_hash(tokens, 7, 50), stream_hash(wide, 7)]
    assert len(set(hashes)) == 4


def test_reading_does_not_count_the_file_as_our_memory(tmp_path):
    tokens = tokens_of(tmp_path, 20_000_000, dtype="<u4")
    before = psutil.Process().memory_info().rss
    for start in range(0, tokens.n_tokens, 1_000_000):
        tokens.read(start, 1_000_000)
    assert psutil.Process().memory_info().rss - before < 30 << 20


def test_a_file_cut_short_while_in_use_is_said(tmp_path):
    tokens = tokens_of(tmp_path, 50)
    with open(tokens.path, "r+b") as file:
        file.truncate(60)
    with pytest.raises(UserError, match="truncated while in use; prepare the text again"):
        tokens.read(28, 5)


def test_ids_beyond_two_bytes_are_read_whole(tmp_path):
    tokens = tokens_of(tmp_path, 70_003, dtype="<u4")
    assert tokens.read(70_000, 3).tolist() == [70_000, 70_001, 70_002]


@pytest.mark.parametrize("in_thread", [False, True])
def test_items_made_ahead_come_in_order_and_an_error_reaches_the_caller(in_thread):
    assert list(prefetch(iter(range(7)), str, in_thread=in_thread)) == [*"0123456"]
    coming = prefetch(iter([4, 2, 0, 1]), lambda x: 8 // x, in_thread=in_thread)
    assert (next(coming), next(coming)) == (2, 4)
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_ahead_makes_the_next_item_while_the_caller_works():
    made = threading.Event()
    coming = prefetch(iter([False, True]), lambda last: made.set() if last else None, in_thread=True)
    next(coming)
    assert made.wait(timeout=10)


def test_batches_are_the_rows_of_each_step_in_order(tmp_path):
    loader = loader_of(tmp_path)
    expected = [loader.rows(step, range(row, row + 2))[0].tolist() for step in (3, 4) for row in (0, 2, 4)]
    assert [idx.tolist() for idx, _ in loader.batches(3, 5, 2)] == expected
