"""FSDP2: two ranks with divided weights do what two with whole ones do, and read each other's checkpoints."""

import os
import pickle
import shutil

import pytest
import torch
from ranks_launcher import needs_mean, run_in_ranks
from sharded_ranks import CASES, FEW, STEPS, config_of, rank_main
from tiny import tiny_config

from ccmim_fast.checkpoints import io
from ccmim_fast.checkpoints.convert import to_timm
from ccmim_fast.checkpoints.manifest import MANIFEST, Sum, manifest, read_manifest
from ccmim_fast.checkpoints.run import open_run
from ccmim_fast.engine.build import build_step, check_device
from ccmim_fast.errors import CheckpointError, ConfigError
from ccmim_fast.export.plain import export_timm
from ccmim_fast.ranks.fsdp import is_sharded
from ccmim_fast.ranks.session import Session

pytestmark = [pytest.mark.slow, needs_mean]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    """The results of each of two ranks."""
    run_in_ranks(rank_main, 2, folder, folder)
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_whole_weights(ranks, case):
    (of_ddp, whole), (of_fsdp, divided) = ranks[0]["equality"][case]
    assert of_ddp.shape == (STEPS if case == "bank" else FEW, 4)
    torch.testing.assert_close(of_fsdp, of_ddp, rtol=1e-5, atol=1e-6)
    assert len(whole) == len(divided)
    for a, b in zip(whole, divided):
        if a.ndim > 1:  # a key's bias has no gradient but rounding, which AdamW makes steps of
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    # The comparison has power: the steps change the loss by far more than that.
    assert abs(of_ddp[0, 0] - of_ddp[-1, 0]) > 1e-3


