"""Several processes prune a model together, and give the same bytes as one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ace_triton import Recipe, evaluate, prune_checkpoint, prune_model
from ace_triton.decoders.lanes import Lanes
from ace_triton.errors import ProcessError, TextError
from ace_triton.evaluate import perplexity
from ace_triton.inputs import checkpoint
from ace_triton.processes import Processes, own_device, shares
from ace_triton.streaming.file_store import FileStore

RECIPES = {
    "balanced": Recipe("wanda", permute=True, update="lstsq"),
    "outputs": Recipe("ace"),
    "layers": Recipe("sparsegpt", sequential="layers"),
    "dense statistics": Recipe("wanda", sequential="none", include=("*.down_proj", "lm_head")),
    "sample": Recipe("stade", sparsity="4:8", update="rescale", budgets="outliers", rotate=True),
    "magnitude": Recipe("magnitude"),
}


@pytest.fixture
def many_ids():
    """Ten sequences, which are ten batches of one."""
    return torch.randint(3, 101, (10, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_weights_do_not_depend_on_the_number_of_processes(make_decoder, together, tmp_path, many_ids, recipe, size):
    alone = make_decoder("llama")
    report = prune_model(alone, many_ids, recipe, batch_size=1)

    def prune(rank):
        model = make_decoder("llama")
        assert prune_model(model, many_ids, recipe, batch_size=1).layers == report.layers
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / f"{rank}.safetensors")

    assert together(size, prune) == [0] * size
    for rank in range(size):
        shared = load_file(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(shared[name], weight) for name, weight in alone.named_parameters())


@pytest.mark.parametrize("recipe", ["best", Recipe("wanda", sequential="none")], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_more_processes_than_batches(make_decoder, together, many_ids, family, recipe):
    alone = make_decoder(family)
    prune_model(alone, many_ids, recipe)

    def prune(_rank):
        model = make_decoder(family)
        prune_model(model, many_ids, recipe)
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in alone.named_parameters())

    assert together(2, prune) == [0, 0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text"])
def test_experts_and_odd_families(make_decoder, together, many_ids, family):
    recipe, alone = Recipe("wanda", update="lstsq"), make_decoder(family)
    prune_model(alone, many_ids, recipe, batch_size=1)

    def prune(_rank):
        model = make_decoder(family)
        prune_model(model, many_ids, recipe, batch_size=1)
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in alone.named_parameters())

    assert together(2, prune) == [0, 0]


@pytest.mark.parametrize("recipe", ["balanced", "best", Recipe("wanda", sequential="none")], ids=str)
def test_streamed_by_several_processes(tiny_checkpoint, together, tmp_path, recipe):
    ids = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(1))

    def prune(out):
        prune_checkpoint(tiny_checkpoint, tmp_path / out, ids, recipe, batch_size=1)

    prune("one")
    assert together(2, lambda _: prune("two")) == [0, 0]
    for path in (tmp_path / "one").iterdir():
        if path.name != "ace_triton.json":
            assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_streamed_run_on_several_hosts_is_refused(tiny_checkpoint, tmp_path, many_ids, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a streamed run needs all its processes on one machine"):
        prune_checkpoint(tiny_checkpoint, tmp_path / "out", many_ids, "fast")
    assert not list(tmp_path.glob("*out*"))


def test_a_streamed_run_of_several_processes_resumes_in_one(make_decoder, save, together, tmp_path, many_ids):
    source = save(make_decoder("llama"))

    def prune(out):
        prune_checkpoint(source, tmp_path / out, many_ids, "balanced", batch_size=1)

    def killed(rank):
        finish, done = FileStore.finish, []

        def stop_in_the_second(self, *args):
            done.append(1)
            if len(done) == 2:
                self.wait()
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, *args)

        FileStore.finish = stop_in_the_second
        prune("out")

    assert together(2, killed) == [-signal.SIGKILL] * 2
    assert together(2, lambda _: prune("out")) == [0, 0]
    assert len(checkpoint.read_report(tmp_path / "out")["streamed"]["resumed_units"]) == 1
    prune("expected")
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_processes_with_different_texts_say_so(make_decoder, together, many_ids, capfd):
    assert together(2, lambda rank: prune_model(make_decoder("llama"), many_ids.roll(rank, 0), "fast")) == [1, 1]
    assert "different calibration sets or recipes" in capfd.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("batches", [1, 2, 3, 10])
def test_every_batch_is_run_once(size, batches):
    runs = [list(Lanes(batches, Processes(rank, size)).batches) for rank in range(size)]
    assert sorted(number for run in runs for number in run) == list(range(batches))
    assert sum(bool(run) for run in runs) == min(size, batches, 4)


def test_work_is_shared_out():
    assert shares([1.0, 8.0, 1.0, 7.0], 2) == [1, 0, 0, 1]
    assert shares([5.0, 5.0], 4) == [0, 1]
    assert shares([1.0] * 3, 1) == [0, 0, 0]


def torchrun(*words, size=2):
    """Run the command line under torchrun; the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size, "-m", "ace_triton", *words]
    return subprocess.run(list(map(str, launcher)), capture_output=True, text=True, check=False)


