"""What the background saver writes is the state as it was when asked; what it cannot write is told in its turn."""

import threading
from collections import OrderedDict

import pytest
import torch

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.background import BackgroundSaver
from ccmim_fast.checkpoints.io import checkpoints, load
from ccmim_fast.errors import CheckpointError


def names(folder):
    return [path.name for path in checkpoints(folder)]


@pytest.fixture
def notes():
    return []


@pytest.fixture
def saver(tmp_path, notes):
    made = BackgroundSaver(tmp_path, 9, notes.append)
    yield made
    made._writer.shutdown()


@pytest.fixture
def gate(monkeypatch):
    """While it is cleared, no save gets further than its start."""
    opened, save = threading.Event(), io.save

    def held(*args, **kwargs):
        assert opened.wait(timeout=60)
        return save(*args, **kwargs)

    monkeypatch.setattr(io, "save", held)
    yield opened
    opened.set()


def line(folder, step):
    return f"{folder / f'step_{step:08d}'}: not saved: No space left on device; the older checkpoints are intact"


def training_state():
    """A model with buffers and tied weights, its optimizer after a step, views, and what is not a tensor."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    base_N = torch.arange(12.0)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [base_N[3:6], base_N.view(3, 4).t(), base_N[:0], torch.empty(0), torch.empty(0, 3)],
        "dtypes": (torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([2**40]), torch.tensor(True)),
        "plain": OrderedDict(a=[1, 2.5, "ö\n", b"\0", None, True, (1, [])]),
    }
    return state, model, optimizer


def test_the_bytes_are_those_of_a_save_at_once(tmp_path, saver, gate):
    """Training that goes on, and containers that change, reach the file neither; tied weights and views stay so."""
    state, model, optimizer = training_state()
    gate.set()
    at_once = io.save(tmp_path / "at once", 1, state, keep=1)
    gate.clear()
    saver.save(1, state)
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    for view in state["views"]:
        view.fill_(-1)
    state["plain"]["a"][6][1].append("later")
    gate.set()
    saver.close()
    after = tmp_path / "step_00000001"
    assert (after / io.STATE).read_bytes() == (at_once / io.STATE).read_bytes()
    # The test has power: the state is another by now.
    assert not torch.equal(load(after)["model"]["0.weight"], state["model"]["0.weight"])
    assert hasattr(load(after)["model"], "_metadata")


def test_what_shares_memory_is_written_once(tmp_path, saver):
    base_N = torch.zeros(100_000)
    saver.save(1, {"parts": list(base_N.split(1000)), "whole": base_N})
    saver.close()
    assert 400_000 < (tmp_path / "step_00000001" / io.STATE).stat().st_size < 600_000
    back = load(tmp_path / "step_00000001")
    back["whole"][0] = 5
    assert back["parts"][0][0] == 5


@pytest.mark.gpu
def test_changed_on_the_gpu_right_after(tmp_path, saver):
    """The copies are behind a long kernel and before the changes in the stream; the thread waits for them."""
    x_N, half_N = torch.ones(1 << 24, device="cuda"), torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16)
    for step in (1, 2):
        torch.cuda._sleep(1 << 30)
        x_N.fill_(step)
        saver.save(step, {"x": x_N, "tail": x_N[-5:], "half": half_N, "host": torch.tensor(7)})
        x_N.fill_(-1)
        half_N.add_(1)
    saver.close()
    for step in (1, 2):
        state = load(tmp_path / f"step_{step:08d}")
        assert bool((state["x"] == step).all())
        assert state["tail"].tolist() == [step] * 5
        assert bool((state["half"] == step).all())
        assert state["host"] == 7


def test_save_returns_before_anything_is_written(tmp_path, saver, gate, state_of):
    saver.save(1, state_of(1))
    saver.poll()
    assert names(tmp_path) == []
    gate.set()
    saver.wait()
    assert names(tmp_path) == ["step_00000001"]


def test_one_at_a_time_in_order(tmp_path, saver, monkeypatch, state_of):
    events, save = [], io.save

    def noted(folder, step, *args, **kwargs):
        events.append(f"{step} begins")
        save(folder, step, *args, **kwargs)
        events.append(f"{step} ends")

    monkeypatch.setattr(io, "save", noted)
    for step in (3, 1, 2):
        saver.save(step, state_of(step))
        events.append(f"{step} asked")
    saver.close()
    assert [e for e in events if "asked" not in e] == [f"{s} {what}" for s in (3, 1, 2) for what in ("begins", "ends")]
    assert events.index("3 ends") < events.index("1 asked")
    assert [load(tmp_path / name)["value"] for name in names(tmp_path)] == [1, 2, 3]


def test_fault_10_two_warnings_then_an_error(tmp_path, saver, full, notes, state_of):
    full.update((1, 2, 3))
    saver.save(1, state_of(1))
    saver.save(2, state_of(2))
    assert notes == [f"{line(tmp_path, 1)}; training goes on"]
    saver.wait()
    saver.wait()
    assert notes == [f"{line(tmp_path, step)}; training goes on" for step in (1, 2)], "each is told once"
    saver.save(3, state_of(3))
    with pytest.raises(CheckpointError) as caught:
        saver.save(4, state_of(4))
    assert str(caught.value) == f"{line(tmp_path, 3)}; the save failed 3 times in a row"
    saver.close()
    assert len(notes) == 2
    assert names(tmp_path) == []


def test_fault_10_a_save_that_works_begins_the_count_again(tmp_path, saver, full, notes, state_of):
    full.update((1, 2, 4, 5))
    for step in range(1, 7):
        saver.save(step, state_of(step))
    saver.close()
    assert notes == [f"{line(tmp_path, step)}; training goes on" for step in (1, 2, 4, 5)]
    assert names(tmp_path) == ["step_00000003", "step_00000006"]


def test_notes_come_from_the_thread_that_asks(tmp_path, full, state_of):
    threads = []
    saver = BackgroundSaver(tmp_path, 9, lambda _: threads.append(threading.current_thread()))
    full.add(1)
    saver.save(1, state_of(1))
    saver._running.exception()
    assert threads == []
    saver.poll()
    assert threads == [threading.current_thread()]
    saver.save(2, state_of(2))
    saver.close()


@pytest.mark.parametrize("told_before", [False, True])
def test_the_last_save_must_not_fail(tmp_path, saver, full, notes, state_of, told_before):
    full.add(2)
    saver.save(1, state_of(1))
    saver.save(2, state_of(2))
    if told_before:
        saver.wait()
    with pytest.raises(CheckpointError) as caught:
        saver.close()
    assert str(caught.value) == line(tmp_path, 2)
    assert len(notes) == told_before


def test_a_block_ends_with_the_last_save(tmp_path, notes, full, state_of):
    full.add(2)
    with pytest.raises(CheckpointError, match="No space left"), BackgroundSaver(tmp_path, 9, notes.append) as saver:
        saver.save(2, state_of(2))


def test_an_error_of_the_block_is_not_hidden(tmp_path, notes, full, state_of):
    full.add(2)

    def run():
        with BackgroundSaver(tmp_path, 9, notes.append) as saver:
            saver.save(1, state_of(1))
            saver.save(2, state_of(2))
            raise KeyError("why it ends")

    with pytest.raises(KeyError, match="why it ends"):
        run()
    assert notes == [line(tmp_path, 2)], "it was waited for"
    assert names(tmp_path) == ["step_00000001"]


def test_what_is_no_checkpoint_error_is_raised(tmp_path, saver, notes, state_of):
    saver.save(1, {"a": object()})
    with pytest.raises(TypeError, match=r"state\['a'\] is a object"):
        saver.wait()
    saver.save(2, {"a": object()})
    with pytest.raises(TypeError, match=r"state\['a'\] is a object"):
        saver.save(3, state_of(3))
    saver.save(4, {"a": object()})
    with pytest.raises(TypeError, match=r"state\['a'\] is a object"):
        saver.close()
    assert notes == []


def test_kept_for_good(tmp_path, notes, state_of):
    with BackgroundSaver(tmp_path, 2, notes.append) as saver:
        for step in range(1, 8):
            saver.save(step, state_of(step), for_good=step in (2, 6))
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 6, 7)]
    assert load(tmp_path / "step_00000002")["value"] == 2