def test_in_half_precision_too(ranks):
    """The first step is DDP's, whose norm of gradients tells that none is missing; the weights are rounded later on."""
    of_ddp, of_fsdp = ranks[0]["half"]
    torch.testing.assert_close(of_fsdp[0], of_ddp[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(of_fsdp[:, 1], of_ddp[:, 1], rtol=5e-3, atol=0)
    assert not torch.equal(of_fsdp, of_ddp), "norms are gathered in bfloat16"


def test_a_rank_has_half_of_everything(ranks):
    for what in ("weights", "gradients", "moments"):
        held, total = zip(*(found["shares"][what] for found in ranks))
        assert sum(held) == total[0] == total[1]
        assert all(share == pytest.approx(total[0] / 2, rel=0.03) for share in held)


def test_what_was_gathered_to_look_is_let_go(ranks):
    for found in ranks:
        stale, fresh, expected = found["looking"]
        torch.testing.assert_close(fresh, expected)
        assert not torch.allclose(stale, expected), "nothing was kept: the test tests nothing"


def test_both_go_on_from_the_checkpoints_of_both(ranks):
    for found in ranks:
        found = found["going on"]
        for writer in ("ddp", "fsdp"):
            before, losses, after = found[writer]
            for reader in ("ddp", "fsdp"):
                was, those, is_now = found[writer, reader]
                assert len(was) == len(before)
                assert all(map(torch.equal, was, before)), (writer, reader)
                torch.testing.assert_close(those, losses, rtol=1e-5, atol=1e-6)
                if writer == reader:
                    assert torch.equal(those, losses)
                    assert all(map(torch.equal, is_now, after))


def test_one_process_reads_what_two_have_divided(ranks, folder):
    """And the other way round is the same as from DDP's, which one process writes."""
    of_fsdp, of_ddp = (io.load(folder / kind / "checkpoints" / "step_00000003") for kind in ("fsdp", "ddp"))
    assert of_fsdp.keys() == of_ddp.keys()
    assert of_fsdp["model"].keys() == of_ddp["model"].keys()
    assert of_fsdp["optimizer"]["state"].keys() == of_ddp["optimizer"]["state"].keys()
    before = ranks[0]["going on"]["fsdp"][0]
    assert all(map(torch.equal, of_fsdp["model"].values(), before))
    one = build_step(config_of("fsdp", optim={"ema_decay": 0.9}), Session(0, 1, torch.device("cpu")))
    assert not is_sharded(one.model), "one process has all weights"
    one.model.load_state_dict(of_fsdp["model"])
    one.optimizer.load_state_dict(of_fsdp["optimizer"])


def test_divided_weights_become_one_file(ranks, folder, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(*export_timm(open_run(str(folder / "fsdp")), tmp_path / "encoder.safetensors"))
    averages = io.load(folder / "fsdp" / "checkpoints" / "step_00000003")["ema"]
    expected = to_timm({name.removeprefix("module."): value for name, value in averages.items()})
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.fixture
def two(ranks, folder, tmp_path):
    """A folder with the same divided checkpoint twice, as steps 3 and 4."""
    for step in (3, 4):
        path = tmp_path / f"step_{step:08d}"
        shutil.copytree(folder / "fsdp" / "checkpoints" / "step_00000003", path)
        (path / MANIFEST).write_bytes(manifest(step, read_manifest(path, None)))
    return tmp_path


def files_of(path):
    return sorted(name for name in read_manifest(path, None))


def test_every_file_is_checked(two):
    path = two / "step_00000004"
    assert files_of(path) == [".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"]
    for name in files_of(path):
        content = (path / name).read_bytes()
        for damaged in (content[:-1], content[:100] + bytes([content[100] ^ 1]) + content[101:], None):
            (path / name).unlink()
            if damaged is not None:
                (path / name).write_bytes(damaged)
            found = io.newest(two)
            assert found.path.name == "step_00000003"
            assert len(found.problems) == 1
            assert name in found.problems[0]
            (path / name).write_bytes(content)
    assert io.newest(two).path == path


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def sealed(path, content):
    """The checkpoint with another index, and a manifest that fits it."""
    import hashlib

    (path / ".metadata").write_bytes(content)
    sums = read_manifest(path, None)
    sums[".metadata"] = Sum(len(content), hashlib.sha256(content).hexdigest())
    (path / MANIFEST).write_bytes(manifest(4, sums))


def test_a_hostile_index_runs_no_code(two, tmp_path_factory):
    mark = tmp_path_factory.mktemp("hostile") / "ran"
    path = two / "step_00000004"
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = Hostile(mark)
    sealed(path, pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.metadata refused: it asks for posix\.mkdir"):
        io.load(path)
    assert not mark.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists(), "the hostile file is harmless: the test tests nothing"


@pytest.mark.parametrize("where", ["../state.pt", "/etc/passwd"])
def test_an_index_names_no_other_files(two, where):
    path = two / "step_00000004"
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = where
    sealed(path, pickle.dumps(index))
    with pytest.raises(CheckpointError, match="it names the file"):
        io.load(path)


def test_an_index_of_other_things_is_refused(two):
    path = two / "step_00000004"
    for content, words in ((b"", "refused"), (b"hello", "refused"), (pickle.dumps([1]), "holds a list")):
        sealed(path, content)
        with pytest.raises(CheckpointError, match=words):
            io.load(path)
    assert io.newest(two).path.name == "step_00000003"


def test_a_full_disk_at_one_rank_fails_the_save_at_both(ranks):
    for found in ranks:
        notes, left, failure = found["full disk"]
        assert len(notes) == 1
        assert "step_00000002: not saved: No space left on device" in notes[0]
        assert left == [".lock", "step_00000001"]
        assert "the save failed 3 times in a row" in failure


@pytest.mark.parametrize(
    ("train", "optim", "words"),
    [
        ({"precision": "fp16"}, {}, "fp16"),
        ({}, {"name": "apex_adamw"}, "apex_adamw"),
        ({"compile": "step"}, {}, "use blocks"),
    ],
)
def test_what_it_cannot_do_is_told_before(train, optim, words):
    config = tiny_config(train={"parallel": "fsdp", "device": "cpu", **train}, optim=optim)
    with pytest.raises(ConfigError, match=words):
        check_device(config, Session(0, 2, torch.device("cpu")))


def test_no_rank_looks_alone():
    config = tiny_config(train={"parallel": "fsdp", "device": "cpu", "precision": "fp32"})
    check_device(config, Session(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match="look at the model alone"):
        check_device(config, Session(0, 2, torch.device("cpu")), looks=True)