def test_the_command_under_torchrun(tiny_checkpoint, tmp_path, some_text):
    words = ("prune", tiny_checkpoint, tmp_path / "out", "--method", "wanda", "--batch-size", "1")
    ended = torchrun(*words, "--calibration", some_text, "--samples", "4", "--length", "16")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written to") == 1
    assert checkpoint.read_report(tmp_path / "out")["method"] == "wanda"


def test_commands_that_do_not_share_their_work_say_so(command, monkeypatch, tiny_checkpoint):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = command("info", tiny_checkpoint)
    assert code == 1
    assert "torchrun started 2 processes, but info runs in one: run it without torchrun" in errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_perplexity_does_not_depend_on_the_number_of_processes(tiny_model, together, size):
    ids = torch.randint(0, 320, (60,))
    expected = perplexity(tiny_model, ids, length=16)

    def measure(rank):
        seen = []
        found = perplexity(tiny_model, ids, length=16, progress=lambda *told: seen.append(told))
        assert found == expected
        assert rank or seen[-1] == (3, 3)

    assert expected.windows == 3
    assert together(size, measure) == [0] * size


def test_evaluate_prints_and_writes_once(command, command_together, tiny_checkpoint, some_text, tmp_path):
    words = ("evaluate", tiny_checkpoint, "--text", some_text, "--length", 16, "--windows", 3, "--json")
    (_, shown, errors), other = command_together(2, *words, tmp_path / "two.json")
    assert other == (0, "", "")
    assert "perplexity" in shown, errors
    assert command(*words, tmp_path / "one.json")[1] == shown
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in ("one", "two"))
    assert {**two, "date": one["date"]} == one


def test_an_error_of_all_processes_is_one_line(command_together, tiny_checkpoint, some_text):
    ended = command_together(2, "evaluate", tiny_checkpoint, "--text", some_text, "--length", 129)
    assert [code for code, *_ in ended] == [1, 1]
    assert "".join(errors for *_, errors in ended).count("error: --length 129 is more than") == 1


def test_an_error_of_one_process_ends_the_others(command_together, tiny_checkpoint, some_text, monkeypatch):
    def fail_in_the_second(*_):
        if Processes.now().rank == 1:
            raise TextError("only here")
        return 1

    monkeypatch.setattr(evaluate, "forward_work", fail_in_the_second)
    (first, _, errors), (second, _, own) = command_together(
        2, "evaluate", tiny_checkpoint, "--text", some_text, "--length", 16
    )
    assert (first, second) == (1, 1)
    assert own == "error: only here\n"
    assert "error" not in errors


def test_what_only_the_first_does_waits_for_nobody(tiny_model, together):
    ids = torch.randint(0, 320, (48,))
    expected = perplexity(tiny_model, ids, length=16)

    def measure(rank):
        assert Processes.now() == Processes(rank, 2)
        assert Processes.now().first_does(lambda: perplexity(tiny_model, ids, length=16)) == expected

    assert together(2, measure) == [0, 0]


def test_a_process_that_lost_another_one_says_so(together):
    def leave(rank):
        if rank == 1:
            os._exit(7)
        with pytest.raises(ProcessError, match="another process of this run has ended or cannot be reached"):
            Processes.now().gather(rank)
        os._exit(8)

    assert together(2, leave) == [8, 7]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert own_device("cuda:1") == "cuda:1"
    settings = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert [own_device(device) for device in ("cpu", "cuda")] == ["cpu", "cuda:1"]
    assert taken == [1]
    with pytest.raises(ValueError, match="--device cuda:1: torchrun started 3 processes on this machine"):
        own_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="but it has 2: use --nproc-per-node 2, or --device cpu"):
        own_device("cuda")
